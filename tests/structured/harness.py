"""Small engines and tokenizers for tests of structured output."""

from typing import Any

import tokenizers
from tokenizers import decoders, models

from jaxserve import LLM
from jaxserve.structured import GrammarCompiler
from jaxserve.tokenizer import Tokenizer
from tests.fake_engine import EOS_ID, make_tokenizer

SETTINGS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 512}


def small_llm(**settings: Any) -> LLM:
    """The embedded model with few compiled shapes."""
    return LLM(progress=False, **(SETTINGS | settings))


def compiler(tokenizer: Tokenizer | None = None) -> GrammarCompiler:
    tokenizer = tokenizer or make_tokenizer()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 7, [EOS_ID])


def byte_fallback_tokenizer() -> Tokenizer:
    """Like SentencePiece's: blanks as U+2581, bytes as <0x..>."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "\u2581{",
        "{",
        "}",
        '"',
        ":",
        "a",
        "1",
        "\u2581the",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})
