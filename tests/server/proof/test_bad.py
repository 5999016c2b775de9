import random

import pytest

from tests.server.hostile import Broken
from tests.server.proof.bad import Sent, Tally, own_requests
from tests.server.random_bodies import ADMIN_BODIES, BODIES

ERROR = b'HTTP/1.1 %d x\r\nA: b\r\n\r\n{"error": {"message": "no"}}'


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, "no end in time"),
        (b"", "no answer"),
        (ERROR % 500, "a 5xx"),
        (ERROR % 400 + ERROR % 503, "a 5xx"),
        (b"HTTP/1.1 400 x\r\n\r\nsorry", "no error in the body"),
        (b'HTTP/1.1 200 x\r\n\r\ndata: {"error": {"type": "server_error"}}', "inside of a stream"),
        (ERROR % 400, None),
        (b"HTTP/1.1 200 x\r\n\r\n{}", None),
    ],
)
def test_what_a_server_must_not_answer_is_a_fault(data: bytes | None, fault: str | None):
    tally = Tally()
    tally.note(Sent("spoilt: /tokenize", Broken(b"POST / HTTP/1.1")), data, 0.1)
    assert bool(tally.faults) == (fault is not None)
    assert fault is None or fault in tally.faults[0]


def test_own_requests_go_to_every_endpoint_that_takes_a_body():
    source = own_requests(random.Random(0))
    sent = b"".join(next(source).broken.data for _ in range(300))
    assert all(path.encode() in sent for path in BODIES | ADMIN_BODIES)
