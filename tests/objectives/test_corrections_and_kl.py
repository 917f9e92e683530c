import math

import pytest
import torch

from dcpo_megatron.objectives import Objective, kl_k3, rollout_correction

WEIGHTS = torch.tensor([0.4, 0.5, 1.0, 2.0, 2.1, 5.0, 5.1], dtype=torch.float64)


def corrected(correction, weights=WEIGHTS, **settings):
    rollout = torch.full_like(weights, -4.0)
    return rollout_correction(rollout + weights.log(), rollout, Objective(correction=correction, **settings))


def test_no_correction_is_a_weight_of_one_and_needs_no_rollout_logprobs():
    assert corrected("none").tolist() == [1.0] * 7
    assert rollout_correction(torch.zeros(2), None, Objective()).tolist() == [1.0, 1.0]


def test_tis_truncates_at_the_cap():
    assert corrected("tis").tolist() == pytest.approx([0.4, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0])


def test_mis_drops_what_is_beyond_the_cap():
    assert corrected("mis", correction_cap=2.05).tolist() == pytest.approx([0.4, 0.5, 1.0, 2.0, 0, 0, 0])


def test_icepop_drops_what_is_outside_of_its_interval():
    got = corrected("icepop", correction_low=0.45, correction_high=5.05)
    assert got.tolist() == pytest.approx([0, 0.5, 1.0, 2.0, 2.1, 5.0, 0])


def test_the_ends_of_the_kept_interval_are_kept():
    one = torch.ones(1)
    assert corrected("mis", one, correction_cap=1.0).item() == 1.0
    assert corrected("icepop", one, correction_low=1.0).item() == 1.0
    assert corrected("icepop", one, correction_high=1.0).item() == 1.0


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
def test_corrections_are_detached_finite_for_infinities_and_keep_nan_visible(correction):
    old = torch.tensor([-math.inf, -1.0, -math.inf, math.nan, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -math.inf, -math.inf, -1.0, math.nan])
    weights = rollout_correction(old, rollout, Objective(correction=correction))
    assert not weights.requires_grad
    assert weights[:3].isfinite().all() and weights[3:].isnan().all()


def test_a_correction_without_rollout_logprobs_is_refused():
    with pytest.raises(ValueError, match="tis"):
        rollout_correction(torch.zeros(2), None, Objective(correction="tis"))
    with pytest.raises(ValueError, match="shape"):
        rollout_correction(torch.zeros(2), torch.zeros(3), Objective(correction="tis"))


def test_k3_has_the_value_and_the_gradient_of_its_formula():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    kl = kl_k3(logprobs, reference)
    kl.sum().backward()
    d = (reference - logprobs).detach()
    assert torch.allclose(kl, d.exp() - d - 1) and kl[0].item() == 0
    assert torch.allclose(logprobs.grad, 1 - d.exp()) and reference.grad is None


def test_k3_is_not_negative_for_nearly_equal_logprobs_and_finite_for_infinities():
    close = kl_k3(torch.linspace(-1e-4, 1e-4, 101) - 1, torch.full((101,), -1.0))
    assert (close >= 0).all()
    leaf = torch.tensor([-math.inf, -1.0, -math.inf], requires_grad=True)
    kl = kl_k3(leaf, torch.tensor([-1.0, -math.inf, -math.inf]))
    kl.sum().backward()
    assert kl.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("far", [25.0, 100.0, math.inf])
def test_k3_is_flat_beyond_the_numeric_limit_on_either_side(far):
    logprobs = torch.tensor([-1.0, -1.0 - far], dtype=torch.float64, requires_grad=True)
    kl = kl_k3(logprobs, torch.tensor([-1.0 - far, -1.0], dtype=torch.float64))
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([math.exp(-20) + 20 - 1, math.exp(20) - 20 - 1], rel=1e-12)
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_a_capped_k3_is_flat_above_the_cap_and_itself_below():
    d = torch.tensor([-12.0, -1.0, 0.5, 3.0, 30.0], dtype=torch.float64)
    logprobs = torch.full_like(d, -1.0).requires_grad_()
    kl = kl_k3(logprobs, -1.0 + d, 10.0)
    kl.sum().backward()
    k3 = torch.expm1(d) - d
    assert torch.allclose(kl, k3.clamp(max=10.0)) and kl.max() == 10.0
    assert torch.allclose(logprobs.grad, torch.where(k3 < 10.0, 1 - d.exp(), 0.0))


def test_k3_of_nearly_equal_logprobs_is_accurate_in_single_precision():
    logprobs, reference = torch.tensor([-0.5]), torch.tensor([-0.499])
    d = reference.double() - logprobs.double()
    assert kl_k3(logprobs, reference).item() == pytest.approx((torch.expm1(d) - d).item(), rel=1e-3)


def test_k3_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="ref_logprobs"):
        kl_k3(torch.zeros(2), torch.zeros(3))
