"""Exceptions that leave jaxserve.

    JaxserveError
    +-- ConfigError     an option, or a combination of options, that cannot work  (a ValueError)
    +-- WeightsError    a checkpoint that is broken, incomplete or not supported  (a ValueError)
    +-- RequestError    one request that cannot be served; the others go on       (a ValueError)
    +-- StoreError      a KV store as a whole cannot answer; serving goes on      (a RuntimeError)
    +-- EngineDeadError the engine stopped and takes no more requests             (a RuntimeError)

Each message says what was wrong, what was expected, and what to do about it.
"""


class JaxserveError(Exception):
    """Base of every exception that jaxserve raises on purpose."""


class ConfigError(JaxserveError, ValueError):
    """An option, or a combination of options, that cannot work."""


class WeightsError(JaxserveError, ValueError):
    """A checkpoint that is broken, incomplete or not supported: names the file, tensor or field."""


class RequestError(JaxserveError, ValueError):
    """One request that cannot be served.

    Args:
        message: what was wrong, what was expected, what to do.
        param: dotted path of the offending field, as the client spelt it, if there is one.
        code: the OpenAI error code, e.g. `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param = param
        self.code = code


class StoreError(JaxserveError, RuntimeError):
    """A KV store as a whole cannot answer: connection lost, disk unreadable, no permission."""


class EngineDeadError(JaxserveError, RuntimeError):
    """The engine stopped and takes no more requests."""
