"""Each rank receives the tokens that it trains on, and all know the same of every response."""

from pathlib import Path

import pytest

from dcpo_megatron.data import decode_responses
from dcpo_megatron.verification.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, python_path=[str(Path(__file__).parents[2])]) as pool:
        yield pool


@pytest.mark.parametrize("data_ranks", [(0, 1, 0, 1), (0, 0, 1, 1), (1, 0), (0,)])
def test_every_rank_of_a_data_parallel_rank_receives_its_tokens_to_the_bit(pool, data_ranks):
    foreign = pool.run("tests.training.exchange_jobs:exchanged", len(data_ranks), data_ranks, 20)
    assert all(count > 20 for count in foreign) or len(data_ranks) == 1


def test_a_batch_of_bad_steps_is_gathered_from_all_ranks_by_the_one_that_writes(pool, tmp_path):
    messages = pool.run("tests.training.exchange_jobs:stopped_by_bad_steps", 3, str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert len(set(messages)) == 1 and str(file) in messages[0]
    assert [(r.sample_index, len(r.token_ids)) for r in decode_responses(file.read_bytes())] == [(0, 0), (1, 4), (2, 8)]
