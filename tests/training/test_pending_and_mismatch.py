"""A batch begun a step early is the batch that would have been sampled; a rollout engine that serves another model
stops the run."""

from pathlib import Path

import pytest

from dcpo_megatron.verification.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, python_path=[str(Path(__file__).parents[2])]) as pool:
        yield pool


def essence(responses) -> list[tuple]:
    """Without log-probs, whose last bit depends on the company that a response is sampled in."""
    return [
        (r.prompt_id, r.sample_index, r.token_ids.tolist(), r.finish_reason, r.reward, r.advantage) for r in responses
    ]


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_a_batch_begun_early_has_the_responses_of_one_sampled_on_time(pool, demo_start, whole_prompts):
    for on_time, beside, late in pool.run(
        "tests.training.pending_jobs:begun_and_not", 2, str(demo_start), whole_prompts
    ):
        assert len(on_time) == 12
        assert on_time == beside == late


def test_dealing_whole_prompts_changes_nothing_but_who_samples(pool, demo_start):
    (samples, *_), _ = pool.run("tests.training.pending_jobs:begun_and_not", 2, str(demo_start), False)
    (prompts, *_), _ = pool.run("tests.training.pending_jobs:begun_and_not", 2, str(demo_start), True)
    assert essence(samples) == essence(prompts)


@pytest.mark.parametrize("readers", [2, 1])
def test_responses_sampled_before_a_checkpoint_are_kept_and_only_the_rest_is_sampled(
    pool, demo_start, tmp_path, readers
):
    job = "tests.training.pending_jobs:saved_and_taken_up"
    (wanted, _), _ = pool.run(job, 2, str(demo_start), str(tmp_path), 2, False)
    found = pool.run(job, readers, str(demo_start), str(tmp_path), 2, True)
    assert sum(kept for _, kept in found) == 6  # every second response was finished
    assert all(essence(responses) == essence(wanted) for responses, _ in found)


def test_a_batch_of_the_wrong_step_is_refused(pool, demo_start):
    from tests.training.pending_jobs import _phase, _prompts

    phase = _phase(str(demo_start), beside=False)
    phase._jobs = lambda prompts: [(prompt, 0) for prompt in prompts]
    phase.begin(_prompts(), 7)
    with pytest.raises(RuntimeError, match="step 7 has not been taken up"):
        phase.begin(_prompts(), 8)
    with pytest.raises(RuntimeError, match="pending batch is for step 7, and this is step 8"):
        phase._take_pending(8, None)
    phase.rewarder.close()


def test_a_gap_of_the_weights_of_now_stops_the_run_on_every_rank_and_an_old_one_does_not(pool):
    job = "tests.training.pending_jobs:mismatch"
    assert pool.run(job, 2, 0.1, 5.0, 0.2) == [None, None]
    first, second = pool.run(job, 2, 0.3, 0.0, 0.2)
    assert first == second
    assert (
        "step 3" in first
        and "differ by 0.3 nats on average over 3 tokens" in first
        and "rollout.max_mismatch=0.2" in first
    )
