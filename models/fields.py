"""Checked access to the fields of a config.json: every value is either used, harmless or refused.

A field that a reader never asked for is refused when its name suggests that it changes the
mathematics and its value is not the neutral one; other leftovers are logged and ignored.
Knows no family. Errors name the file and the field.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxserve.errors import WeightsError

log = logging.getLogger(__name__)

_REQUIRED = object()

_MATHEMATICAL_WORDS = frozenset(
    """act activation alibi alpha attention attn beta bias bidirectional cap capping causal chunk
    chunked clip clipping conv cross dilation dim experts expert factor gate gated head heads
    hidden interleave interleaved interval latent layer layernorm layers linear logit logits lora
    mamba mlp moe mtp multiplier mup nope norm norms parallel pattern position positional
    positions quant quantization quantized rank residual rope rotary routed router routing scale
    scaling shared sink sinks size softcap softcapping sparse sparsity ssm temperature theta topk
    type window yarn""".split()
)

_HARMLESS = frozenset(
    """architectures model_type tokenizer_class torch_dtype dtype transformers_version auto_map
    initializer_range initializer_factor use_cache pretraining_tp cache_implementation
    attn_implementation attention_dropout hidden_dropout residual_dropout embedding_dropout
    resid_pdrop embd_pdrop hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
    num_logits_to_keep logits_to_keep max_window_layers keys_to_ignore_at_inference
    problem_type is_llama_config id2label label2id num_nextn_predict_layers temperature
    router_aux_loss_coef output_attentions output_hidden_states use_flash_attn
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id eod_token_id
    decoder_start_token_id image_token_id unk_token_id""".split()
)

_HINTS = ("_", "fuse_", "fused_", "use_flash", "flash_")
"""Beginnings of names that are private, or say which implementation to use."""


class Fields:
    """The fields of one config.json; remembers which were asked for.

    Args:
        values: the parsed object.
        origin: what to call it in errors, usually the path.
    """

    def __init__(self, values: Mapping[str, Any], origin: str):
        self._values = dict(values)
        self._origin = origin
        self._asked: set[str] = set()

    @property
    def origin(self) -> str:
        return self._origin

    def set_defaults(self, **values: Any) -> None:
        """Values for fields that are missing, for families whose configs leave much unsaid."""
        self._values = values | self._values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; an explicit null is None, not the default."""
        self._asked.add(name)
        return self._values.get(name, default)

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """A positive integer; null counts as missing."""
        return self._checked(
            name, default, "a positive integer", lambda v: type(v) is int and v > 0
        )

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number; null counts as missing."""
        return float(self._checked(name, default, "a number", lambda v: type(v) in (int, float)))

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool = False) -> bool:
        return self._checked(name, default, "true or false", lambda v: type(v) is bool)

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """The meaning of a field whose values are names."""
        value = self._checked(name, default, "a string", lambda v: isinstance(v, str))
        if value not in choices:
            self.refuse(name, f"is {value!r}; supported are {', '.join(choices)}")
        return choices[value]

    def expect(self, **allowed: Any) -> None:
        """Fields that may be left out, or have this one value (or one of a tuple of values)."""
        for name, values in allowed.items():
            values = values if isinstance(values, tuple) else (values,)
            value = self.get(name)
            if value is not None and value not in values:
                options = " or ".join(repr(x) for x in values)
                self.refuse(name, f"is {_short(value)}; only {options} is supported")

    def table(self, name: str) -> dict[str, Any]:
        """A nested object; null and missing are empty."""
        return self._checked(name, {}, "an object", lambda v: isinstance(v, dict))

    def per_layer(self, name: str, num_layers: int) -> list[Any] | None:
        """A list with one entry per layer, if given."""
        value = self._checked(name, [], "a list", lambda v: isinstance(v, list))
        if not value:
            return None
        if len(value) < num_layers:
            self.refuse(name, f"has {len(value)} entries; the model has {num_layers} layers")
        return value[:num_layers]

    def refuse(self, name: str, why: str) -> NoReturn:
        raise WeightsError(f"{self._origin}: field {name!r} {why}")

    def refuse_leftovers(self) -> None:
        """Raise for a field that was not asked for and may change what the model computes."""
        ignored = []
        for name, value in self._values.items():
            if name in self._asked or name in _HARMLESS or name.startswith(_HINTS):
                continue
            if _is_neutral(name, value):
                continue
            if _sounds_mathematical(name):
                self.refuse(
                    name,
                    f"is {_short(value)}, which this architecture does not support: it would "
                    "change what the model computes",
                )
            ignored.append(name)
        if ignored:
            log.info("%s: fields without effect: %s", self._origin, ", ".join(sorted(ignored)))

    def _checked(self, name: str, default: Any, expected: str, ok: Callable[[Any], bool]) -> Any:
        value = self.get(name)
        if value is None:
            if default is _REQUIRED:
                self.refuse(name, f"is missing; expected {expected}")
            return default
        if not ok(value):
            self.refuse(name, f"is {_short(value)}; expected {expected}")
        return value


def _sounds_mathematical(name: str) -> bool:
    return not _MATHEMATICAL_WORDS.isdisjoint(re.split(r"[_.\W\d]+", name.lower()))


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", 0, [], {}):
        return True
    scales = name.endswith(("multiplier", "scale", "scaling", "factor"))
    return scales and value in (1, 1.0) and value is not True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
