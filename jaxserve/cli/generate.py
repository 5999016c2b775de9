"""`jaxserve generate`: answers to one prompt or to a file of them, streamed to standard output."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.app import option
from jaxserve.cli.flags import with_sampling, with_settings
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings

if TYPE_CHECKING:
    from jaxserve.llm import LLM


@with_sampling
@with_settings(warmup=False)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="the prompt; - or nothing reads standard input"),
    ] = None,
    *,
    prompts: Annotated[
        str | None,
        option(
            "--prompts",
            metavar="FILE",
            help="answer each line of a file (- is standard input); lines may be JSON texts; the "
            "answers are JSON lines in the same order",
        ),
    ] = None,
    raw: Annotated[
        bool, option("--raw", help="continue the prompt as it is, without chat template")
    ] = False,
    system: Annotated[
        str | None, option("--system", metavar="TEXT", help="system message before the prompt")
    ] = None,
    sampling: dict[str, Any],
    settings: Settings,
) -> int:
    """Answer prompts on the terminal.

    The answer is printed as it comes; figures go to standard error, if that is a terminal. Only the
    graphs that the answers need are compiled, when they need them, unless --warmup asks for all.
    """
    if raw and system:
        raise ConfigError("--system needs the chat template; leave out --raw")
    if prompts is not None and prompt is not None:
        raise ConfigError("give either a prompt or --prompts")
    texts = [_only_prompt(prompt)] if prompts is None else read_prompts(prompts)

    from jaxserve.engine import build_engine
    from jaxserve.llm import LLM
    from jaxserve.progress import Progress
    from jaxserve.requests import default_sampling

    with Progress() as bars:
        engine = build_engine(settings.config, bars)
    with LLM(engine=engine) as llm:
        params = default_sampling(
            llm.tokenizer.generation_config, **{"max_tokens": None, **sampling}
        )
        has_chat = not raw and (llm.tokenizer.has_chat_template or bool(system))
        questions = [_question(text, system, has_chat) for text in texts]
        if prompts is None:
            _stream(llm, questions[0], params)
        else:
            _answer_all(llm, texts, questions, params)
    return 0


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line: JSON texts, or the line itself; empty lines are skipped.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    import json

    try:
        if path == "-":
            content = sys.stdin.read()
        else:
            with open(path, encoding="utf-8") as file:
                content = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    prompts = []
    for line in filter(None, map(str.strip, content.splitlines())):
        try:
            value = json.loads(line)
        except ValueError:
            value = line
        prompts.append(value if isinstance(value, str) else line)
    if not prompts:
        raise ConfigError(f"{path} holds no prompts; expected one a line")
    return prompts


def _only_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("there is no prompt: give one, or text on standard input, or --prompts")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError("standard input is empty; expected a prompt")
    return text


def _question(text: str, system: str | None, has_chat: bool) -> Any:
    if not has_chat:
        return text
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def _stream(llm: "LLM", question: Any, params: Any) -> None:
    started_s = time.monotonic()
    first_s, num_tokens = 0.0, 0
    for delta in llm.stream(question, params):
        first_s = first_s or time.monotonic()
        num_tokens += len(delta.token_ids)
        print(delta, end="", flush=True)
    print()
    if sys.stderr.isatty() and num_tokens > 1:
        speed = (num_tokens - 1) / max(time.monotonic() - first_s, 1e-9)
        first = f"first after {first_s - started_s:.2f} s, then {speed:,.0f} tokens/s"
        print(f"({num_tokens} tokens: {first})", file=sys.stderr)


def _answer_all(llm: "LLM", texts: list[str], questions: list[Any], params: Any) -> None:
    import json

    ask = llm.generate if isinstance(questions[0], str) else llm.chat
    has_bar = sys.stderr.isatty()
    for text, output in zip(texts, ask(questions, params, use_tqdm=has_bar), strict=True):
        answer = output.outputs[0]
        line = {
            "prompt": text,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(answer.token_ids),
            "cached_tokens": output.num_cached_tokens,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
