"""The numbers that the loss reports beside itself: its parts add up to it, and all are finite for every rule of
bounds."""

import dataclasses

import pytest
import torch

from dcpo_megatron.mcore.batch import TrainingSample, make_micro_batch
from dcpo_megatron.mcore.loss import SUM_NAMES, make_loss
from dcpo_megatron.objectives import Objective, get_preset

OLD = torch.tensor([-0.01, -0.7, -9.0, -30.0])


def sums(objective: Objective, current=(0.05, -0.4, 2.0, 25.0)) -> dict[str, float]:
    """The reported sums for two responses with A > 0 and A < 0; ``current``: log r of their tokens."""
    sequences = [
        TrainingSample(n, [1, 2], [3, 4, 5, 6], advantage, 0.25, OLD, OLD + 0.3, OLD - 0.5) for n,
        advantage in enumerate((1.5, -0.5))
    ]  # fmt: skip
    batch = make_micro_batch(sequences, torch.device("cpu"))
    logprobs = (OLD + torch.tensor(current)).clamp(max=0).repeat(2)
    output = torch.stack([logprobs, torch.linspace(0.1, 3.0, 8)], dim=1)
    _, metrics = make_loss(batch, objective, num_microbatches=1, data_parallel_size=1)(output)
    return dict(zip(SUM_NAMES, metrics["sums"].tolist(), strict=True))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("correction", ["none", "tis"])
def test_the_loss_is_the_sum_of_its_parts(entropy_coef, kl_coef, correction):
    objective = dataclasses.replace(
        get_preset("dcpo-paper"), entropy_coef=entropy_coef, kl_coef=kl_coef, correction=correction
    )
    found = sums(objective)
    assert found["loss"] == pytest.approx(found["policy_loss"] + found["kl_loss"] + found["entropy_loss"], rel=1e-6)
    # 0.25 x the entropies, which add up to 8 x 1.55; the bonus lowers the loss.
    assert found["entropy_loss"] == pytest.approx(-entropy_coef * 0.25 * 8 * 1.55, rel=1e-6)
    assert (found["kl_loss"] > 0) == (kl_coef > 0)


@pytest.mark.parametrize("bounds", ["dac", "fixed", "ripo", "none"])
def test_every_metric_is_finite_for_every_rule_of_bounds(bounds):
    found = sums(Objective(bounds=bounds, cap_negative=None))
    assert all(abs(value) < 1e10 for value in found.values()), found
    # No upper bound is counted as a million a token.
    assert (found["bound_upper"] == 8e6) == (bounds == "none")
