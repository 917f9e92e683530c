"""Equality of two answers by math-verify. Runs inside a worker process only: it may hang, exhaust memory or recurse.

math-verify's own time limits are switched off, because they need SIGALRM and the main thread; the process that started the
worker holds the limit. Answers come cleaned, so the whole string is the expression: the parser may not go looking for
another one inside it, and it may not strip units.
"""

import logging

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

_EXTRACTION = [
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )
]
_FLOAT_DECIMALS = 10  # math-verify's default of 6 takes sqrt(2) and 1.414214 for equal

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about its time limits being off


def judge(answer: str, gold: str) -> float:
    """1.0 where the two cleaned LaTeX expressions are equal, else 0.0; also 0.0 where either cannot be parsed."""
    parsed_gold, parsed_answer = _parse(gold), _parse(answer)
    if not parsed_gold or not parsed_answer:
        return 0.0
    equal = verify(
        parsed_gold,
        parsed_answer,
        float_rounding=_FLOAT_DECIMALS,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    return 1.0 if equal else 0.0


def _parse(latex: str) -> list:
    return parse(
        f"${latex}$",
        extraction_config=_EXTRACTION,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


judge("1+x", "x+1")  # builds the parser's tables now: the time limit of the first answer does not have to pay for them
