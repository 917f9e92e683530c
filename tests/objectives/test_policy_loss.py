import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.objectives import PRESETS, Objective, get_preset, policy_loss

# (q, p, A) -> (r, loss, d loss/d log p) under dcpo-paper
GOLDEN = [
    (0.9, 0.95, 1, 1.055556, -1.055556, -1.055556),
    (0.9, 0.65, -1, 0.722222, 0.768742, 0),
    (0.9, 0.70, -1, 0.777778, 0.777778, 0.777778),
    (0.5, 0.7, 1, 1.4, -1.306226, 0),
    (0.5, 0.6, 1, 1.2, -1.2, -1.2),
    (0.5, 0.2, -1, 0.4, 0.5, 0),
    (0.1, 0.25, 1, 2.5, -2, 0),
    (0.01, 0.049, 1, 4.9, -4.9, -4.9),
    (0.01, 0.06, 1, 6, -5, 0),
    (0.001, 0.0095, 1, 9.5, -9.5, -9.5),
    (0.001, 0.02, 1, 20, -10, 0),
    (0.001, 0.02, -2, 20, 20, 0),
    (0.001, 0.0004, -2, 0.4, 1.0, 0),
    (0.001, 0.0006, -2, 0.6, 1.2, 1.2),
]

TOKEN_PRESETS = [name for name, objective in PRESETS.items() if objective.ratio_level == "token"]

any_logprob = st.one_of(
    st.floats(min_value=-30.0, max_value=0.0, width=32),
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -1e-45, -90.0, -104.0, -math.inf, math.inf, -3e38]),
)


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def loss_and_gradient(logprobs, old_logprobs, advantages, objective, **kwargs):
    leaf = logprobs.detach().clone().requires_grad_()
    result = policy_loss(leaf, old_logprobs, advantages, objective, **kwargs)
    result.loss.sum().backward()
    return result, leaf.grad


@pytest.mark.parametrize(("q", "p", "advantage", "ratio", "loss", "gradient"), GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_equal_the_golden_values(q, p, advantage, ratio, loss, gradient, dtype):
    logprob, old = (torch.tensor([math.log(x)], dtype=torch.float64).to(dtype) for x in (p, q))
    result, got = loss_and_gradient(logprob, old, torch.tensor([float(advantage)]), "dcpo-paper")
    relative = 1e-6 if dtype == torch.float64 else 3e-6
    assert result.ratio.item() == pytest.approx(ratio, abs=1e-6, rel=relative)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6, rel=relative)
    assert got.item() == pytest.approx(gradient, abs=1e-6, rel=relative)
    assert result.loss.dtype == dtype


def test_the_golden_gradients_are_removed_by_the_clip_that_the_masks_name():
    q, p, advantages, _, _, gradients = (tensor(*column) for column in zip(*GOLDEN, strict=True))
    result, _ = loss_and_gradient(p.log(), q.log(), advantages, "dcpo-paper")
    assert result.gradient_removed.tolist() == [gradient == 0 for gradient in gradients.tolist()]
    named = {"upper": result.clipped_upper, "lower": result.clipped_lower, "cap": result.clipped_cap}
    assert {name: mask.nonzero().flatten().tolist() for name, mask in named.items()} == {
        "upper": [3, 6, 8, 10],
        "lower": [1, 5, 12],
        "cap": [11],
    }


def formula(ratio, advantage, lower, upper, cap):
    """The surrogate as the max/min formula, for one token in plain floats."""
    loss = max(-advantage * ratio, -advantage * min(max(ratio, lower), upper))
    return min(loss, -advantage * cap) if advantage < 0 and cap is not None else loss


@given(
    st.sampled_from(TOKEN_PRESETS),
    st.lists(st.tuples(st.floats(-12, 0), st.floats(-12, 0), st.floats(-3, 3)), min_size=1, max_size=20),
)
@settings(max_examples=300)
def test_loss_equals_the_max_min_formula(preset, tokens):
    old, new, advantages = (tensor(*column) for column in zip(*tokens, strict=True))
    objective = get_preset(preset)
    result, gradient = loss_and_gradient(new, old, advantages, objective)
    for t, (log_q, log_p, advantage) in enumerate(tokens):
        ratio = math.exp(log_p - log_q)
        lower, upper = result.lower[t].item(), result.upper[t].item()
        expected = formula(ratio, advantage, lower, upper, objective.cap_negative)
        assert result.loss[t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        clipped = result.gradient_removed[t].item()
        assert gradient[t].item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-9, abs=1e-12)
        flat = advantage != 0 and not math.isclose(expected, -advantage * ratio, rel_tol=1e-9)
        if flat:
            assert clipped
    masks = torch.stack([result.clipped_upper, result.clipped_lower, result.clipped_cap])
    assert (masks.sum(0) <= 1).all()


@given(
    st.sampled_from(TOKEN_PRESETS),
    st.lists(st.tuples(any_logprob, any_logprob, st.floats(-5, 5, width=32)), min_size=1, max_size=20),
)
@settings(max_examples=300)
def test_loss_and_gradient_are_finite_for_any_logprobs_that_are_not_nan(preset, tokens):
    old, new, advantages = (torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True))
    result, gradient = loss_and_gradient(new, old, advantages, preset)
    assert result.loss.isfinite().all() and gradient.isfinite().all() and result.ratio.isfinite().all()


def test_the_cap_of_ten_holds_for_both_signs_of_the_advantage():
    old = tensor(*[math.log(1e-4)] * 6)
    ratios = tensor(9.999, 10.001, 1000.0, 9.999, 10.001, 1000.0)
    advantages = tensor(1, 1, 1, -1, -1, -1)
    result, gradient = loss_and_gradient(old + ratios.log(), old, advantages, "dcpo-paper")
    assert result.loss.tolist() == pytest.approx([-9.999, -10, -10, 9.999, 10, 10])
    assert gradient.tolist() == pytest.approx([-9.999, 0, 0, 9.999, 0, 0])
    assert result.clipped_upper.tolist() == [False, True, True, False, False, False]
    assert result.clipped_cap.tolist() == [False, False, False, False, True, True]


def test_grpo_has_no_cap_for_negative_advantages_and_dapo_has_ten():
    old, new = tensor(-9.0), tensor(-9.0) + math.log(50.0)
    assert policy_loss(new, old, tensor(-1), "grpo").loss.item() == pytest.approx(50.0)
    assert policy_loss(new, old, tensor(-1), "dapo").loss.item() == pytest.approx(10.0)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 1.0), (0.75, -1.0), (4.0, -1.0)])
def test_a_token_exactly_on_its_bound_or_cap_keeps_its_full_gradient(ratio, advantage):
    # Powers of two and log 1 = 0 would be too easy to get right by luck: take the ratio the code itself computes.
    objective = Objective(bounds="fixed", eps_low=0.25, eps_high=0.25, cap_negative=4.0)
    old, new = tensor(0.0), tensor(math.log(ratio))
    exact = policy_loss(new, old, tensor(advantage), objective).ratio.item()
    bound = {1.25: {"eps_high": exact - 1}, 0.75: {"eps_low": 1 - exact}, 4.0: {"cap_negative": exact}}[ratio]
    objective = replace(objective, **bound)
    result, gradient = loss_and_gradient(new, old, tensor(advantage), objective)
    edge = {1.25: result.upper, 0.75: result.lower, 4.0: tensor(objective.cap_negative)}[ratio]
    assert edge.item() == exact, "the test must sit on the bound, bit for bit"
    assert gradient.item() == -advantage * exact
    assert result.loss.item() == -advantage * exact
    assert not result.gradient_removed.any()


def test_a_token_one_step_beyond_its_bound_has_no_gradient():
    ratio = policy_loss(tensor(math.log(1.25)), tensor(0.0), tensor(1), "grpo").ratio.item()
    objective = replace(get_preset("grpo"), eps_high=math.nextafter(ratio, 0) - 1)
    result, gradient = loss_and_gradient(tensor(math.log(1.25)), tensor(0.0), tensor(1), objective)
    assert result.upper.item() < ratio and gradient.item() == 0 and result.clipped_upper.item()


def test_an_advantage_of_zero_gives_zero_loss_and_gradient_whatever_the_logprobs_are():
    new = tensor(math.nan, -math.inf, 0.0, -1.0, math.inf)
    old = tensor(-1.0, -math.inf, -math.inf, math.nan, -1.0)
    result, gradient = loss_and_gradient(new, old, tensor(0.0), "dcpo-paper")
    assert result.loss.tolist() == [0.0] * 5 and gradient.tolist() == [0.0] * 5
    assert not (result.clipped_upper | result.clipped_lower | result.clipped_cap).any()


@pytest.mark.parametrize("preset", TOKEN_PRESETS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_nan_logprob_reaches_the_loss(preset, advantage):
    for new, old in ((math.nan, -1.0), (-1.0, math.nan)):
        assert policy_loss(tensor(new), tensor(old), tensor(advantage), preset).loss.isnan().all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_two_logprobs_of_minus_infinity_have_the_ratio_one(advantage):
    result = policy_loss(tensor(-math.inf), tensor(-math.inf), tensor(advantage), "dcpo-paper")
    assert result.ratio.item() == 1.0
    assert result.loss.item() == -advantage


def test_the_gradient_flows_through_the_current_logprobs_only():
    new, old, advantages = (tensor(-1.0, -2.0, grad=True) for _ in range(3))
    policy_loss(new, old, advantages, "dcpo-paper").loss.sum().backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None


def test_one_advantage_per_response_is_broadcast_over_its_tokens():
    new, old = torch.randn(2, 3) * 0.1 - 1, torch.full((2, 3), -1.0)
    per_response = policy_loss(new, old, torch.tensor([[1.0], [-2.0]]), "dapo").loss
    per_token = policy_loss(new, old, torch.tensor([[1.0] * 3, [-2.0] * 3]), "dapo").loss
    assert torch.equal(per_response, per_token) and per_response.shape == (2, 3)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="old_logprobs"):
        policy_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), "grpo")
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "grpo")


def test_half_precision_inputs_are_computed_in_single_precision():
    new, old = torch.tensor([-1.5], dtype=torch.bfloat16), torch.tensor([-1.75], dtype=torch.bfloat16)
    leaf = new.clone().requires_grad_()
    result = policy_loss(leaf, old, torch.tensor([1.0], dtype=torch.float64), "grpo")
    result.loss.sum().backward()
    assert result.loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    assert result.ratio.item() == pytest.approx(math.exp(0.25), rel=1e-6)


def test_without_bounds_the_loss_is_the_plain_importance_weighted_one():
    objective = Objective(bounds="none", cap_negative=None)
    new, old, advantages = tensor(-1.0, -5.0, -1.0), tensor(-5.0, -1.0, -5.0), tensor(1, -1, -1)
    result, gradient = loss_and_gradient(new, old, advantages, objective)
    assert result.loss.tolist() == pytest.approx((-advantages * (new - old).exp()).tolist())
    assert torch.allclose(gradient, result.loss) and not result.gradient_removed.any()


@pytest.mark.parametrize(("advantage", "mask"), [(1.0, "clipped_upper"), (-1.0, "clipped_cap")])
def test_a_ratio_beyond_the_numeric_limit_is_flat_and_counted_as_clipped(advantage, mask):
    objective = Objective(bounds="none", cap_negative=None)
    result, gradient = loss_and_gradient(tensor(0.0), tensor(-50.0), tensor(advantage), objective)
    assert result.loss.item() == pytest.approx(-advantage * math.exp(20)) and gradient.item() == 0
    assert getattr(result, mask).item() and result.gradient_removed.item()


def test_cispo_keeps_every_gradient_and_weights_it_with_the_clipped_ratio():
    objective = Objective(bounds="fixed", eps_low=0.2, eps_high=0.28, cap_negative=None, out_of_bound="cispo")
    old = tensor(-2.0, -2.0, -2.0, -2.0, -2.0)
    ratios, advantages = tensor(2.0, 0.5, 2.0, 0.5, 1.1), tensor(1.0, 1.0, -3.0, -3.0, 2.0)
    new = old + ratios.log()
    result, gradient = loss_and_gradient(new, old, advantages, objective)
    weights = tensor(1.28, 0.8, 1.28, 0.8, 1.1)
    assert result.loss.tolist() == pytest.approx((-weights * advantages * new).tolist())
    assert gradient.tolist() == pytest.approx((-weights * advantages).tolist())
    assert result.clipped_upper.tolist() == [True, False, True, False, False]
    assert result.clipped_lower.tolist() == [False, True, False, True, False]
    assert not result.clipped_cap.any() and not result.gradient_removed.any()


def test_cispo_with_dac_bounds_is_finite_for_vanishing_probabilities():
    objective = Objective(out_of_bound="cispo", cap_negative=None)
    new, old = tensor(-math.inf, -1.0, -math.inf), tensor(-1.0, -math.inf, -math.inf)
    result, gradient = loss_and_gradient(new, old, tensor(-1.0), objective)
    assert result.loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("preset", ["dcpo-paper", "grpo", "dapo"])
def test_the_loss_compiles_as_one_graph_of_any_length(preset):
    compiled = torch.compile(policy_loss, fullgraph=True, dynamic=True, backend="eager")
    for length in (3, 5):
        old = torch.linspace(-3.0, -0.1, length)
        arguments = (old + 0.3, old, torch.linspace(-1.0, 1.0, length), get_preset(preset))
        assert torch.equal(compiled(*arguments).loss, policy_loss(*arguments).loss)
