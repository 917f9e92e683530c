"""A reward function by dotted path, as a user would write one."""

import zlib


def digits(response: str, ground_truth: str) -> float:
    """Shaped: the share of characters that are digits, so that groups of random responses differ."""
    return sum(letter.isdigit() for letter in response) / max(1, len(response))


def enormous(response: str, ground_truth: str) -> float:
    """Finite, but beyond fp32: no gradient survives it."""
    return 1e60 if zlib.crc32(response.encode()) % 2 else 0.0


def unreliable(response: str, ground_truth: str) -> float:
    """Raises on some responses and never returns on a few; the others are judged as :func:`digits` does."""
    if response.startswith("1"):
        raise ValueError("no ones")
    while response.startswith("23"):
        pass
    return digits(response, ground_truth)
