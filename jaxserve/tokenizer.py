"""Text to token ids and back: a checkpoint's tokenizer, its chat template, incremental decoding.

Knows nothing of models, requests or stop conditions. A checkpoint without a tokenizer still gives
a Tokenizer: it serves token ids and says so when it is asked for text.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.chat_template import DEFAULT, ChatTemplate, Message
from jaxserve.errors import RequestError, WeightsError

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
TAG = re.compile(r"</?[^<>\s]{2,}>|\[/?[A-Z_]{3,}\]")


class Tokenizer:
    """One checkpoint's tokenizer.

    Args:
        backend: a `tokenizers.Tokenizer`, or None when the checkpoint has none.
        special_tokens: bos_token, eos_token, ... as chat templates name them.
        chat_templates: template text by name.
        generation_config: what the checkpoint says about sampling.
    """

    def __init__(
        self,
        backend: Any,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ):
        self._backend = backend
        self._template = ChatTemplate(chat_templates or {}, special_tokens or {})
        self._special_tokens = dict(special_tokens or {})
        self._is_byte_level = False
        self._added_tokens: dict[int, str] = {}
        self.markup: dict[int, str] = {}
        """Added tokens that are no text: special ones, and those that look like tags."""
        self.special_texts: tuple[str, ...] = ()
        """What special tokens look like; decoding leaves them out."""
        self.generation_config = dict(generation_config or {})
        self.vocab_size = 0
        """One more than the largest token id; 0 when there is no tokenizer."""
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            self._is_byte_level = "ByteLevel(" in repr(backend.decoder)
            added = backend.get_added_tokens_decoder()
            self._added_tokens = {token_id: token.content for token_id, token in added.items()}
            self.markup = {
                token_id: token.content
                for token_id, token in added.items()
                if token.special or TAG.fullmatch(token.content)
            }
            self.special_texts = tuple(token.content for token in added.values() if token.special)
            self.vocab_size = max(
                backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Load a tokenizer from a checkpoint folder in the Hugging Face layout.

        Raises:
            WeightsError: a file that cannot be read, by name.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special_map = _read_json(folder / "special_tokens_map.json")
        return cls(
            _load_backend(folder / "tokenizer.json"),
            special_tokens=_special_tokens(special_map) | _special_tokens(config),
            chat_templates=_chat_templates(folder, config),
            generation_config=_read_json(folder / "generation_config.json"),
        )

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token that the tokenizer names, if it names one."""
        token = self._special_tokens.get("eos_token")
        return None if token is None or not self.has_text else self._backend.token_to_id(token)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens beside the vocabulary of text, such as the markers of turns."""
        return frozenset(self._added_tokens)

    @property
    def has_text(self) -> bool:
        return self._backend is not None

    @property
    def chat_template_sources(self) -> tuple[str, ...]:
        """The texts of the checkpoint's chat templates."""
        return self._template.sources

    @property
    def has_chat_template(self) -> bool:
        return self.has_text and bool(self._template.names)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, after the begin-of-sequence token if the checkpoint wants one."""
        if not isinstance(text, str):
            raise RequestError(f"expected a text, not {type(text).__name__}", param="prompt")
        if self._backend is None:
            raise RequestError(
                "the checkpoint has no tokenizer.json; send token ids", param="prompt"
            )
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # lone surrogates, unknown symbols without a fallback, ...
            raise RequestError(
                f"the text cannot be tokenised: {str(error)[:200]}", param="prompt"
            ) from error

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not know give no text."""
        if self._backend is None:
            return ""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters."""
        token = None if self._backend is None else self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_tokens:
            return token.encode()
        if self._is_byte_level:
            if all(char in BYTE_OF_CHAR for char in token):
                return bytes(BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as the checkpoint names them."""
        return dict(self._special_tokens)

    @property
    def chat_template(self) -> str | None:
        """The text of the usual template, if there is one."""
        return self._template.source(DEFAULT)

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls these tokens; "" for ids that it does not have."""
        if self._backend is None:
            return [""] * len(token_ids)
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def token_text(self, token_id: int) -> str:
        """One token as text; parts of characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation, by the checkpoint's chat template.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestError(
                "the checkpoint has no chat template; send a plain prompt instead "
                "(/v1/completions, LLM.generate, or generate --raw)",
                param="messages",
                code="no_chat_template",
            )
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **kwargs
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation; the template itself writes the special tokens."""
        text = self.render_chat(messages, add_generation_prompt, **kwargs)
        return self.encode(text, add_special_tokens=False)


class IncrementalDecoder:
    """Text of a growing row of token ids, piece by piece.

    The pieces, `flush` included, join to what `decode` gives for the whole row. A piece never ends
    inside a character: what may still change is held back.

        ids     [0, prefix)        text given out, no longer needed
                [prefix, read)     text given out; context for decoders that treat a row's head
                                   differently
                [read, end)        held back, or new

    Args:
        prompt_ids: what precedes the row; its tail is context, so that a leading blank is kept.
    """

    CONTEXT_TOKENS = 6
    HOLD_TOKENS = 4  # a character has at most four bytes, so at most four tokens
    WINDOW_TOKENS = 32

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        context_ids = list(prompt_ids[-self.CONTEXT_TOKENS :])
        if self._decode(context_ids).endswith(REPLACEMENT):
            context_ids = []  # it may be half a character, which the row must not repeat
        self._set_window(context_ids)

    def feed(self, token_ids: Iterable[int]) -> str:
        """Append tokens; return the text that is now certain."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The rest of the text, when no token follows; a broken character becomes U+FFFD."""
        if self._read == len(self._ids):
            return ""
        piece = self._decode(self._ids)[self._num_given :]
        self._set_window(self._ids)
        return piece

    def _feed_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith(REPLACEMENT):
            piece = text[self._num_given :]
            self._slide_window(text)
            return piece
        if len(self._ids) - self._read <= self.HOLD_TOKENS:
            return ""
        # Bytes that are no text: all but the last mark are final, and the window stays bounded.
        piece = text[self._num_given : -1]
        self._num_given += len(piece)
        if len(self._ids) > self.WINDOW_TOKENS:
            piece += self._shorten_window(text)
        return piece

    def _slide_window(self, text: str) -> None:
        """All text of the window has been given out: keep the newest tokens that have text."""
        newest = self._ids[self._read :]
        newest_text = self._decode(newest)
        if newest_text or len(self._ids) > self.WINDOW_TOKENS:
            self._ids, text = newest, newest_text
        self._read = len(self._ids)
        self._num_given = len(text)

    def _shorten_window(self, text: str) -> str:
        """Drop old tokens at a cut that does not change the text; returns text this forces out."""
        for cut in range(len(self._ids) - self.HOLD_TOKENS, 0, -1):
            left, right = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            if left + right == text and len(left) <= self._num_given:
                self._ids = self._ids[cut:]
                self._num_given -= len(left)
                self._read = 0
                return ""
        piece = text[self._num_given :]
        self._set_window(self._ids[-self.CONTEXT_TOKENS :])
        return piece

    def _set_window(self, token_ids: list[int]) -> None:
        """Make these ids, whose text has been given out, the whole window."""
        self._ids = token_ids
        self._read = len(token_ids)
        self._num_given = len(self._decode(token_ids))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def _load_backend(path: Path) -> Any:
    if not path.exists():
        return None
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{path} is not a tokenizer file: {str(error)[:200]}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `*_token` entry, given as text or as an object with a `content`."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of tokenizer_config.json (a text, or a list of named ones), then of own files."""
    given = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates[DEFAULT] = given
    elif isinstance(given, list):
        try:
            templates = {str(entry["name"]): str(entry["template"]) for entry in given}
        except (KeyError, TypeError) as error:
            raise WeightsError(
                f"{folder / 'tokenizer_config.json'}: field 'chat_template' is a list; expected "
                "objects with a name and a template"
            ) from error
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        templates[DEFAULT] = own_file.read_text(encoding="utf-8")
    return templates
