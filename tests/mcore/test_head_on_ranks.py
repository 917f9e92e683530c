"""Both heads on real ranks: split over the vocabulary, and in the real schedule."""

import dataclasses

import pytest
import torch

from dcpo_megatron.objectives import get_preset
from dcpo_megatron.verification.cases import OBJECTIVES, attach_old_logprobs, make_items, make_model
from dcpo_megatron.verification.ranks import RankPool
from dcpo_megatron.verification.reference import load_model, token_distribution
from tests.mcore.head_jobs import dense, fused_and_recomputed, relative, split_vocabulary

HIDDEN, VOCAB, PADDED = 6, 29, 32


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("dense", {}), ("tied", {"tensor": 2, "sequence_parallel": True}), ("dense", {"context": 2})],
    ids=["dp2", "tied-tp2-sp", "cp2"],
)
def test_the_real_schedule_gives_the_same_fused_and_recomputed_and_gspo_recomputes(pool, tmp_path, kind, parallel):
    folder, items = str(tmp_path), make_items()
    make_model(kind, folder)
    model = load_model(folder)
    with torch.no_grad():
        attach_old_logprobs(items, [token_distribution(model, item, 1.0)[0] for item in items])
    objectives = OBJECTIVES | {
        "cispo": dataclasses.replace(get_preset("grpo"), out_of_bound="cispo"),
        "entropy": dataclasses.replace(get_preset("grpo"), entropy_coef=0.5),
    }
    job = f"{fused_and_recomputed.__module__}:fused_and_recomputed"
    for rank in pool.run(job, 2, folder, parallel, items, objectives):
        for name, (gradient, sums, fused_calls, scale) in rank.items():
            # One call a micro-batch, on every rank (each is its own last stage).
            assert fused_calls == (0 if objectives[name].ratio_level == "sequence" else 2), name
            assert scale > 1e-4, name
            assert gradient < 2e-6, name
            assert sums < 1e-5, name


# Rank 1 holds some real rows, padding alone, all but one real, or real rows alone.
@pytest.mark.parametrize("vocab", [VOCAB, PADDED // 2, PADDED - 1, PADDED])
def test_two_vocabulary_parallel_ranks_equal_one_process_with_one_collective_for_all_chunks(pool, vocab):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(10, HIDDEN, generator=generator), torch.randn(PADDED, HIDDEN, generator=generator)
    targets = torch.randint(vocab, (10,), generator=generator)
    coefficients = torch.randn(2, 10, generator=generator)
    job = f"{split_vocabulary.__module__}:split_vocabulary"
    ranks = pool.run(job, 2, hidden, weight, targets, coefficients, vocab, 4)
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logprobs, entropy = dense(*leaves, targets, vocab, 0.7)
    (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
    for name, collectives in (("recomputed", 1), ("fused", 3)):
        first, second = (rank[name] for rank in ranks)
        assert first["collectives"] == second["collectives"] == collectives
        assert torch.equal(first["logprobs"], second["logprobs"]) and torch.equal(first["entropy"], second["entropy"])
        assert relative(first["logprobs"], logprobs) < 1e-6
        assert relative(first["entropy"], entropy) < 1e-6
        assert relative(first["hidden"] + second["hidden"], leaves[0].grad) < 1e-5
        assert relative(torch.cat((first["weight"], second["weight"])), leaves[1].grad) < 1e-5


def test_ranks_without_a_response_token_take_part_without_one(pool):
    job = f"{split_vocabulary.__module__}:split_vocabulary"
    nothing = torch.zeros(0, HIDDEN), torch.ones(PADDED, HIDDEN), torch.zeros(0, dtype=torch.long), torch.zeros(2, 0)
    for rank in pool.run(job, 2, *nothing, VOCAB, 4):
        for found in rank.values():
            assert found["logprobs"].shape == found["entropy"].shape == (0,)
            assert found["collectives"] == 0 and not found["weight"].any()
