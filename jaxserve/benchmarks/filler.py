"""Prompts of a wanted length that mean nothing: random token ids, or random words.

With the model's tokenizer, lengths are exact. Without it, words are used, and one request to the
server tells how many tokens a word has (`calibrated`); lengths are then right on average. Equal
random generators give equal pieces. Knows nothing of workloads or HTTP.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.embedded import EMBEDDED_MODEL_NAME, checkpoint_path
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.tokenizer import Tokenizer

CALIBRATION_WORDS = 200
ONSETS = "b d f g k l m n p r s t v w br cl dr fl gr pl st tr".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = "n r l s t m d nd st rk".split()


@dataclass(frozen=True)
class Filler:
    """Makes pieces of prompts.

    Attributes:
        tokens_per_word: used where there is no tokenizer.
    """

    tokenizer: Tokenizer | None = None
    ordinary_ids: tuple[int, ...] = ()
    tokens_per_word: float = 1.5

    def ids(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Token ids, none of them special; only with a tokenizer."""
        return rng.choices(self.ordinary_ids, k=num_tokens)

    def text(self, num_tokens: int, rng: random.Random) -> str:
        """Words, each with a blank before it, that make so many tokens in all."""
        if num_tokens <= 0:
            return ""
        if self.tokenizer is None:
            return _words(max(1, round(num_tokens / self.tokens_per_word)), rng)
        words = _words(num_tokens, rng)
        tokens = self.tokenizer.encode(words, add_special_tokens=False)
        while len(tokens) < num_tokens:
            words += _words(num_tokens, rng)
            tokens = self.tokenizer.encode(words, add_special_tokens=False)
        cut = self.tokenizer.decode(tokens[:num_tokens]).rpartition(" ")[0]
        return cut or words.split(" ")[1]

    def count(self, text: str) -> int:
        """Tokens of a text, exact with a tokenizer."""
        if self.tokenizer is None:
            return max(1, round(len(text.split()) * self.tokens_per_word))
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def has_ids(self) -> bool:
        return bool(self.ordinary_ids)


def with_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Filler:
    """Exact lengths; ids are drawn from tokens that are text."""
    special = set(tokenizer.special_ids)
    ids = tuple(i for i in range(min(vocab_size, tokenizer.vocab_size)) if i not in special)
    if not ids:
        raise ConfigError("the tokenizer has only special tokens; expected some that are text")
    return Filler(tokenizer, ids)


def calibrated(num_prompt_tokens: int, num_empty_tokens: int) -> Filler:
    """Filler from what the server counted for CALIBRATION_WORDS words, and for one."""
    per_word = max(num_prompt_tokens - num_empty_tokens, 1) / (CALIBRATION_WORDS - 1)
    return Filler(tokens_per_word=per_word)


def calibration_text(num_words: int = CALIBRATION_WORDS) -> str:
    return _words(num_words, random.Random(0))


def find_tokenizer(name: str | None, served: str) -> Filler | None:
    """The filler of a tokenizer on this machine; never fetches one.

    Args:
        name: a folder, or a hub name whose files are in the cache; None: the served model's.

    Raises:
        ConfigError: a name was given and there is no such tokenizer here.
    """
    folder = _folder_of(name or served)
    if folder is None:
        if name is None:
            return None
        raise ConfigError(
            f"--tokenizer {name}: neither a folder nor in the hub's cache here; fetch it with "
            "`jaxserve pull`, or leave it out"
        )
    try:
        return with_tokenizer(Tokenizer.from_folder(folder), _vocab_size(folder))
    except (JaxserveError, ValueError) as error:
        if name is None:
            return None
        raise ConfigError(f"--tokenizer {name}: {error}") from error


def _folder_of(name: str) -> Path | None:
    if name == EMBEDDED_MODEL_NAME:
        return checkpoint_path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def _vocab_size(folder: Path) -> int:
    """Of the model, which may have fewer or more rows than the tokenizer has tokens."""
    try:
        config: Any = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return 1 << 31
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else 1 << 31


def _words(num_words: int, rng: random.Random) -> str:
    return "".join(f" {_word(rng)}" for _ in range(num_words))


def _word(rng: random.Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
