"""What policies share: queues of keys, oldest first.

A queue is an OrderedDict, because that drops and moves its first key in O(1) however many keys
have left before (a dict walks over the holes they leave).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from jaxserve.kv.blocks import BlockHash

MayLeave: TypeAlias = Callable[[BlockHash], bool]
Keys: TypeAlias = OrderedDict[BlockHash, None]


def first_that_may_leave(queue: "OrderedDict[BlockHash, Any]", may_leave: MayLeave):
    """The oldest key that may leave; None if none may.

    A key that may not leave is in use now, so those passed over become the youngest. That keeps
    the search O(1) amortised: it meets them again only after as many others have left.
    """
    for _ in range(len(queue)):
        key = next(iter(queue))
        if may_leave(key):
            return key
        queue.move_to_end(key)
    return None


def trim(queue: "OrderedDict[BlockHash, Any]", most: int) -> None:
    """Forget the oldest keys until at most `most` are left."""
    while len(queue) > most:
        queue.popitem(last=False)
