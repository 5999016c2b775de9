"""A tokenizer as llguidance sees it: the bytes of every token, and which tokens are no text.

Works for every tokenizer.json: byte-level alphabets, byte fallback, plain pieces.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class _Wrapped:
    """What llguidance asks of a tokenizer (its TokenizerWrapper protocol)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        known = min(vocab_size, tokenizer.vocab_size)
        ends = {*tokenizer.markup, *eos_token_ids}
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(known)]
        # Rows of the output layer that stand for no token: no bytes, so never allowed.
        self.tokens += [b""] * (vocab_size - known)
        self.special_token_ids = sorted(token_id for token_id in ends if token_id < known)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        for token_id in self.special_token_ids:
            self.tokens[token_id] = self.tokens[token_id] or b"<|%d|>" % token_id

    def __call__(self, text: Any) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def build_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]
) -> "LLTokenizer":
    """The token table of a model; 10 us a token.

    Args:
        vocab_size: columns of the logits.
        eos_token_ids: what ends an answer; at least one.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = _Wrapped(tokenizer, vocab_size, eos_token_ids)
    return LLTokenizer(TokenizerWrapper(wrapped), n_vocab=vocab_size, eos_token=list(eos_token_ids))
