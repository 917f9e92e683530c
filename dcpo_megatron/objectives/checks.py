"""Refusing numbers that cannot be meant, with a message that names the field, the value and what is allowed."""

import math


def check_number(name: str, value: float, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """Refuse a `value` that is not a finite number >= `minimum` and > `above`.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    allowed = f"> {above:g}" if above > -math.inf else f">= {minimum:g}" if minimum > -math.inf else "any"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < minimum or value <= above:
        raise ValueError(f"{name} = {value!r} is not possible; give a finite number, {allowed}")


def check_outer(name: str, outer: tuple[float, float]) -> None:
    """Refuse an outer interval that does not satisfy 0 <= low <= 1 <= high < inf (ValueError)."""
    if len(outer) != 2:
        raise ValueError(f"{name} = {outer!r} is not possible; give two numbers (low, high)")
    for end in outer:
        check_number(name, end, minimum=0.0)
    if not outer[0] <= 1.0 <= outer[1]:
        raise ValueError(f"{name} = {outer!r} is not possible; r = 1 must lie inside: low <= 1 <= high")
