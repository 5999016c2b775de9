"""How the server logs: lines for people, or one JSON object a line, with the request's id.

Whatever a record carries as `extra` is told: after the message, or as fields. Prompts and answers
are never logged.
"""

import json
import logging
import sys
import time
from typing import Any, TextIO

from jaxserve.server.watch import CURRENT

# What every record has; the rest is what a call gave as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logs(format: str = "text", level: str = "warning", stream: TextIO | None = None) -> None:
    """Log everything of that level and above to `stream`, stderr by default."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, request_id, and the extras."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class TextFormatter(logging.Formatter):
    """A line as people read it; what comes from outside cannot break it in two."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time_of(record)} {record.levelname} {record.getMessage()}"
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = (line + extras).replace("\r", "\\r").replace("\n", "\\n")
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    extras = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if request_id := CURRENT.get().request_id:
        extras.setdefault("request_id", request_id)
    return extras


def _time_of(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
