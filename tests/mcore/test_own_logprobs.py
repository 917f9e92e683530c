"""The only update of a rollout batch gives its own old log-probs: the same to the bit as a pass before it, whatever the
layout, the rows, the head and the objective."""

import pytest
import torch

from dcpo_megatron.mcore.batch import TrainingSample, make_micro_batch
from dcpo_megatron.mcore.loss import MAX_NAMES, SUM_NAMES, make_loss
from dcpo_megatron.verification.cases import attach_old_logprobs, find_objectives, make_items, make_model
from dcpo_megatron.verification.layouts import parse_layout
from dcpo_megatron.verification.ranks import RankPool
from dcpo_megatron.verification.reference import load_model, token_distribution

OBJECTIVES = find_objectives("dcpo-paper,gspo+mis,dcpo-paper+tis+entropy,grpo+kl+icepop")
VOCAB = 301  # some chunks of the vocabulary for the recomputing head, one for the fused


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dp1", {"dtype": "bfloat16"}),
        ("dp1/padded", {"recompute": "full"}),
        ("dp2/m5", {}),
        ("tp2-sp", {}),
        ("pp2-vpp2/padded/m4", {}),
        ("cp2", {}),
        ("dp2-ep2/moe", {}),
    ],
    ids=str,
)
def test_an_update_with_its_own_old_logprobs_is_the_one_with_those_of_a_pass_before(pool, tmp_path, name, options):
    layout = parse_layout(name)
    folder, items = str(tmp_path), make_items()
    make_model(layout.model, folder, vocab_size=VOCAB)
    model = load_model(folder)
    with torch.no_grad():
        attach_old_logprobs(items, [token_distribution(model, item, 1.0)[0] for item in items])
    job = "tests.mcore.own_jobs:pass_and_own"
    ranks = pool.run(job, layout.world, name, folder, items, OBJECTIVES, **options)
    assert any(rank["plain"] for rank in ranks)  # another order of sums would have been noticed
    for rank in ranks:
        del rank["plain"]
        before, own = rank.pop("update")
        assert before[0] == own[0] and before[0].stepped and before[0].gradient_norm > 0
        assert all(map(torch.equal, before[1], own[1]))
        assert len(rank) == 2 * len(OBJECTIVES)
        for key, ((before, before_gradients), (own, own_gradients)) in rank.items():
            assert before == own, key
            assert own["ratio"] == own["tokens"] and own["ratio_deviation_max"] == 0 and own["mismatch_abs"] > 0, key
            assert all(map(torch.equal, before_gradients, own_gradients)), key
            assert any(gradient.any() for gradient in own_gradients), key


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_old_logprobs_that_a_micro_batch_has_are_taken_and_its_own_where_it_has_none(objective):
    def metrics(old):
        sequences = [TrainingSample(0, [1, 2], [3, 4, 5], 1.5, 0.25, old, now - 0.1, now + 0.1)]
        batch = make_micro_batch(sequences, torch.device("cpu"))
        loss = make_loss(batch, objective, num_microbatches=1, data_parallel_size=1, own_old_logprobs=old is None)
        scaled, found = loss(torch.stack([leaf, torch.ones(3)], dim=1))
        (gradient,) = torch.autograd.grad(scaled, leaf)
        numbers = dict(zip(SUM_NAMES + MAX_NAMES, [*found["sums"].tolist(), *found["maxima"].tolist()], strict=True))
        return numbers, gradient.tolist()

    now = torch.tensor([-0.5, -1.0, -3.0])
    leaf = now.clone().requires_grad_()
    own, moved = metrics(None), metrics(now - 0.01)
    assert own == metrics(now) and any(own[1])
    assert own[0]["ratio"] == 3 and own[0]["ratio_deviation_max"] == 0 and own[0]["mismatch_abs_max"] > 0.09
    assert moved[0]["ratio"] > 3 and moved[0]["mismatch_abs_max"] < 0.1


def test_old_logprobs_of_some_responses_of_a_micro_batch_are_refused():
    known, unknown = TrainingSample(0, [1], [2], old_logprobs=torch.zeros(1)), TrainingSample(1, [1], [2])
    with pytest.raises(ValueError, match="some responses of a micro-batch have old_logprobs and others have none"):
        make_micro_batch([known, unknown], torch.device("cpu"))
