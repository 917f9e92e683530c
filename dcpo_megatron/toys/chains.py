r"""Chains of arithmetic such as "37+48-5=", with worked steps: a task of mixed difficulty for comparing methods.

    prompt    37+48-5=
    worked    37+48=85;85-5=80;\boxed{80}        one step an operation, from left to right
    direct    \boxed{80}                         all of it in the head

A problem draws its number of terms and the digits of each operand, so one set holds problems from "3+5=" to whatever
the largest draw gives: a model that is right on some is wrong on others. Longer chains have longer responses. More
terms, more digits and ``*`` make it as hard as any model needs.

The held-out tenth is decided by the problem alone, whatever the order of its terms: not by the seed, nor by how many
problems are made.
"""

import random
import zlib
from dataclasses import dataclass

CHARACTERS = "0123456789+-*=;}"  # of problems and worked steps, beside the opening of the box
_HELD_OUT_ONE_IN = 10
_TRIES = 200  # draws for one new problem, before the set counts as used up


@dataclass(frozen=True)
class ChainTask:
    """What a problem draws from. ``terms`` and ``digits``: smallest and largest, each equally likely.

    ``operations``: of "+", "-" and "*". A product comes first only, so that left to right is the usual order; a
    difference is never below 0. ``question``: the prompt, with CHAIN for the expression.
    Raises ValueError for ranges or operations that make no problem.
    """

    terms: tuple[int, int] = (2, 4)
    digits: tuple[int, int] = (1, 2)
    operations: str = "+-"
    question: str = "CHAIN="

    def __post_init__(self) -> None:
        for name, (low, high), least, most in (("terms", self.terms, 2, 50), ("digits", self.digits, 1, 30)):
            if not least <= low <= high <= most:
                raise ValueError(f"{name} is {low} to {high}: it must rise within {least} to {most}")
        if not self.operations or set(self.operations) - set("+-*"):
            raise ValueError(f"operations is {self.operations!r}: it must be one or more of + - *")
        if set(self.operations) == {"*"} and self.terms[1] > 2:
            raise ValueError("operations is '*' alone, and a product has two terms here: add + or -, or set terms to 2")
        if "CHAIN" not in self.question:
            raise ValueError(f"question is {self.question!r}: it must hold CHAIN, the place of the expression")


def make_chains(n: int, seed: int, task: ChainTask | None = None, split: str = "train") -> list[dict[str, str]]:
    r"""``n`` distinct problems, drawn by ``seed``: rows ``{"id": "37+48-5", "prompt": "37+48-5=", "answer": "80",
    "worked": "37+48=85;85-5=80;\boxed{80}"}``.

    ``split`` is "train" or "held_out". Raises ValueError where the task has fewer problems, as far as drawing can tell.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}: it must be train or held_out")
    task = task or ChainTask()
    draw = random.Random(f"{seed}/{split}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        for _ in range(_TRIES * _HELD_OUT_ONE_IN):
            row, held_out = _problem(draw, task)
            if row["id"] not in rows and held_out == (split == "held_out"):
                rows[row["id"]] = row
                break
        else:
            raise ValueError(
                f"{n} problems were asked for, and {split} has hardly more than {len(rows)}: raise terms or digits"
            )
    return list(rows.values())


def _problem(draw: random.Random, task: ChainTask) -> tuple[dict[str, str], bool]:
    terms = draw.randint(*task.terms)
    value = _operand(draw, task)
    expression, steps, signed = str(value), [], [str(value)]
    for place in range(1, terms):
        operand = _operand(draw, task)
        sign = draw.choice([s for s in task.operations if s != "*" or place == 1] or ["+"])
        if sign == "-" and operand > value:
            # The other way round where a difference may begin the chain; else a sum, also where only "-" was asked for.
            sign = "+"
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        steps.append(f"{value}{sign}{operand}={result}")
        expression += f"{sign}{operand}"
        signed.append(f"{sign}{operand}")
        value = result
    signed[0] = ("*" if signed[1].startswith("*") else "+") + signed[0]
    row = {
        "id": expression,
        "prompt": task.question.replace("CHAIN", expression),
        "answer": str(value),
        "worked": ";".join([*steps, f"\\boxed{{{value}}}"]),
    }
    return row, zlib.crc32("".join(sorted(signed)).encode()) % _HELD_OUT_ONE_IN == 0


def _operand(draw: random.Random, task: ChainTask) -> int:
    digits = draw.randint(*task.digits)
    return draw.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)
