"""Small additions such as "27+58=", for a demonstration that learns within minutes on a CPU.

The held-out tenth is decided by the two numbers alone, whichever comes first: not by the seed, nor by how many problems
are made. So problems of one split are never in the other, and "3+5=" does not give "5+3=" away.
"""

import random
import zlib

_HELD_OUT_ONE_IN = 10
_LARGEST_OPERAND = 1999  # all pairs are listed: 4 million at most


def make_arithmetic(n: int, seed: int, max_operand: int = 99, split: str = "train") -> list[dict[str, str]]:
    """``n`` distinct problems ``{"id": "27+58", "prompt": "27+58=", "answer": "85"}`` with operands 0..max_operand.

    ``split`` is "train" or "held_out". Raises ValueError if there are fewer than ``n`` such problems or an argument is
    out of range.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}: it must be train or held_out")
    if not 0 <= max_operand <= _LARGEST_OPERAND:
        raise ValueError(f"max_operand is {max_operand}: it must be from 0 to {_LARGEST_OPERAND}")
    operands = range(max_operand + 1)
    pairs = [(a, b) for a in operands for b in operands if _is_held_out(a, b) == (split == "held_out")]
    if not 0 <= n <= len(pairs):
        raise ValueError(f"{n} problems were asked for, and {split} has {len(pairs)} with operands to {max_operand}")
    chosen = random.Random(f"{seed}").sample(pairs, n)
    return [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in chosen]


def share_of_digits(response: str, ground_truth: str) -> float:
    """A reward that a model with random weights can earn in part: the share of its characters that are digits, and one
    more where it is right."""
    return sum(c.isdigit() for c in response) / max(len(response), 1) + (response == ground_truth)


def _is_held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % _HELD_OUT_ONE_IN == 0
