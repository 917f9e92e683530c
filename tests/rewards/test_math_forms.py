"""Equal in another form is right, a near miss is wrong: a list of pairs by hand, and pairs made by rule, category by
category, from a seed."""

import random
from fractions import Fraction
from pathlib import Path

import pytest

from dcpo_megatron.rewards import math_reward, math_reward_batch

HERE = Path(__file__).parent
Pair = tuple[str, str]


def misjudged(pairs: list[Pair], reward: float) -> list[Pair]:
    rewards = math_reward_batch(
        [f"So it is $\\boxed{{{answer}}}$." for answer, _ in pairs],
        [g for _, g in pairs],
        workers=2,
        timeout_seconds=60,
    )
    return [pair for pair, found in zip(pairs, rewards, strict=True) if found != reward]


def listed(name: str) -> list[Pair]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("name", "reward", "at_least"), [("equal.tsv", 1.0, 600), ("unequal.tsv", 0.0, 400)])
def test_listed_pairs(name, reward, at_least):
    pairs = listed(name)
    assert len(pairs) > at_least
    assert misjudged(pairs, reward) == []


def fractions(draw):
    a, b = draw.randint(1, 30), draw.choice([7, 11, 13])
    forms = [
        f"\\frac{{{a}}}{{{b}}}",
        f"{a}/{b}",
        f"\\dfrac{{{a}}}{{{b}}}",
        f"\\frac{{{2 * a}}}{{{2 * b}}}",
        f"\\left(\\frac{{{a}}}{{{b}}}\\right)",
        f"\\tfrac {{{a}}} {{{b}}}",
    ]
    gold = draw.choice(forms)
    near = [f"\\frac{{{a + 1}}}{{{b}}}", f"-{forms[0]}", f"{a}.{b}", f"{a / b:.4f}"] + [f"\\frac{{{b}}}{{{a}}}"] * (
        a != b
    )
    if a % b == 0:
        near.remove(f"{a / b:.4f}")
    return [(form, gold) for form in forms], [(form, gold) for form in near]


def mixed_numbers(draw):
    whole, below = draw.randint(2, 9), draw.randint(2, 9)
    gold = f"\\frac{{{whole * below + 1}}}{{{below}}}"
    equal = [f"{whole}\\frac{{1}}{{{below}}}", f"{whole} 1/{below}", f"{whole} \\frac1{below}"]
    return [(form, gold) for form in equal], [
        (f"{whole}\\frac{{2}}{{{below}}}", gold),
        (f"\\frac{{{whole}}}{{{below}}}", gold),
    ]


def thousands(draw):
    n = draw.randint(1000, 10**8)
    commas = f"{n:,}"
    equal = [
        commas,
        commas.replace(",", "{,}"),
        commas.replace(",", "\\,"),
        commas.replace(",", ",\\!"),
        f"\\${commas}",
        f"{commas}.00",
        f"{commas} \\text{{ people}}",
    ]
    return [(form, str(n)) for form in equal], [(form, str(n)) for form in (f"{n + 1:,}", commas[:-1], commas + "0")]


def powers_of_ten(draw):
    tenths, power = draw.choice([11, 25, 37, 49, 81]), draw.randint(-6, 9)
    value = Fraction(tenths, 10) * Fraction(10) ** power
    gold = str(value.numerator) if value.denominator == 1 else f"{float(value):.12f}".rstrip("0")
    equal = [f"{tenths / 10} \\times 10^{{{power}}}", f"{tenths / 10}e{power}", f"{tenths / 10} \\cdot 10^{{{power}}}"]
    return [(form, gold) for form in equal], [
        (f"{tenths / 10} \\times 10^{{{power + 1}}}", gold),
        (f"{tenths / 10}e{power - 1}", gold),
    ]


def percents(draw):
    p = draw.randint(2, 99)
    equal = [
        (f"{p}\\%", str(p)),
        (str(p / 100), f"{p}\\%"),
        (f"\\frac{{{p}}}{{100}}", f"{p}\\%"),
        (f"{p} percent", f"{p}\\%"),
    ]
    return equal, [(f"{p + 1}\\%", f"{p}\\%"), (f"{10 * p}\\%", f"{p}\\%"), (str(p / 1000), f"{p}\\%")]


def degrees(draw):
    d = draw.randint(1, 359)
    equal = [f"{d}", f"{d}^\\circ", f"{d}^{{\\circ}}", f"{d} \\text{{ degrees}}", f"{d}°", f"\\frac{{{d}\\pi}}{{180}}"]
    return [(form, f"{d}^\\circ") for form in equal], [
        (form, f"{d}^\\circ") for form in (f"{d + 1}^\\circ", f"-{d}^\\circ")
    ]


def units(draw):
    h = draw.randint(2, 40)
    cm = f"{h} \\text{{ cm}}"
    equal = [
        (cm, str(h)),
        (str(h), cm),
        (cm, f"{h}\\text{{ centimeters}}"),
        (f"{h} \\text{{ m}}", f"{100 * h}\\text{{ cm}}"),
        (f"{h} \\text{{ hours}}", f"{60 * h} \\text{{ minutes}}"),
        (f"{h}\\,\\text{{cm}}^2", f"{h} \\text{{ square centimeters}}"),
    ]
    near = [
        (cm, f"{h} \\text{{ m}}"),
        (cm, f"{h} \\text{{ kg}}"),
        (f"{cm}^2", f"{cm}^3"),
        (cm, f"{cm}^2"),
        (f"{h} \\text{{ cents}}", f"{h} \\text{{ dollars}}"),
    ]
    return equal, near


def intervals(draw):
    low, high = sorted(draw.sample(range(-20, 20), 2))
    equal, near = [], []
    for left, right in ("()", "(]", "[)", "[]"):
        gold = f"{left}{low},{high}{right}"
        condition = (
            f"{low} {'<' if left == '(' else chr(92) + 'le'} x {'<' if right == ')' else chr(92) + 'leq'} {high}"
        )
        equal += [
            (f"\\left{left} {low}, {high} \\right{right}", gold),
            (condition, gold),
            (gold, condition),
            (f"x \\in {gold}", gold),
        ]
        others = [o for o in ("()", "(]", "[)", "[]") if o != left + right]
        near += [(f"{o[0]}{low},{high}{o[1]}", gold) for o in others] + [
            (condition, f"{o[0]}{low},{high}{o[1]}") for o in others
        ]
        near += [
            (f"{left}{low},{high + 1}{right}", gold),
            (f"{left}{high},{low}{right}", gold),
            (f"\\{{{low},{high}\\}}", gold),
        ]
    equal.append((f"x<{low} \\text{{ or }} x>{high}", f"(-\\infty,{low})\\cup({high},\\infty)"))
    near.append((f"x<{low} \\text{{ or }} x \\ge {high}", f"(-\\infty,{low})\\cup({high},\\infty)"))
    return equal, near


def joined(values, brackets=("", "")):
    return brackets[0] + ", ".join(map(str, values)) + brackets[1]


def as_set(values):
    return joined(values, ("\\{", "\\}"))


def as_tuple(values):
    return joined(values, "()")


def collections(draw):
    items = draw.sample(range(-20, 20), draw.randint(2, 4))
    other = draw.sample(items, len(items))
    equal = [
        (as_set(other), as_set(items)),
        (joined(other), joined(items)),
        (as_set(other), joined(items)),
        (joined(other), as_set(items)),
        (" \\text{ and } ".join(map(str, other)), joined(items)),
        (", ".join(f"x={v}" for v in other), joined(items)),
        (as_tuple([f"\\frac{{{2 * v}}}{{2}}" for v in items]), as_tuple(items)),
    ]
    near = [
        (as_set(other[:-1]), as_set(items)),
        (joined([*other, 99]), joined(items)),
        (joined(other[:-1]), joined(items)),
        (as_set([other[0] + 50, *other[1:]]), as_set(items)),
        (as_set(items), as_tuple(items)),
        (as_tuple(items), as_set(items)),
        (as_tuple([*items[:-1], 77]), as_tuple(items)),
    ]
    if other != items:
        near.append((as_tuple(other), as_tuple(items)))
    if len(items) == 2:
        equal.append((f"x={items[0]}, y={items[1]}", as_tuple(items)))
        near.append((f"x={items[1]}, y={items[0]}", as_tuple(items)))
    return equal, near


def roots_and_signs(draw):
    c, s = draw.randint(2, 9), draw.choice([3, 5, 7, 11])
    gold = f"{c}\\sqrt{{{s}}}"
    both = f"{c}\\pm\\sqrt{{{s}}}"
    equal = [
        (f"\\sqrt{{{c * c * s}}}", gold),
        (f"{c} \\cdot \\sqrt{s if s < 10 else '{11}'}", gold),
        (f"\\frac{{{c * s}}}{{\\sqrt{{{s}}}}}", gold),
        (f"x={both}", both),
        (f"{c}+\\sqrt{{{s}}}, {c}-\\sqrt{{{s}}}", both),
    ]
    near = [
        (f"\\sqrt{{{c * c * s + 1}}}", gold),
        (f"{(c * c * s) ** 0.5:.5f}", gold),
        (f"-{gold}", gold),
        (f"{c}+\\sqrt{{{s}}}", both),
    ]
    return equal, near


def matrix(rows, kind="p"):
    return (
        f"\\begin{{{kind}matrix}}" + r" \\ ".join(" & ".join(map(str, row)) for row in rows) + f"\\end{{{kind}matrix}}"
    )


def matrices(draw):
    rows = [[draw.randint(1, 9), 10], [20, draw.randint(1, 9)]]
    transposed = [list(column) for column in zip(*rows, strict=True)]
    return [(matrix(rows, "b"), matrix(rows))], [
        (matrix(transposed), matrix(rows)),
        (matrix([[0, 10], rows[1]]), matrix(rows)),
        (matrix(rows[:1]), matrix(rows)),
    ]


def equations(draw):
    k, q = draw.randint(2, 9), draw.randint(1, 9)
    line = f"y={k}x+{q}"
    equal = [
        (line, f"{k}x+{q}"),
        (f"{k}x-y+{q}=0", line),
        (f"{k}x+{q}=y", line),
        (f"f(x)={q}+{k}x", f"{k}x+{q}"),
        (f"n = {q}", str(q)),
        (f"m+n={q}", str(q)),
        (f"(x+{k})(x+{q})", f"x^2+{k + q}x+{k * q}"),
    ]
    near = [
        (f"y={k}x-{q}", line),
        (f"y={k + 1}x+{q}", f"{k}x+{q}"),
        (f"x={k}y+{q}", line),
        (f"y={q}", f"x={q}"),
        (f"{k}x={q}", str(q)),
        (f"x+{k}={q}", str(q)),
        (f"{k}+{k}={2 * k + 1}", str(2 * k + 1)),
    ]
    return equal, near


CATEGORIES = [
    fractions,
    mixed_numbers,
    thousands,
    powers_of_ten,
    percents,
    degrees,
    units,
    intervals,
    collections,
    roots_and_signs,
    matrices,
    equations,
]


@pytest.mark.parametrize("category", CATEGORIES)
def test_pairs_made_by_rule(category):
    draw = random.Random(category.__name__)
    made = [category(draw) for _ in range(6)]
    assert misjudged(list(dict.fromkeys(pair for equal, _ in made for pair in equal)), 1.0) == []
    assert misjudged(list(dict.fromkeys(pair for _, near in made for pair in near)), 0.0) == []


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"First \boxed{3}. Then, corrected: \boxed{5}.", "5", 1.0),
        (r"First \boxed{5}. Then, corrected: \boxed{3}.", "5", 0.0),
        (r"$x=\boxed{2}$ or $x=\boxed{3}$", "2,3", 0.0),  # "x=" stands between: the last box alone
        (r"\boxed{2} and \boxed{3}", "2,3", 1.0),
        (r"$\boxed{3}$, $\boxed{2}$", r"\{2,3\}", 1.0),
        (r"It is \boxed{4} or \boxed{5}.", "5", 0.0),
        (r"\boxed{5}, \boxed{5}", "5", 1.0),
        (r"\boxed{5} \boxed{", "5", 1.0),
        ("the answer is 5", "5", -1.0),
        (r"\boxed{5", "5", -1.0),
    ],
)
def test_the_last_box_counts_and_joined_boxes_are_a_list(response, gold, reward):
    assert math_reward(response, gold) == reward
