"""What a user notices of scheduling: who runs, who waits, what is computed, how it ends."""

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.plan import StepPlan
from jaxserve.types import FinishReason
from tests.scheduler.fake_device import answer
from tests.scheduler.simulation import Simulation, kv_groups


def prompt(length: int, first: int = 1) -> list[int]:
    """A prompt that differs from those with another `first` in its first block."""
    return [first, *((7 * i + 3) % 90 + 1 for i in range(length - 1))]


def num_prefill_tokens(plans: list[StepPlan]) -> int:
    return sum(plan.num_tokens - plan.num_decodes for plan in plans)


def step_until_running(sim: Simulation, count: int) -> None:
    for _ in range(50):
        if sim.scheduler.num_running == count:
            return
        sim.step()
    raise AssertionError(f"{sim.scheduler.num_running} run, expected {count}")


def test_an_end_by_length_wastes_no_row():
    sim = Simulation()
    sim.add("a", prompt(5), max_tokens=6, ignore_eos=True)
    sim.run()
    sim.check_answers()
    assert sum(plan.num_decodes for plan in sim.plans) == 5


def test_a_stop_token_wastes_one_row():
    tokens = answer(prompt(5), 1, 20)
    stop = tokens[5]
    assert stop not in tokens[:5] and 0 not in tokens[:6]
    sim = Simulation()
    sim.add("a", prompt(5), max_tokens=20, stop_token_ids=(stop,), seed=1)
    sim.run()
    sim.check_answers()
    assert sum(plan.num_decodes for plan in sim.plans) == 5 + 1
    sim.check_all_is_free()


def test_max_model_len_ends_an_answer():
    sim = Simulation(max_model_len=16)
    sim.add("a", prompt(10), max_tokens=100, ignore_eos=True)
    sim.run()
    assert len(sim.tokens("a")) == 6
    assert sim.events["a"][-1].finish_reason is FinishReason.LENGTH


def test_an_answer_that_fills_the_whole_pool_ends_by_length():
    sim = Simulation(num_pages=(5,))
    sim.add("a", prompt(10), max_tokens=100, ignore_eos=True)
    sim.run()
    assert len(sim.tokens("a")) == 11  # 20 places, and the last token needs none
    assert sim.events["a"][-1].finish_reason is FinishReason.LENGTH
    sim.check_all_is_free()


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "param"),
    [
        ([], {}, "prompt"),
        (prompt(128), {}, "prompt"),
        (prompt(41), {}, "prompt"),  # the pool holds 40
        ([1], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(prompt_ids, sampling, param):
    sim = Simulation(num_pages=(10,))
    with pytest.raises(RequestError) as caught:
        sim.add("a", prompt_ids, **sampling)
    assert caught.value.param == param
    assert not sim.scheduler.has_work


def test_the_longest_prompt_that_fits_is_served():
    sim = Simulation(num_pages=(10,))
    sim.add("a", prompt(40), max_tokens=5)
    sim.run()
    assert len(sim.tokens("a")) == 1
    sim.check_answers()


def test_a_live_request_id_is_refused_and_can_be_used_again_later():
    sim = Simulation()
    sim.add("a", prompt(5), max_tokens=2)
    with pytest.raises(RequestError, match="'a'"):
        sim.scheduler.add(sim.requests["a"])
    sim.run()
    sim.scheduler.add(sim.requests["a"])
    assert sim.scheduler.has_work


def test_a_repeated_prompt_is_found_in_the_cache_but_for_its_last_token():
    sim = Simulation()
    sim.add("first", prompt(16), max_tokens=4)
    sim.run()
    sim.plans.clear()
    sim.add("second", prompt(16), max_tokens=4)
    sim.run()
    sim.check_answers()
    assert [event.num_cached_tokens for event in sim.events["second"]] == [12] * 4
    assert num_prefill_tokens(sim.plans) == 4


def test_the_next_turn_of_a_conversation_finds_the_last_answer_in_the_cache():
    sim = Simulation()
    sim.add("first", prompt(10), max_tokens=14, ignore_eos=True)
    sim.run()
    so_far = prompt(10) + sim.tokens("first")
    sim.add("second", [*so_far, 5, 6, 7], max_tokens=2)
    sim.run()
    sim.check_answers()
    assert sim.events["second"][0].num_cached_tokens == 20  # full blocks of 24 - 1 computed tokens


def test_requests_of_different_salt_share_nothing():
    sim = Simulation()
    for name, salt in (("a", ""), ("b", "tenant"), ("c", "tenant")):
        sim.add(name, prompt(16), max_tokens=1, salt=salt)
        sim.run()
    found = [sim.events[name][0].num_cached_tokens for name in "abc"]
    assert found == [0, 0, 12]


def test_without_prefix_caching_everything_is_computed_again():
    sim = Simulation(enable_prefix_caching=False)
    for name in "ab":
        sim.add(name, prompt(16), max_tokens=8)
        sim.run()
    sim.check_answers()
    assert num_prefill_tokens(sim.plans) == 32
    assert sim.scheduler.stats().pages[0].num_cached == 0


def test_prompts_that_arrive_together_compute_their_common_prefix_once():
    sim = Simulation(max_num_seqs=6, max_num_batched_tokens=16)
    for index in range(6):
        sim.add(str(index), [*prompt(40), index], max_tokens=3)
    sim.run()
    sim.check_answers()
    assert num_prefill_tokens(sim.plans) == 41 + 5 * 1


def test_those_behind_a_common_prefix_go_on_when_the_one_that_computes_it_is_aborted():
    sim = Simulation(max_num_batched_tokens=16)
    for name in "abc":
        sim.add(name, [*prompt(40), ord(name) % 90], max_tokens=3)
    sim.step()
    assert sim.scheduler.num_running == 1
    sim.abort("a")
    sim.run()
    sim.check_answers()
    # 16 tokens were computed by the aborted one, the others share the rest.
    assert num_prefill_tokens(sim.plans) == 41 + 1


def test_one_that_shares_no_prefix_overtakes_those_that_wait_for_theirs():
    sim = Simulation(max_num_batched_tokens=64)
    sim.add("a", [*prompt(40), 1], max_tokens=3)
    sim.add("b", [*prompt(40), 2], max_tokens=3)
    sim.add("c", prompt(10, first=9), max_tokens=3)
    sim.step()
    assert sorted(chunk.end for chunk in sim.plans[0].prefills) == [10, 41]
    sim.run()
    sim.check_answers()


def test_running_answers_get_a_token_in_each_step_while_a_long_prompt_is_computed():
    sim = Simulation(max_num_batched_tokens=8, num_pages=(64,))
    for index in range(3):
        sim.add(str(index), prompt(2, first=index), max_tokens=40, ignore_eos=True)
    step_until_running(sim, 3)
    sim.step()
    sim.plans.clear()
    sim.add("long", prompt(60, first=50), max_tokens=2)
    for _ in range(12):
        sim.step()
    assert [(plan.num_decodes, plan.num_tokens) for plan in sim.plans] == [(3, 8)] * 12
    assert [chunk.samples for plan in sim.plans for chunk in plan.prefills] == [False] * 11 + [True]
    sim.run()
    sim.check_answers()


def test_steps_without_prompts_use_the_smallest_decode_bucket():
    sim = Simulation(max_num_seqs=8)
    for index in range(3):
        sim.add(str(index), prompt(3, first=index), max_tokens=5 + index, ignore_eos=True)
    sim.run()
    buckets = {tuple(plan.bucket) for plan in sim.plans if not plan.prefills}
    assert buckets == {(4, 4, True), (2, 2, True), (1, 1, True)}


def test_first_come_is_first_served():
    sim = Simulation(max_num_seqs=2)
    for index in range(8):
        sim.add(str(index), prompt(3, first=index), max_tokens=4, priority=-index)
    sim.run()
    assert sim.order_of_first == [str(index) for index in range(8)]
    assert sim.scheduler.stats().num_preemptions == 0


def test_under_the_priority_policy_the_smaller_number_goes_first_then_the_earlier():
    sim = Simulation(max_num_seqs=1, policy="priority")
    for index, priority in enumerate([2, 1, 0, 1, 0]):
        sim.add(str(index), prompt(3, first=index), max_tokens=4, priority=priority)
    sim.run()
    assert sim.order_of_first == ["2", "4", "1", "3", "0"]


@pytest.mark.parametrize("lack", ["slots", "pages"])
def test_a_more_urgent_request_preempts_a_running_one(lack: str):
    is_slots = lack == "slots"
    sim = Simulation(
        max_num_seqs=2 if is_slots else 8, num_pages=(64 if is_slots else 12,), policy="priority"
    )
    sim.add("kept", prompt(12, first=1), max_tokens=12, priority=1, ignore_eos=True)
    sim.add("victim", prompt(12, first=2), max_tokens=12, priority=2, ignore_eos=True)
    step_until_running(sim, 2)
    sim.add("urgent", prompt(20, first=3), max_tokens=6, priority=0, ignore_eos=True)
    ended = []
    while sim.scheduler.has_work:
        sim.step()
        ended += [n for n, e in sim.events.items() if n not in ended and e and e[-1].finish_reason]
    sim.check_answers()
    assert ended[0] == "urgent" and ended[-1] == "victim"
    assert sim.scheduler.stats().num_preemptions >= 1


def test_equal_priority_does_not_preempt():
    sim = Simulation(max_num_seqs=1, policy="priority")
    sim.add("a", prompt(4, first=1), max_tokens=8, priority=1)
    step_until_running(sim, 1)
    sim.add("b", prompt(4, first=2), max_tokens=8, priority=1)
    sim.run()
    assert sim.scheduler.stats().num_preemptions == 0
    sim.check_answers()


def test_when_pages_run_out_the_last_arrived_yields_and_the_first_loses_no_step():
    sim = Simulation(num_pages=(16,), max_num_seqs=4)
    for index in range(4):
        sim.add(str(index), prompt(8, first=index), max_tokens=40, ignore_eos=True)
    steps = 0
    while sim.events["0"] == [] or sim.events["0"][-1].finish_reason is None:
        sim.step()
        steps += 1
    assert steps == 41  # one prefill, 39 decodes, and one step until the last token is applied
    assert sim.scheduler.stats().num_preemptions >= 2
    sim.run()
    sim.check_answers()
    sim.check_all_is_free()
    first_ends = [name for name, events in sim.events.items() if len(events) == 40]
    assert first_ends == ["0", "1", "2", "3"]


def test_a_preempted_answer_takes_its_blocks_back_from_the_cache():
    sim = Simulation(max_num_seqs=1, policy="priority", num_pages=(64,))
    sim.add("victim", prompt(30, first=1), max_tokens=20, priority=1, ignore_eos=True)
    for _ in range(8):
        sim.step()
    sim.add("urgent", prompt(5, first=2), max_tokens=2, priority=0)
    sim.plans.clear()
    sim.run()
    sim.check_answers()
    # The urgent prompt, and what of the victim was not in a full block.
    assert num_prefill_tokens(sim.plans) <= 5 + 4
    assert sim.events["victim"][-1].num_cached_tokens == 0  # of the first admission


@pytest.mark.parametrize("num_steps", range(6))
def test_an_abort_at_any_moment_frees_everything_and_silences_the_request(num_steps: int):
    sim = Simulation(max_num_batched_tokens=8, max_num_seqs=2)
    for name in "abc":  # "c" waits for a slot
        sim.add(name, prompt(12, first=ord(name)), max_tokens=9, ignore_eos=True)
    for _ in range(num_steps):
        sim.step()
    for name in "abc":
        assert sim.abort(name)
        assert not sim.abort(name)
    assert not sim.scheduler.has_work
    sim.check_all_is_free()
    sim.add("d", prompt(12), max_tokens=3)
    sim.run()
    sim.check_answers()


def test_aborting_an_unknown_request_says_so():
    assert not Simulation().scheduler.abort("nobody")


def test_a_sliding_window_outlives_a_pool_of_its_size():
    # 6 tokens reach into at most 3 pages of 4.
    sim = Simulation(groups=kv_groups(6), num_pages=(3,), max_model_len=120)
    sim.add("a", prompt(50), max_tokens=60, ignore_eos=True)
    sim.run()
    sim.check_answers()
    assert len(sim.tokens("a")) == 60


def test_a_pool_smaller_than_the_window_holds_short_prompts_only():
    sim = Simulation(groups=kv_groups(6), num_pages=(2,), max_model_len=120)
    with pytest.raises(RequestError, match="the KV cache holds 8"):
        sim.add("long", prompt(9))
    sim.add("short", prompt(8), max_tokens=1)
    sim.run()
    sim.check_answers()


def test_the_tail_of_an_ended_request_is_evicted_before_its_head():
    sim = Simulation(num_pages=(12,))
    sim.add("old", prompt(24, first=1), max_tokens=1)
    sim.run()
    sim.add("other", prompt(32, first=2), max_tokens=1)  # leaves 4 pages of the old one
    sim.run()
    sim.add("again", prompt(24, first=1), max_tokens=1)
    sim.run()
    sim.check_answers()
    assert sim.events["again"][0].num_cached_tokens == 16


def test_a_request_does_not_start_only_to_be_preempted_for_the_next_page_of_another():
    sim = Simulation(num_pages=(6,))
    sim.add("a", prompt(8, first=1), max_tokens=14, ignore_eos=True)
    for _ in range(3):
        sim.step()
    sim.add("b", prompt(8, first=2), max_tokens=3, ignore_eos=True)
    sim.run()
    sim.check_answers()
    assert sim.scheduler.stats().num_preemptions == 0


def test_a_request_that_waits_for_pages_costs_nothing_until_something_changes(monkeypatch):
    sim = Simulation(num_pages=(20,))
    sim.add("a", prompt(8, first=1), max_tokens=50, ignore_eos=True)
    sim.step()
    sim.add("b", prompt(70, first=2), max_tokens=3)
    looked_up = []
    longest_prefix = sim.scheduler._index.longest_prefix
    monkeypatch.setattr(
        sim.scheduler._index,
        "longest_prefix",
        lambda *args, **kwargs: looked_up.append(len(sim.plans)) or longest_prefix(*args, **kwargs),
    )
    sim.run()
    sim.check_answers()
    assert len(sim.events["a"]) == 50 and len(looked_up) == 2


def test_pages_that_slid_out_of_a_window_are_free_at_once():
    sim = Simulation(groups=kv_groups(None, 6), num_pages=(64, 64))
    sim.add("a", prompt(20), max_tokens=60, ignore_eos=True)
    while sim.scheduler.has_work:
        sim.step()
        full, window = (pages.num_in_use for pages in sim.scheduler.stats().pages)
        assert full >= window
        if len(sim.plans) > 1:
            assert window <= 3  # 6 tokens never reach into more than 3 pages of 4
    sim.check_answers()


def test_a_hit_needs_only_the_window_of_a_window_group():
    sim = Simulation(groups=kv_groups(None, 6), num_pages=(64, 64))
    sim.add("a", prompt(40), max_tokens=1)
    sim.run()
    window = sim.scheduler._index.groups[1]
    hashes = [window.hash_of(page) for page in range(window.num_pages)]
    names = [name for name in hashes if name is not None]
    assert len(names) == 10
    seen = sim.scheduler._index.longest_prefix
    sim.add("probe", prompt(40), max_tokens=1)
    chain = sim.scheduler._roster.waiting.peek()
    assert chain is not None and chain.hash_blocks(36, 4) == 9
    for block_hash in chain.hashes[:7]:
        window.forget(block_hash)
    assert seen(chain.hashes) == 9
    sim.run()
    sim.check_answers()
    assert sim.events["probe"][0].num_cached_tokens == 36


def test_prompt_logprobs_come_once_over_chunks_and_are_computed_though_cached():
    sim = Simulation(max_num_batched_tokens=8)
    sim.add("first", prompt(21), max_tokens=2)
    sim.run()
    sim.add("a", prompt(21), max_tokens=3, prompt_logprobs=2, logprobs=1)
    sim.run()
    sim.check_answers()
    logprobs = sim.events["a"][0].prompt_logprobs
    assert logprobs is not None and len(logprobs) == 21
    assert sim.events["a"][0].num_cached_tokens == 0


def test_logprobs_are_computed_only_when_somebody_wants_them():
    sim = Simulation()
    sim.add("plain", prompt(5), max_tokens=4)
    sim.run()
    assert not any(plan.wants_logprobs or plan.wants_prompt_logprobs for plan in sim.plans)
    sim.add("asks", prompt(5), max_tokens=4, logprobs=3)
    sim.run()
    sim.check_answers()


def test_an_admitted_slot_is_loaded_with_all_that_sampling_needs():
    sim = Simulation()
    sim.add("first", prompt(16), max_tokens=1)
    sim.run()
    sim.add("a", prompt(18), max_tokens=3, stop_token_ids=(9,), seed=5)
    plan = sim.scheduler.schedule()
    assert plan is not None
    (load,) = plan.slot_loads
    assert load.token_ids.dtype == np.int32 and load.token_ids.tolist() == prompt(18)
    assert (load.num_prompt_tokens, load.sampling.seed) == (18, 5)
    assert load.stop_token_ids == (0, 9)
    assert [len(row) for row in load.page_rows] == [4]
    assert plan.page_updates[0].indices.tolist() == [4]


def test_ten_thousand_aborted_requests_leave_no_trace_in_the_queue():
    sim = Simulation(max_num_seqs=1)
    sim.add("runs", prompt(4), max_tokens=30)
    sim.step()
    for index in range(10_000):
        sim.add(f"w{index}", [1, 2, 3], max_tokens=1)
        if index >= 3:
            sim.scheduler.abort(f"w{index}")
    assert sim.scheduler.num_waiting == 3
    assert len(sim.scheduler._roster.waiting._heap) <= 8
    sim.scheduler.check_integrity()


def test_the_figures_add_up():
    sim = Simulation()
    for name in "ab":
        sim.add(name, prompt(16), max_tokens=4, ignore_eos=True)
        sim.run()
    stats = sim.scheduler.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (32, 12)
    assert stats.scheduled_prefill_tokens == 16 + 4
    assert stats.scheduled_decode_tokens == 2 * 3
    assert stats.num_steps == len(sim.plans)
    (pages,) = stats.pages
    assert pages.num_free + pages.num_cached + pages.num_in_use == pages.num_pages == 64
