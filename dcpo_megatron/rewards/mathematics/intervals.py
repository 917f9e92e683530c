r"""Conditions on one letter as intervals: ``0 < x \le 1`` is ``(0,1]``, ``x<1 \text{ or } x>2`` is
``(-\infty,1)\cup(2,\infty)``.

Works on cleaned answers. Ends are copied, not computed: whether ``(0,\frac{2}{2}]`` is ``(0,1]`` is left to those who
can.
"""

import re

_OR = re.compile(r"\\text\{\s*(?:,\s*)?or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_AND = re.compile(r"\\text\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![A-Za-z])|,")
_REALS = r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])|\\Reals(?![A-Za-z])|\\text\{\s*R\s*\}"
_ALL_REALS = re.compile(rf"{_REALS}|(?:\\text\{{)?\s*all real(?:s| numbers)\s*\}}?|\(-\\infty,\s*\+?\\infty\)")
_BUILDER = re.compile(
    rf"\\\{{\s*([A-Za-z])\s*(?:\\in\s*(?:{_REALS})\s*)?(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:|,)(.*)\\\}}",
    re.DOTALL,
)
_RELATION = re.compile(r"\\(?:le|ge|lt|gt|neq?)(?![A-Za-z])|[<>]")
_SPELLED = {r"\lt": "<", r"\gt": ">", r"\neq": r"\ne"}
_UP, _DOWN = ("<", r"\le"), (">", r"\ge")
EVERYTHING = r"(-\infty,\infty)"


def has_condition(text: str) -> bool:
    """Whether a cleaned answer compares anything."""
    return _RELATION.search(text) is not None


def as_intervals(text: str) -> tuple[str, str] | None:
    r"""The letter and the union of intervals that a cleaned answer states, with the letter "" for ``\mathbb{R}``; None
    where it states no such thing."""
    if _ALL_REALS.fullmatch(text.strip()):
        return "", EVERYTHING
    built = _BUILDER.fullmatch(text.strip())
    if built is not None:
        text = built[2]
    parts = [_all_of([_one(piece.strip()) for piece in _AND.split(part.strip(" ,"))]) for part in _OR.split(text)]
    if None in parts or len({letter for letter, _ in parts}) != 1:
        return None
    letter = parts[0][0]
    if built is not None and letter != built[1]:
        return None
    return letter, r"\cup".join(interval for _, interval in parts)


def _all_of(found: list[tuple[str, str] | None]) -> tuple[str, str] | None:
    """A lower and an upper bound as one interval; other conditions are not put together."""
    if len(found) == 1:
        return found[0]
    if len(found) != 2 or None in found or found[0][0] != found[1][0]:
        return None
    above = [interval for _, interval in found if interval.endswith(r",\infty)") and r"\cup" not in interval]
    below = [interval for _, interval in found if interval.startswith(r"(-\infty,") and r"\cup" not in interval]
    if len(above) != 1 or len(below) != 1:
        return None
    return found[0][0], above[0].removesuffix(r"\infty)") + below[0].removeprefix(r"(-\infty,")


def _one(text: str) -> tuple[str, str] | None:
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    relations = [_SPELLED.get(found, found) for found in _RELATION.findall(text)]
    if not relations or not all(pieces) or any("," in piece or "=" in piece for piece in pieces):
        return None
    letters = [number for number, piece in enumerate(pieces) if re.fullmatch(r"[A-Za-z]", piece)]
    if len(pieces) == 2 and len(letters) == 1:
        (relation,), place = relations, letters[0]
        end = pieces[1 - place]
        if re.search(rf"(?<![A-Za-z\\]){pieces[place]}(?![A-Za-z])", end):
            return None
        if relation == r"\ne":
            return pieces[place], rf"(-\infty,{end})\cup({end},\infty)"
        below = (relation in _UP) == (place == 0)
        closed = relation in (r"\le", r"\ge")
        if below:
            return pieces[place], rf"(-\infty,{end}" + ("]" if closed else ")")
        return pieces[place], ("[" if closed else "(") + rf"{end},\infty)"
    if len(pieces) == 3 and letters == [1]:
        low, letter, high = pieces
        first, second = relations
        if first in _DOWN and second in _DOWN:
            low, high, first, second = high, low, second, first
        elif not (first in _UP and second in _UP):
            return None
        opening = "[" if first in (r"\le", r"\ge") else "("
        closing = "]" if second in (r"\le", r"\ge") else ")"
        if high in (r"\infty", r"+\infty"):
            high = r"\infty"
        return letter, f"{opening}{low},{high}{closing}"
    return None
