"""Structured output: what an answer must look like, as masks over the tokens that may come next.

`grammar` turns what a request asks for into the text of a grammar, `compiler` compiles it beside
the event loop and the engine, within limits, and a `Constraint` follows one answer token by token.
Enforcement is the runner's. Knows nothing of jax, HTTP or chat formats.
"""

from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import Constraint, fill_masks
from jaxserve.structured.grammar import Body, body_of, complete, grammar_of

__all__ = [
    "Body",
    "Constraint",
    "GrammarCompiler",
    "body_of",
    "complete",
    "fill_masks",
    "grammar_of",
]
