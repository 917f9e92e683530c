"""The certificate passes where the layouts are right, and fails when any one factor is broken."""

import math

import pytest
import torch

from dcpo_megatron.verification import cases, certificate
from dcpo_megatron.verification.layouts import FAST, find_layouts
from dcpo_megatron.verification.measure import objective_settings
from dcpo_megatron.verification.ranks import RankFailure, RankPool
from dcpo_megatron.verification.reference import near_a_jump


@pytest.fixture(scope="module")
def verdicts():
    return certificate.certify(find_layouts("fast"), cases.OBJECTIVES, timeout=240)


@pytest.mark.parametrize("layout", FAST)
def test_a_layout_gives_the_gradient_of_one_process_under_every_objective(verdicts, layout):
    mine = [verdict for verdict in verdicts if verdict.layout == layout]
    assert len(mine) == len(cases.OBJECTIVES)
    for verdict in mine:
        assert verdict.passed, verdict


# Each breaks one factor; the layout is one where that factor matters.
SABOTAGE = {
    "without_num_microbatches": "dp1",
    "dp_cp_for_dp": "cp2",
    "length_of_the_local_slice": "cp2",
    "without_loss_mask": "dp2",
    "without_vocabulary_padding": "tp2-sp",
    "contiguous_instead_of_zigzag": "cp2",
    "batched_communication_with_vpp": "pp2-vpp2",
    "local_sequence_ratio": "cp2",
    "norms_not_marked_sequence_parallel": "tp2-sp",
    "attention_across_sequences": "dp1",
}


@pytest.fixture(scope="module")
def pools():
    """A broken layout may end its pool; the next one gets a new pool then."""
    held: list[RankPool] = []

    def get() -> RankPool:
        if not held or held[-1].size == 0:
            held.append(RankPool(2))
        return held[-1]

    yield get
    for pool in held:
        pool.close()


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_certificate_fails_when_one_factor_is_broken(pools, name):
    objective = "gspo" if name == "local_sequence_ratio" else "dcpo-paper"
    # Stages whose shapes travel with the tensors do not even finish a step there: the deadline ends it.
    hangs = name == "batched_communication_with_vpp"
    found = certificate.certify(
        find_layouts(SABOTAGE[name]),
        {objective: cases.OBJECTIVES[objective]},
        sabotage=f"tests.verification.sabotage:{name}",
        pool=pools(),
        timeout=40 if hangs else 100,
    )
    assert not any(verdict.passed for verdict in found), found
    if hangs:
        assert all("gave no answer within" in verdict.failure for verdict in found), found
    else:
        # By a number, not by an exception: the check saw the difference.
        assert all(not verdict.failure for verdict in found), found[0].failure


SOME = {name: cases.OBJECTIVES[name] for name in ("gspo", "dcpo-paper")}


@pytest.fixture(scope="module")
def ranks_of_an_nvidia_image():
    """Ranks that start with TF32 switched on for torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
        pool = RankPool(2)
    with pool:
        yield pool


def test_bf16_passes_within_multiples_of_its_own_error_and_fp32_products_are_in_fp32(ranks_of_an_nvidia_image):
    look = "tests.verification.sabotage:nothing_but_a_look_at_fp32_products"
    torch.set_float32_matmul_precision("high")
    try:
        # Stages: gradients are fp32 where parameters are bf16.
        found = certificate.certify(
            find_layouts("pp2"), SOME, dtype="bfloat16", sabotage=look, pool=ranks_of_an_nvidia_image, timeout=100
        )
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(verdict.passed for verdict in found), found
    # bf16 it is: far from the bound of fp32, and its own bound is not there for nothing.
    assert all(0.5 < verdict.gradient_error for verdict in found), found


def test_the_certificate_of_bf16_fails_when_a_factor_is_broken(ranks_of_an_nvidia_image):
    found = certificate.certify(
        find_layouts("cp2"), SOME, dtype="bfloat16", sabotage="tests.verification.sabotage:local_sequence_ratio",
        pool=ranks_of_an_nvidia_image, timeout=100,
    )  # fmt: skip
    assert [verdict.passed for verdict in found] == [False, True], found
    assert not any(verdict.failure for verdict in found), found


def test_old_logprobs_of_bf16_keep_away_from_every_bound():
    """A clip at 0.8 and 1.2 is left as soon as the ratio crosses one of them, on the side that the advantage says."""
    generator = torch.Generator().manual_seed(0)
    settings = objective_settings(cases.OBJECTIVES["grpo+icepop"])

    def nearest(margin: float) -> float:
        items = cases.make_items()
        current = [-2 - torch.rand(len(item.response), generator=generator) for item in items]
        cases.attach_old_logprobs(
            items, current, refused=lambda logp, item: near_a_jump(logp, item, [settings], margin)
        )
        bounds = [math.log(1.2 if item.advantage > 0 else 0.8) for item in items]
        rows = [(logp - item.old_logprobs - bound).abs().min() for item, logp, bound in zip(items, current, bounds)]
        return float(min(row for row, item in zip(rows, items) if item.advantage))

    assert nearest(0.0) < 0.05 <= nearest(0.05) + 1e-6


def test_a_rank_that_raises_is_named(pools):
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised(.|\n)*on purpose"):
        RankPool(2).run("tests.verification.sabotage:raise_on_rank_one", 2, timeout=60)


def test_a_rank_that_hangs_ends_by_the_deadline(pools):
    with pytest.raises(RankFailure, match=r"rank 1 of 2 gave no answer within 20 s"):
        RankPool(2).run("tests.verification.sabotage:hang_on_rank_one", 2, timeout=20)


def test_a_rank_that_dies_is_named_with_its_exit_code(pools):
    with pytest.raises(RankFailure, match=r"rank 1 of 2 died \(exit code 7\)"):
        RankPool(2).run("tests.verification.sabotage:end_on_rank_one", 2, timeout=60)
