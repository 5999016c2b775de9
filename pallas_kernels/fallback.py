"""Asks the modules of a package, one after the other, for an operation; the first that can does it.

NotImplementedError, raised while an operation is traced, means "not this one": the next is asked,
and the reason is logged once. So is that a module cannot be imported. Anything else is the caller's
mistake and is not passed over.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Fallback:
    """Modules in the order in which they are asked; each is imported when it first is.

    Args:
        what: they do, for the log.
        names: of the modules.
        load: gives the module of a name; raises ImportError.
    """

    def __init__(self, what: str, names: tuple[str, ...], load: Callable[[str], Any]):
        self._what = what
        self._names = names
        self._load = functools.cache(load)
        self._reported: set[tuple[str, str]] = set()

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """What the first module that can makes of the operation.

        Raises:
            NotImplementedError: none can, for these reasons.
        """
        reasons = []
        for name in self._names:
            try:
                return getattr(self._load(name), operation)(*args, **kwargs)
            except ImportError as error:
                reason = f"it cannot be imported: {error}"
            except NotImplementedError as error:
                reason = f"{operation}: {error}"
            reasons.append(f"{name}: {reason}")
            if (name, reason) not in self._reported:
                self._reported.add((name, reason))
                logger.warning("%s backend %s is passed over; %s", self._what, name, reason)
        raise NotImplementedError(f"no {self._what} backend can do this: " + "; ".join(reasons))


def module_of(package: str) -> Callable[[str], Any]:
    """Imports a module of that package by name."""
    # A string, so that what no machine needs is not imported: Pallas for GPUs, for instance.
    return lambda name: importlib.import_module(f"{package}.{name}")
