"""The form is worth a level, the number another; only the end of the response counts."""

import pytest

from dcpo_megatron.rewards.answer_at_end import reward


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("3 + 4 = 7. Answer: 7", 1.0),
        ("Answer: 7.", 1.0),
        ("Answer: $7\n", 1.0),
        ("Answer:7.0", 1.0),
        ("Answer: 3. No. Answer: 7", 1.0),
        ("Answer: 8", 0.0),
        ("Answer: -7", 0.0),
        ("Answer: 7,7", 0.0),
        ("Answer: 7 apples", -1.0),
        ("Answer: 7. Tim has 3 pens", -1.0),
        ("3 + 4 = 7", -1.0),
        ("3 + 4 = 7. Answer:", -1.0),
        ("", -1.0),
    ],
)
def test_levels(response, expected):
    assert reward(response, "7") == expected


def test_thousands_are_read():
    assert reward("Answer: 1,000", "1000") == 1.0
