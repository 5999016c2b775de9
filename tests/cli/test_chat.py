import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxserve.cli import main, talk
from jaxserve.cli.chat_client import Piece, Usage
from jaxserve.cli.chat_screen import show_answer, split_blocks
from jaxserve.cli.conversation import Conversation
from jaxserve.config import Config
from jaxserve.errors import ConfigError, JaxserveError
from tests.fake_engine import REPLY, FakeEngine
from tests.live_server import live_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=2000)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with live_server(engine) as base:
        yield base


def test_parameters_are_set_shown_and_given_back():
    talk = Conversation()
    assert talk.set("temperature=0.5") == "temperature = 0.5"
    talk.set("max-tokens = 7")
    talk.set("ignore_eos=on")
    assert talk.sampling == {"temperature": 0.5, "max_tokens": 7, "ignore_eos": True}
    assert talk.set("temperature") == "temperature = 0.5"
    talk.set("temperature=")
    assert "temperature" not in talk.sampling
    for text, message in [
        ("temprature=1", "did you mean temperature?"),
        ("top_k=x", "expected an integer"),
        ("ignore_eos=maybe", "expected true or false"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            talk.set(text)


def test_a_saved_conversation_is_loaded_as_it_was(tmp_path: Path):
    talk = Conversation("Be kind.")
    talk.add("user", "Grüße 😀")
    talk.add("assistant", "Hello")
    talk.set("top_k=5")
    path = str(tmp_path / "c.json")
    talk.save(path)
    other = Conversation()
    other.load(path)
    assert other == talk and other.messages[0] == {"role": "system", "content": "Be kind."}
    assert other.take_back() == "Grüße 😀" and other.turns == []
    for content in ("{", "[1]", '{"messages": [{"role": "x", "content": ""}]}', "3"):
        Path(path).write_text(content)
        with pytest.raises(ConfigError):
            other.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        other.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n"),
        ("- a\n\n- b\n\n  c", ""),
        ("1. a\n\n2. b\n\nend", "1. a\n\n2. b\n"),
        ("```py\na\n\nb", ""),
        ("```py\na\n\nb\n```\n\nend", "```py\na\n\nb\n```\n"),
    ],
)
def test_only_markdown_that_cannot_change_any_more_is_done(text: str, done: str):
    blocks, rest = split_blocks(text)
    assert "".join(blocks) == done
    assert "\n".join([*blocks, rest]) == text


def show(pieces: list[Piece]) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    show_answer(console, iter(pieces), markdown=True)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_markdown_is_rendered_once_when_a_block_is_complete():
    text = "# Title\n\nSome *words* here.\n\n- one\n- two\n\n```python\nprint(1)\n```\n\nThe end."
    shown = show([Piece(char) for char in text])
    assert "*words*" not in shown.rsplit("The end", 1)[0][-400:] and "```" not in shown[-200:]
    assert "•" in shown and "print(1)" in shown and shown.rstrip().endswith("The end.")


def test_thoughts_are_shown_before_the_answer():
    shown = show([Piece(reasoning="Let me see. "), Piece(reasoning="Yes."), Piece("42")])
    assert shown.index("Let me see. Yes.") < shown.rindex("42")


def test_ctrl_c_stops_the_answer_and_keeps_what_came():
    def pieces() -> Iterator[Piece]:
        yield Piece("half ")
        raise KeyboardInterrupt

    console = Console(file=io.StringIO())
    shown = show_answer(console, pieces(), markdown=False)
    assert shown.was_stopped and shown.text == "half " and "stopped" in shown.figures()
    shown.usage = Usage(10, 3, 8, {"device": 5, "host": 3})
    assert "8 of 10 prompt tokens cached (host)" in shown.figures()


def test_one_question_is_answered_without_a_terminal(
    url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
):
    argv = ["chat", "--url", url, "-q", "Hello", "--system", "Be kind.", "--temperature", "0.5"]
    assert main([*argv, "--stop", "zz"]) == 0
    assert capsys.readouterr().out == REPLY + "\n"
    (request,) = engine.added
    prompt = engine.tokenizer.decode(request.prompt_ids, False)
    assert prompt == "<|begin|><|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"
    assert request.sampling.temperature == 0.5 and request.sampling.stop == ("zz",)
    assert main(["complete", "--url", f"{url}/v1", "-q", "Hello", "--max-tokens", "2"]) == 0
    assert engine.tokenizer.decode(engine.added[1].prompt_ids, False) == "Hello"


def test_standard_input_is_a_question(url: str, engine: FakeEngine):
    command = [sys.executable, "-m", "jaxserve.cli", "chat", "--url", url]
    run = subprocess.run(command, input="Hello\nyou\n", cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == REPLY + "\n"
    assert "Hello\nyou" in engine.tokenizer.decode(engine.added[0].prompt_ids, False)
    run = subprocess.run(command, input="", cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "standard input is empty" in run.stderr


def test_an_engine_of_its_own_answers_where_there_is_no_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    built: list[FakeEngine] = []

    def build(config: Config, *args: Any) -> FakeEngine:
        built.append(FakeEngine(config=config))
        return built[-1]

    monkeypatch.setattr("jaxserve.engine.build_engine", build)
    assert main(["chat", "-q", "Hello"]) == 0
    assert capsys.readouterr().out == REPLY + "\n"
    assert built[0].closed and built[0].config.scheduler.max_num_seqs == 1


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--url", "http://127.0.0.1:1"], 1, "no answer from http://127.0.0.1:1/v1"),
        (["--url", "nonsense"], 2, "is not a URL"),
        (["--url", "{url}", "--model", "other"], 1, "no model 'other'; it has fake"),
        (["--url", "{url}", "--top-p", "7"], 1, "top_p is 7"),
        (["--url", "{url}", "--load", "/nowhere"], 2, "cannot read /nowhere"),
        (["--temperature", "hot"], 2, "valid number"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    url: str, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, message: str
):
    given = [word.replace("{url}", url) for word in argv]
    assert main(["chat", "-q", "x", *given]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


class Terminal:
    """The command on a terminal of 80 columns; `read_until` returns what it has printed."""

    def __init__(self, *argv: str, home: Path):
        pid, self._fd = pty.fork()
        if pid == 0:
            environ = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm", "XDG_CACHE_HOME": str(home)}
            os.chdir(ROOT)
            os.execve(
                sys.executable,
                [sys.executable, "-m", "jaxserve.cli", *argv],
                {**os.environ, **environ},
            )
        self._pid, self._text = pid, ""

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, pattern: str, timeout_s: float = 30) -> str:
        deadline_s = time.monotonic() + timeout_s
        while not re.search(pattern, self._text):
            assert time.monotonic() < deadline_s, f"no {pattern} in {self._text[-1500:]}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
                if "\x1b[6n" in data:
                    os.write(self._fd, b"\x1b[1;1R")  # where the cursor is
                self._text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)
        text, self._text = self._text, ""
        return text

    def end(self) -> int:
        """Press Ctrl-D until it has ended: before its prompt is there, a terminal drops the key."""
        deadline_s = time.monotonic() + 30
        pressed_s = 0.0
        while time.monotonic() < deadline_s:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if not pid and time.monotonic() > pressed_s + 0.5:
                with contextlib.suppress(OSError):  # it ends just now
                    self.send("\x04")
                pressed_s = time.monotonic()
            if pid:
                os.close(self._fd)
                return os.waitstatus_to_exitcode(status)
            if select.select([self._fd], [], [], 0.02)[0]:
                try:
                    os.read(self._fd, 65536)
                except OSError:
                    pass
        os.kill(self._pid, signal.SIGKILL)
        raise AssertionError("it did not end")


def test_a_question_and_its_answer_stay_if_another_answer_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
):
    lines = ["What is it?", "/regenerate", "/undo"]

    class Session:
        def prompt(self) -> str:
            if not lines:
                raise EOFError
            return lines.pop(0)

    class Client:
        model, max_model_len, num_asked = "fake", 100, 0

        def chat(self, messages: Any, sampling: Any) -> Iterator[Piece]:
            self.num_asked += 1
            if self.num_asked > 1:
                raise JaxserveError("the server is full")
            yield Piece(text="A thing.")

    monkeypatch.setattr(talk, "_prompt_session", lambda completer, toolbar: Session())
    screen = io.StringIO()
    client: Any = Client()
    talk.Talk(client, Conversation(), markdown=False, console=Console(file=screen)).run()
    assert "the server is full" in screen.getvalue()
    assert "taken back: What is it?" in screen.getvalue()


def test_a_talk_on_a_terminal(tmp_path: Path):
    engine = FakeEngine(max_model_len=4000)
    engine.reply = lambda request: (
        engine.tokenizer.encode("Hello world. ")
        * (300 if "long" in engine.tokenizer.decode(request.prompt_ids) else 2)
    )
    with live_server(engine) as url:
        screen = Terminal("chat", "--url", url, home=tmp_path)
        screen.read_until("chat with fake")
        screen.send("Tell me\r")
        assert "Hello world. Hello world." in screen.read_until("tokens, first after")
        screen.send("/set top_k=5\r")
        screen.read_until("top_k = 5")
        screen.send("/hlep\r")
        screen.read_until("did you mean /help")
        engine.step_s = 0.01
        screen.send("a long one\r")
        screen.read_until("Hello world")
        screen.send("\x03")
        screen.read_until("stopped, ")
        wait_for(lambda: not engine.live_ids)
        engine.step_s = 0.0
        screen.read_until(">")
        screen.send("first\x1b\rsecond\r")
        screen.read_until("tokens, first after")
        prompt = engine.tokenizer.decode(engine.added[-1].prompt_ids, False)
        assert "first\nsecond" in prompt and prompt.count("<|user|>") == 3
        assert engine.added[-1].sampling.top_k == 5
        path = tmp_path / "saved.json"
        screen.send(f"/save {path}\r")
        screen.read_until("saved 6 messages")
        assert len(json.loads(path.read_text())["messages"]) == 6
        screen.send("/regenerate\r")
        screen.read_until("tokens, first after")
        screen.send("/stats\r")
        screen.read_until("4 answers|5 answers")
        assert screen.end() == 0
    history = tmp_path / "jaxserve" / "chat_history"
    assert "Tell me" in history.read_text() and history.stat().st_mode & 0o077 == 0


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not true, in {threading.current_thread().name}"
        time.sleep(0.01)
