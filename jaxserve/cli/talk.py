"""The loop of a talk on the terminal: reads lines, obeys commands, shows answers."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxserve.cli.chat_client import ChatClient
from jaxserve.cli.chat_screen import Shown, new_console, show_answer
from jaxserve.cli.conversation import Command, Conversation, find_command, help_text
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.folders import user_cache_folder

BLOCK = '"""'
KEYS = (
    "  Enter sends; Alt+Enter, or a backslash at the end, begins a new line; a line of\n"
    f"  {BLOCK} begins and ends a text of several lines. Ctrl-C stops an answer, Ctrl-D ends."
)


class Talk:
    """One talk.

    Args:
        is_raw: continue texts instead of answering messages.
    """

    def __init__(
        self,
        client: ChatClient,
        conversation: Conversation,
        *,
        markdown: bool,
        is_raw: bool = False,
        console: Console | None = None,
    ):
        self.conversation = conversation
        self._client = client
        self._markdown = markdown
        self._is_raw = is_raw
        self._console = console or new_console()
        self._answers: list[Shown] = []
        self._last_prompt: str | None = None
        self._is_over = False
        self._commands = self._make_commands()

    def run(self) -> int:
        """Talk until Ctrl-D or /exit."""
        from prompt_toolkit.completion import WordCompleter

        what = "continue texts with" if self._is_raw else "chat with"
        self._say(f"{what} {self._client.model}; /help for help, Ctrl-D ends")
        completer = WordCompleter([*self._commands], sentence=True)
        session = _prompt_session(completer, self._toolbar)
        while not self._is_over:
            try:
                line = _read_message(session)
            except KeyboardInterrupt:
                continue
            except EOFError:
                break
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    command, rest = find_command(self._commands, line.strip())
                    command.act(rest)
                else:
                    self.ask(line)
            except JaxserveError as error:
                self._console.print(Text(str(error), style="red"))
        return 0

    def ask(self, text: str) -> None:
        """Show the answer to a message, and remember both.

        Raises:
            JaxserveError: there is no answer; the message is forgotten.
        """
        sampling = self.conversation.sampling
        if self._is_raw:
            self._last_prompt = text
            pieces = self._client.complete(text, sampling)
        else:
            self.conversation.add("user", text)
            pieces = self._client.chat(self.conversation.messages, sampling)
        try:
            shown = show_answer(self._console, pieces, markdown=self._markdown)
        except JaxserveError:
            if not self._is_raw:
                self.conversation.take_back()
            raise
        if not self._is_raw:
            self.conversation.add("assistant", shown.text)
        self._answers.append(shown)
        if self._console.is_terminal:
            self._say(shown.figures())

    def _make_commands(self) -> dict[str, Command]:
        common = {
            "/help": Command("/help", "this list", self._help),
            "/set": Command(
                "/set NAME=VALUE", "a sampling parameter, such as temperature=0.7", self._set
            ),
            "/stats": Command("/stats", "figures of this talk", self._stats),
            "/regenerate": Command("/regenerate", "another answer to the same", self._regenerate),
            "/exit": Command("/exit", "end, as Ctrl-D does", self._exit),
        }
        if self._is_raw:
            return common
        return {
            "/help": common.pop("/help"),
            "/clear": Command("/clear", "forget the conversation", self._clear),
            "/system": Command(
                "/system TEXT", "set the system message; none: show it", self._system
            ),
            "/undo": Command("/undo", "take back the last question and answer", self._undo),
            "/save": Command("/save FILE", "write the conversation as JSON", self._save),
            "/load": Command("/load FILE", "go on with a saved conversation", self._load),
            **common,
        }

    def _help(self, rest: str) -> None:
        self._say(help_text(self._commands) + "\n" + KEYS)

    def _clear(self, rest: str) -> None:
        self.conversation.turns.clear()
        self._say("the conversation is empty; the system message and /set values are kept")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
        self._say(f"system message: {self.conversation.system or 'none'}")

    def _undo(self, rest: str) -> None:
        self._say(f"taken back: {self.conversation.take_back()[:60]}")

    def _set(self, rest: str) -> None:
        if rest:
            self._say(self.conversation.set(rest))
            return
        given = ", ".join(f"{n} = {v}" for n, v in self.conversation.sampling.items())
        self._say(given or "everything is as the model recommends")

    def _save(self, rest: str) -> None:
        self.conversation.save(_needed("/save", rest))
        self._say(f"saved {len(self.conversation.messages)} messages to {rest}")

    def _load(self, rest: str) -> None:
        self.conversation.load(_needed("/load", rest))
        self._say(f"loaded {len(self.conversation.messages)} messages from {rest}")

    def _stats(self, rest: str) -> None:
        if not self._answers:
            self._say("no answers yet")
            return
        num_tokens = sum(one.usage.completion_tokens for one in self._answers)
        prompt = sum(one.usage.prompt_tokens for one in self._answers)
        cached = sum(one.usage.cached_tokens for one in self._answers)
        context = self._client.max_model_len
        used = self._answers[-1].usage
        lines = [f"{len(self._answers)} answers, {num_tokens:,} tokens"]
        lines.append(f"{cached:,} of {prompt:,} prompt tokens came from the cache")
        if context:
            now = used.prompt_tokens + used.completion_tokens
            lines.append(f"{now:,} of {context:,} tokens of the context are used")
        lines.append(f"the last answer: {self._answers[-1].figures()}")
        self._say("\n".join(f"  {line}" for line in lines))

    def _regenerate(self, rest: str) -> None:
        if not self._is_raw:
            before = list(self.conversation.turns)
            try:
                self.ask(self.conversation.take_back())
            except JaxserveError:
                self.conversation.turns = before  # no other answer: the one that there was stays
                raise
        elif self._last_prompt is not None:
            self.ask(self._last_prompt)
        else:
            raise ConfigError("nothing was asked yet")

    def _exit(self, rest: str) -> None:
        self._is_over = True

    def _toolbar(self) -> str:
        given = "  ".join(f"{n}={v}" for n, v in self.conversation.sampling.items())
        return f"{self._client.model}  {given}".strip()

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))


def read_question() -> str | None:
    """All of standard input, if it is no terminal; else None.

    Raises:
        ConfigError: it is empty, or no text.
    """
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError("standard input is empty; expected a question, or a terminal")
    return text.rstrip("\n")


def _read_message(session: Any) -> str:
    """A line, or several: those that end in a backslash, or stand between lines of three quotes."""
    text = session.prompt()
    if text.strip().startswith(BLOCK):
        return _read_block(session, text.strip().removeprefix(BLOCK))
    while text.endswith("\\"):
        text = text[:-1] + "\n" + session.prompt(message="... ")
    return text


def _read_block(session: Any, first: str) -> str:
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(BLOCK)):
        lines.append(session.prompt(message="... "))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


def _prompt_session(completer: Any, toolbar: Any) -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = _history_path()
    return PromptSession(
        message="> ",
        history=InMemoryHistory() if path is None else FileHistory(path),
        multiline=True,
        key_bindings=keys,
        completer=completer,
        complete_while_typing=False,
        prompt_continuation="  ",
        bottom_toolbar=toolbar,
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
    )


def _history_path() -> str | None:
    """Where lines are remembered, readable by this user only; None if nowhere."""
    folder = user_cache_folder()
    if folder is None:
        return None
    path = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
    except OSError:
        return None
    return str(path)


def _needed(command: str, rest: str) -> str:
    if not rest:
        raise ConfigError(f"{command} needs a file name")
    return rest
