"""`jaxserve chat` and `jaxserve complete`: a talk with a model in this process, or behind a URL."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from jaxserve.cli.app import option
from jaxserve.cli.flags import with_model_argument, with_sampling, with_settings
from jaxserve.settings import Settings

if TYPE_CHECKING:
    from jaxserve.cli.chat_client import ChatClient

Url: TypeAlias = Annotated[
    str | None,
    option(
        "--url",
        metavar="URL",
        help="talk to a running server instead, such as http://host:8000/v1; --model is then the "
        "name it serves, and --api-key its key",
    ),
]
Quick: TypeAlias = Annotated[
    str | None, option("--quick", "-q", metavar="TEXT", help="ask this, print the answer, and end")
]


@with_model_argument
@with_sampling
@with_settings(max_num_seqs=1, max_num_batched_tokens=512)
def chat(
    *,
    url: Url = None,
    quick: Quick = None,
    system: Annotated[
        str | None, option("--system", metavar="TEXT", help="system message of the conversation")
    ] = None,
    load: Annotated[
        str | None, option("--load", metavar="FILE", help="go on with a saved conversation")
    ] = None,
    markdown: Annotated[
        bool, option("--markdown/--no-markdown", help="render answers; default: yes")
    ] = True,
    sampling: dict[str, Any],
    settings: Settings,
) -> int:
    """Chat with a model on the terminal.

    Enter sends; Alt+Enter, or a backslash at the end, begins a new line. Ctrl-C stops an answer,
    Ctrl-D ends. /help lists the commands. Without a terminal, standard input is one question.
    """
    from jaxserve.cli.conversation import Conversation
    from jaxserve.cli.talk import Talk, read_question

    conversation = Conversation(system, [], _plain(sampling))
    if load is not None:
        conversation.load(load)
        conversation.system = system or conversation.system
        conversation.sampling |= _plain(sampling)
    question = quick if quick is not None else read_question()
    with _client(url, settings) as client:
        talk = Talk(client, conversation, markdown=markdown)
        if question is not None:
            talk.ask(question)
            return 0
        return talk.run()


@with_model_argument
@with_sampling
@with_settings(max_num_seqs=1, max_num_batched_tokens=512)
def complete(
    *,
    url: Url = None,
    quick: Quick = None,
    sampling: dict[str, Any],
    settings: Settings,
) -> int:
    """Let a model continue texts, without chat template.

    The same keys and commands as in `jaxserve chat`.
    """
    from jaxserve.cli.conversation import Conversation
    from jaxserve.cli.talk import Talk, read_question

    conversation = Conversation(None, [], {"max_tokens": 128, **_plain(sampling)})
    question = quick if quick is not None else read_question()
    with _client(url, settings) as client:
        talk = Talk(client, conversation, markdown=False, is_raw=True)
        if question is not None:
            talk.ask(question)
            return 0
        return talk.run()


@contextlib.contextmanager
def _client(url: str | None, settings: Settings) -> "Iterator[ChatClient]":
    from jaxserve.cli.chat_client import ChatClient

    if url is not None:
        server = settings.config.server
        client = ChatClient(url, settings.config.model.model, api_key=server.api_key)
        with contextlib.closing(client):
            yield client
        return
    from jaxserve.cli.local_server import local_server

    with local_server(settings.config) as local:
        client = ChatClient("http://localhost", local.model_name, socket=local.socket)
        with contextlib.closing(client):
            yield client


def _plain(sampling: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in sampling.items()}
