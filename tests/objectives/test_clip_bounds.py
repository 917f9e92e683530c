import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.objectives import (
    Objective,
    dynamic_clip_bounds,
    fixed_clip_bounds,
    no_clip_bounds,
    ripo_clip_bounds,
    vacuous_upper_bound,
)

# q, lower, upper for eps 0.16 / 0.20 and ratio_max 10.
DAC_GOLDEN = [
    (1.0, 0.800000, 1.170820),
    (0.95, 0.785620, 1.178621),
    (0.9, 0.768742, 1.187184),
    (5 / 6, 0.740832, 1.200000),
    (0.8, 0.723607, 1.207107),
    (0.7, 0.646385, 1.231925),
    (0.64, 0.5, 1.25),
    (0.5, 0.5, 1.306226),
    (0.3, 0.5, 1.457427),
    (0.1, 0.5, 2.0),
    (0.05, 0.5, 2.561553),
    (0.01, 0.5, 5.0),
    (0.005, 0.5, 6.844289),
    (0.001, 0.5, 10.0),
    (0.0, 0.5, 10.0),
]

any_float = st.one_of(
    st.floats(width=32),
    st.floats(min_value=-200.0, max_value=0.0, width=32),
    st.sampled_from(
        [0.0, -0.0, -20.0, -87.4, -90.0, -100.0, -103.9, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38]
    ),
)


def log_of(*probabilities, dtype=torch.float64):
    return torch.tensor([math.log(q) if q > 0 else -math.inf for q in probabilities], dtype=dtype)


@pytest.mark.parametrize(("q", "lower", "upper"), DAC_GOLDEN)
def test_dac_bounds_equal_the_golden_values(q, lower, upper):
    got_lower, got_upper = dynamic_clip_bounds(log_of(q))
    assert got_lower.item() == pytest.approx(lower, abs=1e-6)
    assert got_upper.item() == pytest.approx(upper, abs=1e-6)


@pytest.mark.parametrize(("q", "lower", "upper"), [row for row in DAC_GOLDEN if row[0] != 0.64])
def test_dac_bounds_in_single_precision_equal_the_golden_values_to_single_precision(q, lower, upper):
    # q = 0.64 is left out: there the square root starts at 0, and the rounding of log q alone moves it by 1e-4.
    got_lower, got_upper = dynamic_clip_bounds(log_of(q, dtype=torch.float32))
    assert got_lower.dtype == got_upper.dtype == torch.float32
    assert got_lower.item() == pytest.approx(lower, abs=1e-6)
    assert got_upper.item() == pytest.approx(upper, abs=1e-6, rel=1e-6)


def test_dac_bounds_solve_the_constraint_they_come_from():
    q = torch.linspace(0.65, 1.0, 50, dtype=torch.float64)
    lower, upper = dynamic_clip_bounds(q.log(), 0.16, 0.20)
    assert torch.allclose((1 - lower) * lower * q, torch.full_like(q, 0.16), atol=1e-12)
    assert torch.allclose((upper - 1) * upper * q, torch.full_like(q, 0.20), atol=1e-12)


@pytest.mark.parametrize("log_q", [-20.0, -90.0, -100.0, -104.0, -1000.0, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dac_bounds_of_vanishing_probabilities_are_exactly_one_half_and_the_cap(log_q, dtype):
    lower, upper = dynamic_clip_bounds(torch.tensor([log_q], dtype=dtype))
    assert (lower.item(), upper.item()) == (0.5, 10.0)


@given(st.lists(any_float, min_size=1, max_size=20), st.floats(0, 2), st.floats(0, 2), st.floats(1.001, 1e6))
@settings(max_examples=300)
def test_dac_bounds_are_finite_and_on_their_sides_of_one_for_any_float(values, eps_low, eps_high, ratio_max):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        lower, upper = dynamic_clip_bounds(torch.tensor(values).to(dtype), eps_low, eps_high, ratio_max)
        assert lower.isfinite().all() and upper.isfinite().all()
        assert ((lower >= 0.5) & (lower <= 1)).all()
        assert ((upper >= 1) & (upper <= ratio_max * (1 + 1e-6))).all()


@given(st.lists(st.floats(-200, 0), min_size=2, max_size=30), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200)
def test_dac_bounds_tighten_monotonically_as_q_grows(values, eps_low, eps_high):
    log_q = torch.tensor(sorted(values), dtype=torch.float64)
    lower, upper = dynamic_clip_bounds(log_q, eps_low, eps_high)
    assert (lower.diff() >= 0).all()
    assert (upper.diff() <= 1e-14).all()


def test_dac_bounds_read_nan_and_positive_logprobs_as_probability_one():
    tightest = dynamic_clip_bounds(torch.zeros(1))
    for value in (math.nan, 1e-3, math.inf):
        got = dynamic_clip_bounds(torch.tensor([value]))
        assert torch.equal(got[0], tightest[0]) and torch.equal(got[1], tightest[1])


def test_dac_bounds_of_subnormal_probabilities_are_finite():
    subnormal = torch.tensor([1e-40], dtype=torch.float32)  # the formula in q divides by this and overflows
    lower, upper = dynamic_clip_bounds(subnormal.log())
    assert (lower.item(), upper.item()) == (0.5, 10.0)


def test_zero_epsilons_close_the_dac_interval():
    lower, upper = dynamic_clip_bounds(log_of(1.0, 0.5, 0.0), 0.0, 0.0)
    assert lower.tolist() == upper.tolist() == [1.0, 1.0, 1.0]


def test_bounds_are_detached_and_keep_shape_and_precision():
    for rule in (dynamic_clip_bounds, fixed_clip_bounds, ripo_clip_bounds, no_clip_bounds):
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
            old = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
            for bound in rule(old):
                assert bound.shape == (2, 3) and bound.dtype == expected and not bound.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [{"eps_low": -0.1}, {"eps_high": -0.1}, {"eps_low": math.nan}, {"ratio_max": 1.0}, {"ratio_max": math.inf}],
)
def test_dac_bounds_refuse_impossible_parameters_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        dynamic_clip_bounds(torch.zeros(1), **arguments)


def test_bounds_refuse_whole_numbers():
    with pytest.raises(TypeError, match="floating point"):
        dynamic_clip_bounds(torch.zeros(1, dtype=torch.int64))


def test_fixed_bounds_are_one_minus_and_plus_epsilon():
    lower, upper = fixed_clip_bounds(log_of(0.9, 0.01), 0.2, 0.28)
    assert lower.tolist() == pytest.approx([0.8, 0.8]) and upper.tolist() == pytest.approx([1.28, 1.28])
    with pytest.raises(ValueError, match="eps_low"):
        fixed_clip_bounds(torch.zeros(1), 1.5, 0.2)


def test_ripo_bounds_are_one_minus_and_plus_sqrt_delta_over_q_inside_the_outer_interval():
    lower, upper = ripo_clip_bounds(log_of(1.0, 0.8, 0.2, 0.0002, 0.0), 0.05, (0.5, 10.0))
    assert lower.tolist() == pytest.approx([1 - 0.05**0.5, 0.75, 0.5, 0.5, 0.5])
    assert upper.tolist() == pytest.approx([1 + 0.05**0.5, 1.25, 1.5, 10.0, 10.0])


@given(st.lists(any_float, min_size=1, max_size=20), st.floats(0, 10))
@settings(max_examples=100)
def test_ripo_bounds_are_finite_for_any_float(values, delta):
    lower, upper = ripo_clip_bounds(torch.tensor(values), delta)
    assert ((lower >= 0.5) & (lower <= 1) & (upper >= 1) & (upper <= 10)).all()


def test_no_bounds_never_act():
    lower, upper = no_clip_bounds(torch.zeros(2))
    assert lower.tolist() == [0.0, 0.0] and upper.tolist() == [math.inf, math.inf]


def test_the_upper_bound_is_vacuous_exactly_where_it_reaches_one_over_q():
    q = torch.tensor([0.0, 0.5, 0.83, 0.8332, 0.8334, 0.84, 0.95, 1.0], dtype=torch.float64)
    _, upper = dynamic_clip_bounds(q.log())
    vacuous = vacuous_upper_bound(q.log())
    assert vacuous.tolist() == [False, False, False, False, True, True, True, True]
    assert torch.equal(vacuous, upper >= 1 / q)
    assert not vacuous_upper_bound(torch.tensor([math.nan])).any()


def test_a_positive_cap_ends_the_upper_bound_of_the_objective():
    objective = Objective(bounds="ripo", cap_positive=3.0)
    lower, upper = objective.clip_bounds(log_of(0.9, 1e-6))
    assert upper.tolist() == pytest.approx([1 + (0.05 / 0.9) ** 0.5, 3.0])
    assert lower.tolist() == pytest.approx([1 - (0.05 / 0.9) ** 0.5, 0.5])


@pytest.mark.parametrize("eps_high", [0.2, 0.28])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_upper_bound_is_vacuous_from_its_edge_on(eps_high, dtype):
    edge = torch.tensor(-math.log1p(eps_high), dtype=dtype)
    below = torch.nextafter(edge, torch.full((), -1.0, dtype=dtype))
    found = vacuous_upper_bound(torch.stack([below, edge]), eps_high)
    assert found.tolist() == [False, True]
