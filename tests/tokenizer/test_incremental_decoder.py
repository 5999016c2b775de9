import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.tokenizer import IncrementalDecoder, Tokenizer
from tests.fake_engine import make_tokenizer

BYTE_LEVEL = make_tokenizer()


def sentencepiece_like() -> Tokenizer:
    """A vocabulary with blanks as U+2581 and a token for each byte, decoded as Llama 2's is."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "\u2581the",
        "\u2581a",
        "a",
        "b",
        "the",
        "\u2581\u2581",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(  # pyright: ignore
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece_like()
NUM_PIECES = 10


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in runs of these lengths, then the rest."""
    runs, at = [], 0
    for size in sizes:
        runs.append(ids[at : at + size])
        at += size
    return [*runs, ids[at:]]


def byte_ids(data: bytes) -> list[int]:
    """One token for each byte of the byte-level vocabulary."""
    by_bytes = {BYTE_LEVEL.token_bytes(i): i for i in range(BYTE_LEVEL.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in data]


ONE_BYTE = byte_ids(bytes(range(256)))


@given(text=st.text(), sizes=st.lists(st.integers(0, 4)), skip=st.booleans())
@settings(deadline=None, max_examples=300)
def test_any_text_in_any_runs_comes_out_whole(text: str, sizes: list[int], skip: bool):
    decoder = IncrementalDecoder(BYTE_LEVEL, skip_special_tokens=skip)
    ids = BYTE_LEVEL.encode(text)
    given_out = "".join(decoder.feed(run) for run in cut(ids, sizes))
    assert text.startswith(given_out)
    assert given_out + decoder.flush() == BYTE_LEVEL.decode(ids, skip)


@given(text=st.text(), sizes=st.lists(st.integers(0, 4)))
@settings(deadline=None, max_examples=300)
def test_text_of_single_bytes_never_shows_half_a_character(text: str, sizes: list[int]):
    decoder = IncrementalDecoder(BYTE_LEVEL)
    given_out = ""
    for run in cut([ONE_BYTE[byte] for byte in text.encode()], sizes):
        given_out += decoder.feed(run)
        assert text.startswith(given_out)
    assert given_out + decoder.flush() == text


@given(data=st.binary(max_size=120), sizes=st.lists(st.integers(0, 9)))
@settings(deadline=None, max_examples=500)
def test_bytes_that_are_no_text_decode_as_they_do_at_once(data: bytes, sizes: list[int]):
    decoder = IncrementalDecoder(BYTE_LEVEL)
    pieces = [decoder.feed(run) for run in cut([ONE_BYTE[byte] for byte in data], sizes)]
    assert "".join(pieces) + decoder.flush() == data.decode("utf-8", "replace")


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 50), max_size=80))
@settings(deadline=None, max_examples=300)
def test_any_token_ids_decode_as_they_do_at_once(ids: list[int]):
    decoder = IncrementalDecoder(BYTE_LEVEL)
    assert decoder.feed(ids) + decoder.flush() == BYTE_LEVEL.decode(ids)


words = st.lists(st.integers(3, NUM_PIECES - 1), max_size=6)
characters = st.text(max_size=4).map(
    lambda text: [NUM_PIECES + byte for byte in text.encode()],
)


@given(parts=st.lists(st.one_of(words, characters, st.just([2])), max_size=12))
@settings(deadline=None, max_examples=500)
def test_sentencepiece_blanks_and_byte_tokens_come_out_whole(parts: list[list[int]]):
    ids = [token_id for part in parts for token_id in part]
    decoder = IncrementalDecoder(SENTENCEPIECE)
    given_out = ""
    whole = SENTENCEPIECE.decode(ids)
    for token_id in ids:
        given_out += decoder.feed([token_id])
        assert whole.startswith(given_out)
    assert given_out + decoder.flush() == whole


def test_the_blank_before_the_first_word_is_kept_after_a_prompt():
    the, a = 4, 5
    alone = IncrementalDecoder(SENTENCEPIECE)
    after_prompt = IncrementalDecoder(SENTENCEPIECE, prompt_ids=[the])
    assert alone.feed([a]) == "a"
    assert after_prompt.feed([a]) == " a"


def test_half_a_character_at_the_end_of_the_prompt_is_not_repeated():
    decoder = IncrementalDecoder(BYTE_LEVEL, prompt_ids=byte_ids("é".encode()[:1]))
    assert decoder.feed(byte_ids(b"abc")) == "abc"


def test_flush_without_tokens_gives_nothing():
    decoder = IncrementalDecoder(BYTE_LEVEL, prompt_ids=BYTE_LEVEL.encode("prompt"))
    assert decoder.flush() == ""


@pytest.mark.parametrize("byte", [0x80, 0xF0])
def test_a_long_run_of_broken_bytes_costs_the_same_per_token(byte: int):
    decoder = IncrementalDecoder(BYTE_LEVEL)
    started_s = time.perf_counter()
    given_out = decoder.feed([ONE_BYTE[byte]] * 20_000)
    elapsed_s = time.perf_counter() - started_s
    assert len(given_out + decoder.flush()) == 20_000
    assert elapsed_s < 10  # quadratic work would take minutes


def test_a_checkpoint_without_tokenizer_decodes_to_nothing():
    decoder = IncrementalDecoder(Tokenizer(None), prompt_ids=[1, 2])
    assert decoder.feed([5, 6, 7]) + decoder.flush() == ""
