r"""Numbers compared exactly, without computer algebra: integers, decimals, fractions, mixed numbers, powers of ten,
percent.

Most answers of AIME, AMC and GSM8K are decided here, in microseconds. It is also stricter than math-verify, which
rounds to a fixed number of decimals: here ``0.3333`` is not ``\frac13``, ``.0000672`` is not ``.0000673``, ``1,234`` is
not ``1.234``.
"""

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{_DECIMAL}"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*
    (?:(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>{_SIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_SIGNED})\s*\}}
      |(?:(?P<whole_slash>\d+)\s+)?(?P<top_slash>{_DECIMAL})\s*/\s*(?P<bottom_slash>{_SIGNED})
      |(?P<decimal>{_DECIMAL})(?:\\overline\s*\{{(?P<repeat>\d+)\}})?)
    (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*(?P<power>[+-]?\s*\d{{1,3}})\s*\}}|(?P<power_digit>-?\d))
      |[eE](?P<exponent>[+-]?\d{{1,3}}))?
    \s*(?P<percent>%?)""",
    re.VERBOSE,
)
_BASED = re.compile(r"(-?\d[0-9A-Fa-f]*)\s*_\s*(?:(\d)|\{\s*(\d+)\s*\})")


class Number(NamedTuple):
    """A plain number; ``value`` is what stands before the percent sign where ``percent`` is set."""

    value: Fraction
    percent: bool

    def equals(self, other: "Number") -> bool:
        """Exact equality. Where one side alone has a percent sign, ``50%`` equals both 50 and 0.5."""
        if self.percent == other.percent:
            return self.value == other.value
        in_percent, plain = (self.value, other.value) if self.percent else (other.value, self.value)
        return plain in (in_percent, in_percent / 100)


def read_number(text: str) -> Number | None:
    """Reads a cleaned answer as one plain number; None where it is anything else (or divides by zero)."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    whole, top, bottom = match["whole"], match["top"], match["bottom"]
    if match["top_slash"] is not None:
        whole, top, bottom = match["whole_slash"], match["top_slash"], match["bottom_slash"]
    if top is not None:
        if whole is not None and not (top.isdigit() and bottom.isdigit()):
            return None
        divisor = _fraction(bottom)
        if divisor == 0:
            return None
        value = int(whole or 0) + _fraction(top) / divisor
    else:
        value = _fraction(match["decimal"])
        if match["repeat"] is not None:
            _, point, decimals = match["decimal"].partition(".")
            if not point:
                return None
            repeat = match["repeat"]
            value += Fraction(int(repeat), 10 ** len(decimals) * (10 ** len(repeat) - 1))
    power = match["power"] or match["power_digit"] or match["exponent"]
    if power is not None:
        value *= Fraction(10) ** int(power.replace(" ", ""))
    return Number(-value if match["sign"] == "-" else value, bool(match["percent"]))


def read_based(text: str) -> tuple[str, int] | None:
    """Reads a cleaned integer with its base, ``204_5`` as ("204", 5); None where it is anything else."""
    match = _BASED.fullmatch(text)
    return None if match is None else (match[1].upper(), int(match[2] or match[3]))


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").replace(" ", ""))
