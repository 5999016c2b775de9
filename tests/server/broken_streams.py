"""Clients that ask for a stream and leave before its end."""

import asyncio
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

CHUNK_BYTES = 4096
MAX_DELAY_S = 0.5
HALF_CLOSED_S = 0.05
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: close by a reset."""


@dataclass
class BrokenOff:
    """What became of streams that were to be broken off.

    Attributes:
        outcomes: how many were broken off before the answer began, in its middle, or had ended.
        last_s: when the last client left (time.monotonic).
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    last_s: float = 0.0


async def break_off_streams(
    port: int,
    rng: random.Random,
    make_request: Callable[[], bytes],
    num_streams: int,
    max_delay_s: float = MAX_DELAY_S,
) -> BrokenOff:
    """Ask for streams at once; leave each after a random time, or after a few pieces of it.

    A third of the clients close, a third close their half first, a third reset the connection.
    """
    result = BrokenOff()

    async def one(request: bytes, delay_s: float, num_pieces: int, goodbye: str) -> None:
        stage = ["before it began"]

        async def read(reader: asyncio.StreamReader) -> None:
            for _ in range(num_pieces):
                data = await reader.read(CHUNK_BYTES)
                if not data:
                    stage[0] = "had ended"
                    return
                stage[0] = "in its middle"

        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            await asyncio.wait_for(read(reader), delay_s)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            if goodbye == "half" and not writer.is_closing():
                writer.write_eof()
                await asyncio.sleep(HALF_CLOSED_S)
            elif goodbye == "reset":
                client = writer.get_extra_info("socket")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            writer.close()
            result.outcomes[stage[0]] += 1
            result.last_s = max(result.last_s, time.monotonic())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_streams):
            tasks.create_task(
                one(
                    make_request(),
                    rng.random() * max_delay_s,
                    rng.randrange(1, 40),
                    rng.choice(("close", "half", "reset")),
                )
            )
    return result
