"""Sums told as small stories, for a model that has learned to read: the additions of ``arithmetic.py`` in words.

The numbers are drawn and split as there: a held-out problem's two numbers are never in a training problem, in either
order.
"""

import random

from dcpo_megatron.toys.arithmetic import make_arithmetic

_STORIES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "{name} finds {a} {things} on Monday and {b} on Tuesday. How many {things} does {name} find in all?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there together?",
    "{name} sold {a} {things} today and {b} yesterday. How many {things} did {name} sell?",
)
_NAMES = ("Ana", "Ben", "Eva", "Mia", "Sam", "Tom")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "stamps")


def make_word_problems(n: int, seed: int, max_operand: int = 20, split: str = "train") -> list[dict[str, str]]:
    """``n`` distinct problems ``{"id": "7+12", "prompt": "Ana has 7 apples and ...?", "answer": "19"}``.

    Raises ValueError as ``make_arithmetic`` does.
    """
    draw = random.Random(f"{seed}/{split}/words")
    rows = []
    for row in make_arithmetic(n, seed, max_operand, split):
        a, b = row["id"].split("+")
        story = draw.choice(_STORIES).format(a=a, b=b, name=draw.choice(_NAMES), things=draw.choice(_THINGS))
        rows.append(row | {"prompt": story})
    return rows
