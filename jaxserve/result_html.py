"""Results as a notebook shows them: tokens coloured by how likely they were, prompts by source.

Everything that comes from a model or a user is escaped. Colours work on light and dark pages: they
are translucent, and the text keeps the page's own colour. Values in, HTML out; knows nothing else.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SOURCE_COLORS = {"device": "#e0653a", "host": "#e3a83b", "computed": "#9a9a8f"}
STORE_COLORS = ("#3d9d90", "#4f82c0", "#8573c4")
"""From hot to cold, as on the web page: stores in their order, the last color for all the rest."""

UNLIKELY = -6.0
"""A log-probability at which a token has the strongest colour."""

MAX_CHARS = 20_000
FRAME = "border-left:3px solid #9a9a8f55;padding:2px 0 6px 12px;margin:8px 0;line-height:1.6"
SMALL = "font-size:12px;opacity:.75"


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token's text, its log-probability, and the likeliest alternatives with theirs."""

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer; `tokens` is None if no log-probabilities were asked for."""

    text: str
    tokens: Sequence[ShownToken] | None
    num_tokens: int
    finish_reason: str | None


def result_html(
    prompt: str | None,
    num_prompt_tokens: int,
    cached_by_source: Mapping[str, int],
    answers: Sequence[ShownAnswer],
) -> str:
    """One prompt with its answers.

    Args:
        cached_by_source: prompt tokens that were not computed, by tier.
    """
    parts = []
    if prompt is not None:
        parts.append(f'<div style="white-space:pre-wrap;opacity:.75">{_text(prompt)}</div>')
    parts.append(_bar(num_prompt_tokens, cached_by_source))
    for index, answer in enumerate(answers):
        number = f"answer {index + 1} of {len(answers)}: " if len(answers) > 1 else ""
        facts = f"{number}{answer.num_tokens} tokens, ended by {answer.finish_reason}"
        body = _text(answer.text) if answer.tokens is None else _tokens(answer.tokens)
        parts.append(f'<div style="white-space:pre-wrap;margin-top:6px">{body}</div>')
        parts.append(f'<div style="{SMALL}">{html.escape(facts)}{_mean(answer)}</div>')
    return f'<div style="{FRAME}">{"".join(parts)}</div>'


def color_of(source: str, stores: Sequence[str]) -> str:
    """The colour of a tier; `stores` are the names of all that are neither device nor host."""
    if source in SOURCE_COLORS:
        return SOURCE_COLORS[source]
    return STORE_COLORS[min(stores.index(source), len(STORE_COLORS) - 1)]


def _bar(num_tokens: int, cached: Mapping[str, int]) -> str:
    counts = {name: count for name, count in cached.items() if count > 0}
    stores = [name for name in counts if name not in SOURCE_COLORS]
    counts["computed"] = max(0, num_tokens - sum(counts.values()))
    pieces, words = [], []
    for name, count in counts.items():
        if count:
            color = color_of(name, stores)
            pieces.append(f'<span style="flex:{count};background:{color}"></span>')
            told = f"{count:,} computed" if name == "computed" else f"{count:,} from {name}"
            words.append(
                f'<span style="white-space:nowrap"><span style="color:{color}">&#9632;</span> '
                f"{html.escape(told)}</span>"
            )
    return (
        '<div style="display:flex;gap:2px;height:6px;max-width:480px;margin:6px 0 2px;'
        f'border-radius:3px;overflow:hidden">{"".join(pieces)}</div>'
        f'<div style="{SMALL}">{num_tokens:,} prompt tokens: {", ".join(words)}</div>'
    )


def _tokens(tokens: Sequence[ShownToken]) -> str:
    shown, left = [], MAX_CHARS
    for token in tokens:
        if left <= 0:
            shown.append("&hellip;")
            break
        left -= len(token.text)
        doubt = min(1.0, max(0.0, token.logprob / UNLIKELY))
        others = [f"{text!r} {_percent(logprob)}" for text, logprob in token.others]
        hint = ", ".join([f"{token.text!r} {_percent(token.logprob)}", *others])
        style = f"background:rgba(224,101,58,{0.75 * doubt:.2f});border-radius:3px"
        shown.append(
            f'<span style="{style}" title="{html.escape(hint)}">{html.escape(token.text)}</span>'
        )
    return "".join(shown)


def _mean(answer: ShownAnswer) -> str:
    if not answer.tokens:
        return ""
    mean = sum(token.logprob for token in answer.tokens) / len(answer.tokens)
    return f"; perplexity {math.exp(-mean):.3g}; the deeper the colour, the less likely the token"


def _percent(logprob: float) -> str:
    return f"{100 * math.exp(logprob):.3g}%"


def _text(text: str) -> str:
    cut = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + "..."
    return html.escape(cut)
