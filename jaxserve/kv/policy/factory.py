"""Policies by name: `lru`, `s3fifo?small=0.2`, `arc?store_threshold=2`.

`store_threshold=N` puts a reuse gate before any policy; 1 is no gate.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from jaxserve.errors import ConfigError
from jaxserve.kv.policy.adaptive import Adaptive
from jaxserve.kv.policy.arc import ARC
from jaxserve.kv.policy.base import Policy
from jaxserve.kv.policy.gate import ReuseGate
from jaxserve.kv.policy.lru import LRU
from jaxserve.kv.policy.s3fifo import S3FIFO
from jaxserve.kv.policy.tinylfu import TinyLFU

POLICIES: dict[str, Callable[..., Policy]] = {
    "auto": Adaptive,
    "lru": LRU,
    "arc": ARC,
    "s3fifo": S3FIFO,
    "tinylfu": TinyLFU,
}
"""Constructors; what they take beyond `capacity` are the policy's parameters."""

DEFAULT = "auto"


def make_policy(spec: str, capacity: int) -> Policy:
    """A new policy for one tier.

    Args:
        spec: name, then parameters as in a URL, e.g. `s3fifo?small=0.2&store_threshold=2`.
        capacity: blocks that the tier holds.

    Raises:
        ConfigError: an unknown name or parameter (with the valid ones), or a value out of range.
    """
    if capacity < 1:
        raise ConfigError(f"a tier of {capacity} blocks cannot hold anything; expected at least 1")
    name, _, query = spec.partition("?")
    if name not in POLICIES:
        raise ConfigError(f"unknown replacement policy {name!r:.60}; {_choices(name, POLICIES)}")
    make = POLICIES[name]
    valid = {
        parameter.name: parameter.default
        for parameter in inspect.signature(make).parameters.values()
        if parameter.name != "capacity"
    }
    valid["store_threshold"] = 1
    given = _parse(name, query, valid)
    threshold = given.pop("store_threshold", 1)
    policy = make(capacity, **given)
    return policy if threshold == 1 else ReuseGate(policy, threshold)


def check_policy(spec: str) -> str:
    """The spec itself, if `make_policy` would take it; raises ConfigError otherwise."""
    make_policy(spec, capacity=1)
    return spec


def _parse(policy: str, query: str, valid: dict[str, Any]) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
    except ValueError:
        raise ConfigError(
            f"parameters of policy {policy} are {query!r:.60}; expected name=value&name=value"
        ) from None
    given = {}
    for name, text in pairs:
        if name not in valid:
            raise ConfigError(
                f"policy {policy} has no parameter {name!r:.60}; {_choices(name, valid)}"
            )
        if name in given:
            raise ConfigError(f"parameter {name} of policy {policy} is given twice")
        given[name] = _number(policy, name, text, type(valid[name]))
    return given


def _number(policy: str, name: str, text: str, kind: type) -> int | float:
    """An int of at least 1, or a share between 0 and 1."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not (1 <= value <= 2**31 if kind is int else 0 < value < 1):
        expected = "a whole number from 1 on" if kind is int else "a share between 0 and 1"
        raise ConfigError(f"{name} of policy {policy} is {text!r:.60}; expected {expected}")
    return value


def _choices(name: str, valid: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, valid, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"expected one of {', '.join(valid)}{hint}"
