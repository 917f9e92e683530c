"""Where the calculation is the task, only the number itself in the box is right."""

import pytest

from dcpo_megatron.toys.boxed_integer import reward


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("12+5=17;\\boxed{17}", 1.0),
        ("\\boxed{17}", 1.0),
        ("\\boxed{12+5}", 0.0),
        ("\\boxed{17=17}", 0.0),
        ("\\boxed{017}", 0.0),
        ("\\boxed{18}", 0.0),
        ("\\boxed{17}\\boxed{3}", 0.0),
        ("\\boxed{}", 0.0),
        ("12+5=17", -1.0),
        ("\\boxed{17", -1.0),
    ],
)
def test_levels(response, expected):
    assert reward(response, "17") == expected
