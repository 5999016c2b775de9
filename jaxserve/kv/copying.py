"""Copies of bytes that let other threads run meanwhile.

Assigning to a slice of a memoryview holds the interpreter's lock for the whole copy, milliseconds
for a large block: so long nobody could dispatch a step.
"""

import numpy as np


def copy_into(target: memoryview, source: memoryview) -> None:
    """Fill `target`, which is writable, with `source`; both contiguous and of the same length."""
    assert target.nbytes == source.nbytes
    if source.nbytes:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
