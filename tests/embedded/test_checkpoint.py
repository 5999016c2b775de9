"""The shipped checkpoint: small, complete, in step with what made it, and good at retrieval."""

import json
import math

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from jaxserve.embedded import checkpoint_path, export, retrieval
from jaxserve.embedded.corpus import Encoder
from jaxserve.embedded.train import HeldoutCheck
from jaxserve.weights import load_checkpoint

FOLDER = checkpoint_path()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def render(messages: list[dict[str, str]]) -> str:
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = ImmutableSandboxedEnvironment().from_string(settings["chat_template"])
    return template.render(
        messages=messages, bos_token=settings["bos_token"], add_generation_prompt=True
    )


def test_checkpoint_is_at_most_8_mb_and_5_million_parameters():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    with safe_open(FOLDER / "model.safetensors", framework="numpy") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]
    sizes = [math.prod(part.get_shape()) for part in slices]
    assert sum(sizes) <= 5_000_000
    assert {part.get_dtype() for part in slices} == {"BF16"}


def test_config_is_the_architecture_that_was_trained(tokenizer: Tokenizer):
    written = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert written == export.hf_config(tokenizer)
    assert export.decoder_config(tokenizer).eos_token_ids == (tokenizer.token_to_id("<|end|>"),)


def test_tokenizer_keeps_any_text(tokenizer: Tokenizer):
    for text in ("", "  a\n\n", "naïve 東京 🦊\u200d", "a\x00b\x7f", "x" * 500):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_template_renders_what_training_encodes(tokenizer: Tokenizer):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    assert render(messages).endswith("What is 2 + 2?<|end|><|assistant|>")
    rendered = tokenizer.encode(render(messages), add_special_tokens=False).ids
    trained, _ = Encoder(tokenizer).chat([*messages, {"role": "assistant", "content": "4"}])
    assert rendered == trained[: len(rendered)]


def test_held_out_prompts_have_128_to_1024_tokens(tokenizer: Tokenizer):
    prompts = list(retrieval.heldout_prompts(Encoder(tokenizer).count_tokens, 100))
    lengths = [len(tokenizer.encode(render(prompt.messages)).ids) for prompt in prompts]
    assert lengths == [prompt.num_tokens for prompt in prompts]
    assert 128 <= min(lengths) < 200 and 960 < max(lengths) <= 1024


def test_shipped_weights_answer_held_out_prompts(tokenizer: Tokenizer):
    loaded = load_checkpoint(FOLDER, "float32", progress=False)
    right = HeldoutCheck(Encoder(tokenizer), loaded.config, num_prompts=16)(loaded.params)
    assert sum(right.values()) / len(right) >= 0.9
