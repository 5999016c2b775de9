"""A valid body for every endpoint that takes one, and how to spoil it at random."""

import copy
import random
from typing import Any

FUNCTION = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAMPLING = {
    "temperature": 0.5,
    "top_k": 3,
    "seed": 1,
    "stop": ["x"],
    "logit_bias": {"40": 1},
    "bad_words": ["story"],
    "stop_token_ids": [5],
    "truncate_prompt_tokens": 50,
    "return_token_ids": True,
    "cache_salt": "s",
    "priority": 1,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {**SAMPLING, "prompt": ["a", [40, 41]], "echo": True, "logprobs": 2, "n": 2},
    "/v1/chat/completions": {
        **SAMPLING,
        "messages": [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ],
        "max_completion_tokens": 20,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/responses": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "r"},
        ],
        "instructions": "i",
        "max_output_tokens": 20,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "none",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "store": True,
        "stream": True,
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}],
            },
        ],
        "system": [{"type": "text", "text": "s"}],
        "max_tokens": 20,
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}], "system": "s"},
    "/v1/embeddings": {
        "input": ["a", [40, 41]],
        "encoding_format": "base64",
        "dimensions": 4,
        "pooling": "mean",
        "normalize": False,
    },
    "/tokenize": {"prompt": "a", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [40, 41]},
}
ADMIN_BODIES: dict[str, dict[str, Any]] = {
    "/admin/kv/verify": {
        "recompute": 1,
        "prompts": ["a", [40, 41], {"prompt": "a", "cache_salt": "s"}],
        "seed": 1,
    },
    "/admin/kv/clear": {"tiers": ["device", "host"], "stale": False},
    "/admin/kv/pin": {"hashes": ["0" * 64], "prompt": "a", "cache_salt": "s", "pinned": False},
    "/admin/kv/erase": {"cache_salt": "s"},
}
"""These need the admin key, and an engine with KV tiers."""

OTHERS: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**30, 0.5, -1e300, 1e308),
    *("", "a", "auto", "required", "\u0000", "\ud83d\ude00", "x" * 3000, "json_schema", "user"),
    *([], [[]], [None], [1, "a"], [[[40]]], {}, {"type": "x"}, {"a": {"b": []}}, [{}], [1.5]),
    *([40] * 400, {"type": "function"}, {"type": ["text"]}, {"type": {"a": 1}, "text": 5}),
]


def mutated(body: Any, rng: random.Random) -> Any:
    """A body in which one to three places hold something else, or nothing."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []

        def collect(value: Any, places: list[tuple[Any, Any]] = places) -> None:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys:
                places.append((value, key))
                if isinstance(value[key], (dict, list)):
                    collect(value[key])

        collect(body)
        if not places:
            break
        parent, key = rng.choice(places)
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(OTHERS))
    return body
