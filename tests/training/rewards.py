"""A reward function by dotted path, as a user would write one."""


def digits(response: str, ground_truth: str) -> float:
    """Shaped: the share of characters that are digits, so that groups of random responses differ."""
    return sum(letter.isdigit() for letter in response) / max(1, len(response))
