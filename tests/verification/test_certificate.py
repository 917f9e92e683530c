"""The certificate passes where the layouts are right, and fails when any one factor is broken."""

import pytest

from dcpo_megatron.verification import cases, certificate
from dcpo_megatron.verification.layouts import FAST, find_layouts
from dcpo_megatron.verification.ranks import RankFailure, RankPool


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


def test_a_rank_that_raises_is_named(pools):
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised(.|\n)*on purpose"):
        RankPool(2).run("tests.verification.sabotage:raise_on_rank_one", 2, timeout=60)


def test_a_rank_that_hangs_ends_by_the_deadline(pools):
    with pytest.raises(RankFailure, match=r"rank 1 of 2 gave no answer within 20 s"):
        RankPool(2).run("tests.verification.sabotage:hang_on_rank_one", 2, timeout=20)
