"""A sequence's load job: what may be computed and what is taken over, as pieces arrive."""

import pytest

from jaxserve.kv.loads import RACE_TOKENS, LoadJob, Piece, PieceState

PAGE = 16


def job(*states: PieceState, all_or_nothing: bool = False, end_tokens: int = 0) -> LoadJob:
    """Pieces of 10 blocks from block 0 on, head first; deadline 5 s, computes to 64 till then."""
    pieces = [Piece(i, 10 * i, 10 * i + 10, state, "host") for i, state in enumerate(states)]
    return LoadJob(
        names=[b""] * 10 * len(states),
        end_tokens=end_tokens or 160 * len(states),
        page_size=PAGE,
        pages=({},),
        all_or_nothing=all_or_nothing,
        compute_until=64,
        deadline_s=5.0,
        pieces=pieces[::-1],
    )


READY, COMING, LOST = PieceState.READY, PieceState.FETCHING, PieceState.LOST
WRITTEN = PieceState.WRITTEN


def taken(a_job: LoadJob, position: int) -> list[int]:
    """As the planner does it: what has arrived is written, and then taken if it can be."""
    for piece in a_job.passed(position):
        piece.wanted = False
    a_job.arrived()
    return [piece.piece_id for piece in a_job.take(position)]


def test_ready_pieces_are_taken_from_the_position_on_without_a_gap():
    assert taken(job(READY, READY, COMING, READY), 0) == [0, 1]
    assert taken(job(COMING, READY), 0) == []
    assert taken(job(COMING, READY), 160) == [1]
    assert taken(job(COMING, READY), 170) == [1], "the position is inside of the piece"


def test_a_piece_that_was_passed_is_given_up_and_not_waited_for():
    a_job = job(COMING, READY)
    assert [piece.piece_id for piece in a_job.passed(170)] == [0]
    assert taken(a_job, 170) == [1]
    assert a_job.is_over(320)


def test_what_has_arrived_is_written_once_and_waits_in_its_pages_for_those_before():
    a_job = job(COMING, READY, COMING, READY)
    assert [piece.piece_id for piece in a_job.arrived()] == [3, 1]
    assert a_job.arrived() == [] and a_job.take(0) == []
    a_job.pieces[3].state = READY
    assert taken(a_job, 0) == [0, 1]
    assert not a_job.is_over(320), "one piece is still coming"


def test_before_the_deadline_the_head_is_computed_and_then_piece_by_piece():
    a_job = job(COMING, COMING, COMING)
    assert a_job.compute_limit(0, now_s=1.0) == 64
    assert a_job.compute_limit(64, now_s=1.0) == 64
    assert a_job.compute_limit(64, now_s=6.0) == 64 + 2 * RACE_TOKENS, "nothing has come so far"
    a_job.num_arrived = 1
    assert a_job.compute_limit(64, now_s=6.0) == 64 + RACE_TOKENS


def test_the_deadline_is_put_off_while_pieces_come_as_fast_as_they_would_be_computed():
    a_job = job(*[COMING] * 10)
    a_job.patience_s, a_job.compute_s = 1.0, 50.0
    a_job.pieces[0].state = WRITTEN
    a_job.note_arrivals(now_s=4.5)
    assert a_job.deadline_s == 5.5
    a_job.note_arrivals(now_s=5.4)
    assert a_job.deadline_s == 5.5, "nothing new has come"
    a_job.pieces[1].state = WRITTEN
    a_job.note_arrivals(now_s=10.5)
    assert a_job.deadline_s == 5.5, "two of ten, in more than a fifth of 50 s"


def test_the_longer_nothing_comes_the_more_is_computed_at_a_time():
    a_job = job(*[COMING] * 20)
    a_job.num_arrived = 1
    assert a_job.compute_limit(1000, now_s=6.0) == 2000 > 1000 + RACE_TOKENS


def test_what_is_ready_is_not_computed():
    a_job = job(LOST, WRITTEN)
    assert a_job.compute_limit(0, now_s=0.0) == 160
    assert taken(a_job, 160) == [1]


def test_what_lies_before_all_that_may_still_come_is_computed_at_once():
    assert job(LOST, COMING, COMING).compute_limit(0, now_s=1.0) == 160
    assert job(LOST, LOST, WRITTEN, COMING).compute_limit(16, now_s=1.0) == 320


def test_once_everything_is_lost_nothing_limits_computing():
    a_job = job(LOST, LOST)
    assert a_job.compute_limit(0, now_s=0.0) is None
    assert a_job.is_over(0)


@pytest.mark.parametrize("states", [(READY, COMING), (COMING, READY)])
def test_with_windows_all_pieces_are_taken_together_or_none(states: tuple[PieceState, PieceState]):
    a_job = job(*states, all_or_nothing=True)
    assert taken(a_job, 0) == []
    for piece in a_job.pieces:
        piece.state = READY
    assert taken(a_job, 0) == [0, 1]
    lossy = job(READY, LOST, all_or_nothing=True)
    assert taken(lossy, 0) == [] and lossy.is_over(0)


@pytest.mark.parametrize("now_s", [1.0, 6.0])
@pytest.mark.parametrize("state", [COMING, WRITTEN, LOST])
def test_with_windows_nothing_is_computed_while_the_job_lasts(state: PieceState, now_s: float):
    """The job's pages hold the window of its end, so a query before it would see other pages."""
    assert job(WRITTEN, state, all_or_nothing=True).compute_limit(0, now_s) == 0


def test_the_last_block_may_be_partial():
    a_job = job(WRITTEN, WRITTEN, end_tokens=305)
    pieces = a_job.take(0)
    assert [a_job.position_after(piece) for piece in pieces] == [160, 305]
    assert a_job.is_over(305)
