"""The nouns every layer shares: requests, sampling parameters, sequences, token events.

Knows nothing of jax, the KV cache, models or HTTP. Everything here is frozen except `Sequence`,
which belongs to the scheduler.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


MAX_LOGPROBS = 20
"""Most alternatives a token that `logprobs` and `prompt_logprobs` can ask for (OpenAI's bound)."""

MAX_LOGIT_BIAS = 300
"""Most entries of `logit_bias` (OpenAI's bound)."""

MAX_BAD_SEQUENCES, MAX_BAD_TOKENS = 256, 8
"""Most token sequences that an answer may be told to avoid, and most tokens of each."""

MAX_STOP_TOKEN_IDS = 16
"""Most ids of `stop_token_ids` together with the model's own end-of-sequence ids."""

POOLINGS = ("last", "mean")
"""What an embedding is of: the last token's hidden state, or the mean over all tokens."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, of how much)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are those of the OpenAI API, and `abort`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What an answer must look like; exactly one of the first six. Names and meanings as in vLLM.

    Attributes:
        json: a JSON schema, as an object or as text.
        regex: a regular expression that the whole answer matches (Rust syntax, no look-around).
        choice: the answer is one of these texts.
        grammar: a grammar in Lark or GBNF syntax.
        json_object: the answer is any JSON object.
        structural_tag: not supported; use tools.
        disable_any_whitespace: JSON without blanks and line breaks.
        disable_additional_properties: objects hold what their `properties` name only.
        whitespace_pattern: what may stand between the parts of JSON; default: at most one blank.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens and when to stop; names and meanings as in vLLM.

    Attributes:
        n: number of independent answers to one prompt.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: drop tokens less likely than this times the likeliest.
        seed: makes the samples a function of the request alone; None draws one.
        presence_penalty, frequency_penalty: subtracted for tokens of the answer so far.
        repetition_penalty: divides (or multiplies, if negative) logits of tokens seen anywhere.
        logit_bias: added to the logits of these token ids.
        allowed_token_ids: if given, nothing else can be sampled.
        banned_token_ids: can never be sampled.
        bad_words: texts that may not come in the answer, with or without a blank before them.
        bad_token_sequences: rows of tokens that may not; where bad words end up.
        min_tokens: no end-of-sequence or stop token id before this many tokens.
        max_tokens: stop after this many tokens; None means as many as the context holds.
        ignore_eos: go on after the model's end-of-sequence token.
        stop: stop strings; `stop_token_ids`: stop ids.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: alternatives to report per generated token (0: only the chosen one's).
        prompt_logprobs: the same for each prompt token.
        return_logits: hand out the float32 logits that each token was sampled from, as the model
            made them.
        return_hidden_states: hand out the hidden state (after the final norm) behind each of them.
        return_prompt_states: the same two for every position of the prompt; its KV is then
            computed, not taken from the cache.
        structured_outputs: what the answer must look like; it wins over `min_tokens`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_logits: bool = False
    return_hidden_states: bool = False
    return_prompt_states: bool = False
    structured_outputs: StructuredOutputsParams | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued once (`n` > 1 is fanned out before this point).

    Attributes:
        request_id: unique among the live requests.
        prompt_ids: token ids, at least one.
        sampling: validated parameters; `max_tokens` and `seed` are resolved (not None).
        eos_token_ids: the model's end-of-sequence ids.
        priority: smaller runs earlier under the priority policy.
        arrival_s: time.monotonic() at arrival; orders equal priorities.
        cache_salt: requests share cached blocks only with requests of the same salt.
        no_store: nothing of it is kept for other requests, in no tier.
        pooling: one of POOLINGS: the request ends after its prompt, with a pooled hidden state
            instead of a token.
        grammar: the answer's grammar, which compiles (see `jaxserve.structured`); "": any answer.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""
    no_store: bool = False
    pooling: str | None = None
    grammar: str = ""


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, under the model's own distribution (before sampling)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """What was decided about blocks of a prompt that lower tiers had and the device had not.

    Attributes:
        choice: "load", "split" (compute the head while the tail is loaded) or "recompute".
        num_blocks: how many lower tiers had.
        num_loaded: how many of them were asked for.
        load_s, compute_s: the estimates that were compared; 0: nothing was measured yet.
    """

    choice: str
    num_blocks: int
    num_loaded: int
    load_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class PromptReuse:
    """What of a prompt was not computed for this request.

    Attributes:
        cached: prompt tokens by where they were found: "device", "host", or a store's name.
        decision: None if lower tiers had nothing to decide about.
        queued_s: how long the request waited for a place in a step.
    """

    cached: Mapping[str, int]
    decision: LoadDecision | None = None
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """What the model computed at one position, or over a prompt, in float32.

    Attributes:
        hidden: [D] after the final norm; for pooling, the pooled one.
        logits: [V], before anything that sampling does to them.
        prompt_hidden: [prompt tokens, D]; comes with the first token.
        prompt_logits: [prompt tokens, V]; those at position p are about token p + 1.
    """

    hidden: "np.ndarray | None" = None
    logits: "np.ndarray | None" = None
    prompt_hidden: "np.ndarray | None" = None
    prompt_logits: "np.ndarray | None" = None


class TokenEvent(NamedTuple):
    """One generated token, or the end of a request without one (`token_id` is None).

    `num_cached_tokens` is how many tokens of the prompt came from the KV cache, in whatever tier.
    `prompt_logprobs` and `reuse` come once, with the first event: by then every load has been used
    or given up.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    reuse: PromptReuse | None = None
    states: States | None = None


@dataclass(frozen=True, slots=True)
class StartupReport:
    """What start-up did, for the ready line."""

    num_params: int
    load_s: float
    num_pages: tuple[int, ...]  # per KV group
    num_cache_tokens: int
    kv_bytes: int
    num_graphs: int
    compile_s: float
    num_kept_graphs: int = 0  # traced by an earlier start


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps per token: decides its KV group.

    Attributes:
        num_kv_heads, head_dim: shape of one token's key (and value).
        window: a query at position p sees keys in (p - window, p]; None sees all.
        latent_dim: keys alone are kept, and a value is so many entries of its key (multi-head
            latent attention); None keeps both.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    latent_dim: int | None = None

    @property
    def parts(self) -> int:
        """Vectors that are kept of each token and head."""
        return 2 if self.latent_dim is None else 1


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share page shape and lifetime, in model order.

    `layers` are indices into the model's layers; a layer's place in the group is its index here.
    """

    index: int
    layers: tuple[int, ...]
    cache: LayerCache


def group_layers(layer_caches: "tuple[LayerCache, ...]") -> tuple[KVGroup, ...]:
    """Group layers by equal cache shape and window; groups that see everything come first."""
    by_cache: dict[LayerCache, list[int]] = {}
    for layer, cache in enumerate(layer_caches):
        by_cache.setdefault(cache, []).append(layer)
    ordered = sorted(by_cache.items(), key=lambda item: (item[0].window is not None, item[1][0]))
    return tuple(KVGroup(i, tuple(layers), cache) for i, (cache, layers) in enumerate(ordered))
