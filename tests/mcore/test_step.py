"""What a step decides over all ranks: whether gradients are finite, and the largest of each maximum."""

import pytest

from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def test_a_nan_in_any_buffer_of_any_rank_is_seen_by_all(pool, tmp_path):
    make_model("moe", str(tmp_path / "hf"))
    answers = pool.run("tests.mcore.state_jobs:nan_in_each_buffer", 2, str(tmp_path / "hf"), dict(expert=2))
    # Experts have buffers of their own.
    assert answers[0] == answers[1] and set(answers[0]) == {"none", "dense 0", "expert 0"}
    assert answers[0] == {name: name == "none" for name in answers[0]}


def test_maxima_over_ranks_are_maxima_and_sums_are_sums(pool, tmp_path):
    make_model("dense", str(tmp_path / "hf"))
    for sums, maxima in pool.run("tests.mcore.state_jobs:reduce_known_results", 2, str(tmp_path / "hf")):
        assert set(sums.values()) == {1 + 2 + 11 + 12} and set(maxima.values()) == {12}
