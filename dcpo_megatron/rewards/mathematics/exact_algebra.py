r"""Equality of two SymPy expressions without a tolerance, in the place of math-verify's own comparison of numbers.

math-verify rounds decimals and takes a difference below about 1e-15 for zero, so that ``\frac{1}{2^{60}}`` would be
``\frac{1}{2^{59}}``. Here

    a - b without letters: rational -> exact; else evaluated with as many digits as it takes to see that it is not zero,
                           at most so many that a difference of expressions of this size would have shown
    a - b with letters:    expanded, and the constants in front of each product of letters together are zero

The first digit of an algebraic number that is not zero stands no farther behind the point than a distance that grows
with the numbers it is made of; the limit of digits grows with them, several times as fast. Where the limit would pass
``_MOST_DIGITS``, the two are not equal unless SymPy's rules prove it.
"""

from math_verify import grader
from sympy import (
    Add,
    Basic,
    Expr,
    Float,
    MatrixBase,
    Mul,
    Number,
    Rational,
    UnevaluatedExpr,
    expand,
    log,
    nan,
    oo,
    preorder_traversal,
    zoo,
)

_LEAST_DIGITS = 100
_DIGITS_A_DIGIT = 6  # of the limit, for every digit of the numbers inside
_MOST_DIGITS = 30_000
_PERCENT = UnevaluatedExpr(Rational(1, 100))


def install() -> None:
    """Makes math-verify compare by this module, in this process. Raises RuntimeError where it compares by others."""
    for name in ("sympy_numeric_eq", "sympy_symbolic_eq", "sympy_solve_and_compare"):
        if not callable(getattr(grader, name, None)):
            raise RuntimeError(
                f"math_verify.grader has no {name}: this math-verify compares in a way that is not known"
            )
    simplified, solved = grader.sympy_symbolic_eq, grader.sympy_solve_and_compare

    def numeric(a, b, float_rounding, numeric_precision):
        return equal(a, b)

    def symbolic(a, b):
        return not _differ_at_a_point(a, b) and simplified(a, b)

    def solutions(gold, answer, float_rounding, numeric_precision):  # no solution, twice, says nothing of the equations
        return solved(gold, answer, float_rounding, numeric_precision) and bool(grader.solve(gold, gold.free_symbols))

    grader.sympy_numeric_eq, grader.sympy_symbolic_eq, grader.sympy_solve_and_compare = numeric, symbolic, solutions


def without_floats(expression: Basic | MatrixBase) -> Basic | MatrixBase:
    """The same with every decimal as the fraction that it was written as."""
    floats = {number: Rational(str(number)) for number in expression.atoms(Float) if number.is_finite}
    return expression.xreplace(floats) if floats else expression


def equal(a: Basic | MatrixBase, b: Basic | MatrixBase) -> bool:
    """Whether two expressions, or two matrices entry by entry, are the same; ``50%`` is 50 and 0.5. False if
    unknown."""
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        a, b = a.doit(), b.doit()
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase)) or a.shape != b.shape:
            return False
        return all(equal(x, y) or grader.sympy_symbolic_eq(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    if _of_percent(a) is not None and _of_percent(b) is None and equal(_of_percent(a), b):
        return True
    if _of_percent(b) is not None and _of_percent(a) is None and equal(a, _of_percent(b)):
        return True
    difference = a.doit() - b.doit()
    letters = difference.free_symbols
    if not letters:
        return is_zero(difference)
    factors: dict[Expr, list[Expr]] = {}
    for term in Add.make_args(expand(difference)):
        factor, product = term.as_independent(*letters, as_Add=False)
        factors.setdefault(product, []).append(factor)
    return all(is_zero(Add(*found)) for found in factors.values())


def is_zero(number: Expr) -> bool:
    """Whether an expression without letters is zero."""
    if isinstance(number, Rational):
        return number == 0
    if _shows(number, _LEAST_DIGITS) is not False:
        return False
    digits = _LEAST_DIGITS + _DIGITS_A_DIGIT * _size(number)
    if digits > _MOST_DIGITS:
        return False
    return _shows(number, digits) is False


def _shows(number: Expr, digits: int) -> bool | None:
    """Whether ``digits`` digits of the terms leave one of the sum; None where it has no value."""
    value = number.evalf(2, maxn=digits)
    parts = value.as_real_imag()
    if not all(isinstance(part, Number) for part in parts) or value.has(nan, oo, -oo, zoo):
        return None
    # Of a part without one certain digit SymPy says that its precision is 1.
    return any(part != 0 and getattr(part, "_prec", 2) > 1 for part in parts)


def _size(number: Expr) -> int:
    """The decimal digits of the numbers that an expression holds, and of the values on the way."""
    size = 0
    for part in preorder_traversal(number):
        if isinstance(part, Rational):
            size += (abs(part.p).bit_length() + part.q.bit_length()) // 3 + 1
        elif isinstance(part, Expr):
            power = log(abs(part.evalf(2, maxn=_LEAST_DIGITS))).evalf(2)
            size += abs(int(power)) if power.is_finite and power.is_comparable else 1
        if size > _MOST_DIGITS:
            break
    return size


def _differ_at_a_point(a: Basic | MatrixBase, b: Basic | MatrixBase) -> bool:
    """Whether two expressions have other values where their letters are some positive fractions, or have no letters.

    Simplifying takes long, and most answers are wrong.
    """
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {letter: Rational(1009 + 334 * number, 997) for number, letter in enumerate(letters)}
    try:
        difference = a.doit().subs(point) - b.doit().subs(point)
        return not difference.free_symbols and bool(_shows(difference, _LEAST_DIGITS))
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        return False


def _of_percent(expression: Expr) -> Expr | None:
    """What stands before the percent sign: math-verify reads ``9%`` as 9 times a hundredth that is not evaluated."""
    if not isinstance(expression, Mul) or len(expression.args) != 2 or expression.args[1] != _PERCENT:
        return None
    return expression.args[0] if isinstance(expression.args[0], Number) else None
