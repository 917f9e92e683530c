"""Equality of two answers by math-verify. Runs inside a worker process only: it may hang, exhaust memory or recurse.

math-verify's own time limits are switched off, because they need SIGALRM and the main thread; the process that started
the worker holds the limit. Answers come cleaned, so the whole string is the expression: the parser may not go looking
for another one inside it, and it may not strip units.

An answer that is an equation, where the ground truth is a plain value, is judged by its value: ``m+n=12`` is 12,
``5=x`` is 5. Its sides that are numbers must agree (``2+2=5`` is nothing), and an equation that is left to solve
(``2x=10``, ``x+1=5``: linear in one letter) is no value.
"""

import logging
from itertools import pairwise

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from latex2sympy2_extended.logic import And
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig
from sympy import Basic, Eq, Expr, I, Symbol
from sympy.core.relational import Relational

from dcpo_megatron.rewards.mathematics import exact_algebra

_EXTRACTION = [
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )
]

exact_algebra.install()
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about its time limits being off


def judge(answer: str, gold: str) -> float:
    """1.0 where the two cleaned LaTeX expressions are equal, else 0.0; also 0.0 where either cannot be parsed."""
    parsed_gold, parsed_answer = _parse(gold), _parse(answer)
    if not parsed_answer and answer.count("=") == 1 and "=" not in gold:  # \det A = 5
        parsed_answer = _parse(answer.partition("=")[2])
    if not parsed_gold or not parsed_answer:
        return 0.0
    if not isinstance(parsed_gold[0], Relational) and "=" in answer and "=" not in gold:
        value = _value(parsed_answer[0])
        return 1.0 if value is not None and _equal(parsed_gold, [value]) else 0.0
    return 1.0 if _equal(parsed_gold, parsed_answer) else 0.0


def _equal(gold: list, answer: list) -> bool:
    return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)


def _value(equation: Basic) -> Basic | None:
    """What an equation or a chain of equations says that something is; anything else as it is."""
    links = list(equation._unsorted_args) if isinstance(equation, And) else [equation]
    chained = all(
        first.rhs == second.lhs for first, second in pairwise(links) if isinstance(first, Eq) and isinstance(second, Eq)
    )
    if not chained or not all(isinstance(link, Eq) for link in links):
        return equation
    sides = [side for link in links for side in (link.lhs, link.rhs)]
    if isinstance(sides[-1], Symbol) and not isinstance(sides[0], Symbol):
        sides.reverse()
    value = sides[-1]
    if any(not side.free_symbols and not _equal([value], [side]) for side in sides[:-1]):
        return None
    left = sides[0]
    if len(sides) == 2 and isinstance(left, Expr) and not isinstance(left, Symbol) and len(left.free_symbols) == 1:
        letter = next(iter(left.free_symbols))
        if left.is_polynomial(letter) and left.as_poly(letter).degree() == 1:
            return None
    return _imaginary(value) if isinstance(value, Expr) else value


def _parse(latex: str) -> list:
    found = parse(
        f"${latex}$",
        extraction_config=_EXTRACTION,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    # math-verify reads the imaginary unit as a letter: \sqrt{-4} would not be 2i.
    found = [exact_algebra.without_floats(item) if hasattr(item, "atoms") else item for item in found]
    return [_imaginary(item) if isinstance(item, Expr) else item for item in found]


def _imaginary(expression: Expr) -> Expr:
    letters = [letter for letter in expression.free_symbols if letter.name == "i"]
    return expression.subs(dict.fromkeys(letters, I)) if letters else expression


judge("1+x", "x+1")  # builds the parser's tables now: the time limit of the first answer does not have to pay for them
