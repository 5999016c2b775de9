import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import jaxserve
from jaxserve.cli import main
from jaxserve.cli.app import as_command
from jaxserve.cli.commands import ENTRIES
from jaxserve.cli.flags import settings_of, with_model_argument, with_settings
from jaxserve.cli.plan import plan
from jaxserve.cli.serve import bind
from jaxserve.config import Config, ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings, all_settings
from tests.fake_engine import REPLY, FakeEngine

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("JAXSERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that commands build, which are fake."""
    built: list[FakeEngine] = []

    def build(config: Config, *args: Any) -> FakeEngine:
        built.append(FakeEngine(config=config, max_model_len=20_000))
        return built[-1]

    monkeypatch.setattr("jaxserve.engine.build_engine", build)
    return built


HEAVY = {"jax", "numpy", "fastapi", "pydantic", "uvicorn", "tokenizers", "yaml", "tqdm", "httpx"}
HEAVY |= {"rich", "aiohttp", "prompt_toolkit", "huggingface_hub", "matplotlib"}


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"]], ids=" ".join)
def test_help_is_quick_because_it_imports_nothing_heavy(argv: list[str]):
    code = (
        "import sys, jaxserve.cli\n"
        f"assert jaxserve.cli.main({argv}) == 0\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if argv[0] == "serve":
        for setting in all_settings().values():
            spelt = setting.flag.replace("--", "--[no-]") if setting.kind is bool else setting.flag
            assert spelt in run.stdout and setting.variable in run.stdout


def every_command() -> list[list[str]]:
    """The words that lead to each command and group."""
    found: list[list[str]] = [[]]
    for name, entry in ENTRIES.items():
        found.append([name])
        inner = getattr(entry.load(name), "entries", {})
        found += [[name, below] for below in inner]
    return found


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_the_help_of_every_command_has_its_options_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: jaxserve " + " ".join(words)) and "-h, --help" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_refuses_an_unknown_option_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str]
):
    assert main([*words, "--hlep"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ") and err.count("\n") == 1
    assert "did you mean --help" in err


def test_the_shell_completes_commands_options_and_choices():
    def completions(line: str) -> list[str]:
        words = line.split(" ")
        environ = {"_JAXSERVE_COMPLETE": "complete_bash", "COMP_WORDS": line}
        run = subprocess.run(
            [sys.executable, "-m", "jaxserve.cli"],
            env={**os.environ, **environ, "COMP_CWORD": str(len(words) - 1)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return run.stdout.split()

    assert completions("jaxserve ser") == ["serve"]
    assert completions("jaxserve serve --page-s") == ["--page-size"]
    assert completions("jaxserve serve --dtype b") == ["bfloat16"]


def settings_from(*argv: str) -> Settings:
    """What `serve` would get from a command line."""
    got: list[Settings] = []

    @with_model_argument
    @with_settings()
    def command(*, settings: Settings) -> int:
        got.append(settings)
        return 0

    as_command("command", command).main(list(argv), prog_name="x", standalone_mode=False)
    return got[0]


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == jaxserve.__version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs a command"),
        (["sreve"], "unknown command 'sreve'; did you mean serve?"),
        (["kv"], "jaxserve kv needs a command"),
        (["kv", "stta"], "did you mean stat?"),
        (["serve", "--page-size"], "requires an argument"),
        (["serve", "--warmup=3"], "does not take a value"),
        (["serve", "--pag-size", "3"], "did you mean --page-size"),
        (["serve", "--page-size", "many"], "--page-size is 'many'; expected an integer"),
        (["serve", "--dtype", "int3"], "expected one of auto, float32"),
        (["serve", "--page-size", "0"], "expected at least 1"),
        (["serve", "--host", "0.0.0.0"], "set an API key"),
        (["serve", "--port", "99999"], "cannot listen on"),
        (["serve", "a", "b"], "unexpected extra argument(s) (b)"),
        (["serve", "a", "--model", "b"], "given twice"),
        (["serve", "--config", "/nowhere.yaml"], "No such file"),
        (["generate", "a", "--prompts", "b"], "either a prompt or --prompts"),
        (["generate", "--prompts", "/nowhere"], "cannot read /nowhere: No such file"),
        (["generate", "--prompts", "/dev/null"], "holds no prompts"),
        (["generate", "a", "--raw", "--system", "b"], "leave out --raw"),
        (["generate", "a", "--temperature", "hot"], "valid number"),
        (["eval", "retreival"], "did you mean retrieval?"),
        (["eval", "retrieval", "--num", "0"], "expected 1 to"),
        (["eval", "retrieval", "m", "--url", "http://x"], "either a model or --url"),
        (["convert", "a"], "missing argument 'DST'"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ") and err.count("\n") == 1
    assert message in err


def test_a_checkpoint_that_is_not_there_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "new")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ") and err.count("\n") == 1 and "nothing" in err


def test_each_setting_has_a_flag_that_reaches_the_config(monkeypatch: pytest.MonkeyPatch):
    values: dict[str, Any] = {"host": "127.0.0.3", "dtype": "float32", "policy": "priority"}
    values |= {"attention_backend": "reference", "max_num_batched_tokens": 4096}
    values |= {"kv_offload": "eager", "kv_load": "load", "load_format": "dummy"}
    values |= {"log_level": "debug", "log_format": "json"}
    for setting in all_settings().values():
        default = {bool: not setting.default, int: 77, float: 7.5, str: "text"}[setting.kind]
        value = values.setdefault(setting.name, default)
        spelt = setting.flag if value is not False else setting.flag.replace("--", "--no-", 1)
        argv = [spelt] if setting.kind is bool else [spelt, str(value)]
        config = settings_from(*argv).config
        assert getattr(getattr(config, setting.section), setting.name) == value
        monkeypatch.setenv(setting.variable, str(value))
        config = settings_from().config
        assert getattr(getattr(config, setting.section), setting.name) == value
        monkeypatch.delenv(setting.variable)


def test_a_commands_own_default_gives_way_to_what_is_given(monkeypatch: pytest.MonkeyPatch):
    assert not settings_of({}, None, warmup=False).config.runtime.warmup
    monkeypatch.setenv("JAXSERVE_WARMUP", "on")
    assert settings_of({}, None, warmup=False).config.runtime.warmup


def test_the_plan_hides_the_key(monkeypatch: pytest.MonkeyPatch):
    settings = settings_from("some/model", "--api-key", "s3cret")
    text = "\n".join(plan(settings, "http://127.0.0.1:1"))
    assert "s3cret" not in text and "some/model" in text and "api_key = (hidden)" in text


def test_the_plan_says_what_will_be_loaded_and_how_much_the_tiers_hold(tmp_path: Path):
    store = f"file://{tmp_path}?max_bytes=1GiB"
    argv = ["--num-pages", "100", "--kv-host-bytes", "1MiB", "--kv-store", store]
    text = "\n".join(plan(settings_from(*argv), "http://127.0.0.1:1"))
    assert "the embedded model: LlamaForCausalLM, 2.1" in text and "stored as bfloat16" in text
    # 4 layers x 2 x 2 KV heads x 64 entries x 2 bytes = 2 KiB a token
    assert "100 pages of 16 tokens, 32 KiB each: 1,600 tokens" in text
    assert "KV host   1 MiB, some 512 tokens" in text and "at most 1GiB" in text
    text = "\n".join(plan(settings_from("org/model"), "http://127.0.0.1:1"))
    assert "org/model: to be fetched from the hub" in text
    text = "\n".join(plan(settings_from("--max-num-seqs", "2"), "http://127.0.0.1:1"))
    assert "at most 256 pages" in text and "2 contexts of 2,048 tokens" in text


def test_a_port_in_use_is_told_before_any_work():
    with bind(Config(server=ServerConfig(port=0))) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another with --port"):
            bind(Config(server=ServerConfig(port=port)))


def test_generate_streams_the_answer_by_the_chat_template(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
):
    argv = ["generate", "Hello", "--system", "Be kind.", "--temperature", "0.5", "--stop", "zz"]
    assert main(argv) == 0
    assert capsys.readouterr().out == REPLY + "\n"
    (request,) = engines[0].added
    assert request.sampling.temperature == 0.5 and request.sampling.stop == ("zz",)
    prompt = engines[0].tokenizer.decode(request.prompt_ids, False)
    assert prompt == "<|begin|><|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"
    assert engines[0].closed


def test_generate_raw_continues_the_prompt_and_bounds_are_checked(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "Hello", "--raw", "--max-tokens", "2"]) == 0
    (request,) = engines[0].added
    assert engines[0].tokenizer.decode(request.prompt_ids, False) == "Hello"
    assert main(["generate", "Hello", "--top-p", "7"]) == 1
    assert "top_p is 7.0" in capsys.readouterr().err


def test_eval_retrieval_prints_a_table_and_a_json_line(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", "retrieval", "--num", "8"]) == 0
    *table, last = capsys.readouterr().out.strip().split("\n")
    report = json.loads(last)
    assert report["num_prompts"] == 8 and report["accuracy"] == 0
    assert any("1-" in line or "tokens" in line for line in table) and "all" in table[-1]


SERVE = """
import sys
import jaxserve.engine
from jaxserve.cli import main
from tests.fake_engine import FakeEngine
jaxserve.engine.build_engine = lambda config, progress: FakeEngine(config=config)
sys.exit(main(["serve", "--port", "0", "--max-num-seqs", "3", "--no-engine-process"]))
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_answers_and_stops_cleanly(stop: signal.Signals):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        lines: list[str] = []
        while not lines or "-d '" not in lines[-1]:
            lines.append(server.stdout.readline())
            assert lines[-1], server.stderr.read()
        said = "".join(lines)
        (line,) = [line for line in lines if line.startswith("ready after")]
        url = line.split()[-1]
        request = urllib.request.Request(
            f"{url}/chat/completions",
            lines[-1].split("-d ")[1].strip().strip("'").replace("true", "false").encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            answer = json.loads(response.read())
        server.send_signal(stop)
        assert server.wait(20) == 0
        assert server.stdout.read().strip() == "stopped" and server.stderr.read() == ""
    assert answer["choices"][0]["message"]["content"] == REPLY
    assert "max_num_seqs = 3" in said and "1,024 + 64 pages of 16 tokens" in said
    assert "7 compiled in 1.5 s" in said and "1.23 M parameters" in said
