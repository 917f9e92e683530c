r"""Which commas part the items of a list, and which the thousands of a number.

    1,234        one number                    6,28,496         three items: 28 is no group of thousands, nor 496 then
    1,000,2,000  two numbers: no item is 000   153,370,371,407  four items: in order, all of three digits
    1,234, 5     two: the blank parts them     \{12,345\}       two items: in brackets commas part, not in TeX's braces
    12{,}345     one number

A text that could be one number is a list beside a list: ``28,496`` beside ``496, 28``, but not beside ``28496``.
"""

import re
from itertools import pairwise
from typing import NamedTuple

_TOKEN = re.compile(
    r"(?P<comma>\{,\}|,(?:\s*\\!)+\s*|,)"
    r"|(?P<open>\\\{|\\lbrace(?![A-Za-z])|[({\[])|(?P<close>\\\}|\\rbrace(?![A-Za-z])|[)}\]])|\\."
)
_BEFORE = re.compile(r"\d+\Z")
_AFTER = re.compile(r"\d+")
_BLANK_AFTER = re.compile(r"\s|~|\\[,;:> ]|\\q?quad(?![A-Za-z])")
_BLANK_BEFORE = re.compile(r"(?:\s|~|\\[,;:> ])\Z")
_ORDERED = re.compile(r"(\$?)\s*(?:[A-Za-z]\s*=\s*)?(\d{3}(?:,\d{3}){2,})\s*\1")
_WIDEST = 8  # digits looked at before a comma


class _Comma(NamedTuple):
    start: int
    end: int
    scope: int  # which pair of brackets or braces it stands in
    bracketed: bool  # that pair is more than TeX's braces
    groups: bool  # what stands around it can be the thousands of a number
    zero: bool  # and 0 is the first digit behind it
    mark: bool  # it is written as TeX writes a comma in a number
    spaced: bool
    blank: bool  # it needs one where it parts items: a digit before it and three behind look like a number


def read_commas(answer: str, gold: str) -> tuple[str, str]:
    """Both texts without the commas between thousands, and with a blank behind every comma that parts two numbers."""
    if "," not in answer and "," not in gold:
        return answer, gold
    in_answer, in_gold = _commas(answer), _commas(gold)
    answer_list, gold_list = bool(in_gold) and _ordered(answer), _ordered(gold)
    if _one_number(in_answer) and _is_list(gold, in_gold, gold_list):
        answer_list = True
    elif _one_number(in_gold) and _is_list(answer, in_answer, answer_list):
        gold_list = True
    return _settled(answer, in_answer, answer_list), _settled(gold, in_gold, gold_list)


def _commas(text: str) -> list[_Comma]:
    found: list[_Comma] = []
    scopes, count = [(0, False)], 0
    for token in _TOKEN.finditer(text):
        start, end = token.span()
        if token["open"]:
            count += 1
            scopes.append((count, token["open"] != "{"))
        elif token["close"] and len(scopes) > 1:
            scopes.pop()
        elif token["comma"]:
            left, right = _BEFORE.search(text, max(0, start - _WIDEST), start), _AFTER.match(text, end)
            blank = left is not None and right is not None and len(right[0]) == 3
            groups = zero = False
            if blank:
                inside = bool(found) and found[-1].groups and found[-1].end == left.start()
                first = left[0][0] != "0" and text[max(0, left.start() - 1) : left.start()] not in (".", "_", "^")
                groups = len(left[0]) == 3 if inside else len(left[0]) <= 3 and first
                zero = groups and right[0][0] == "0"
            spaced = bool(_BLANK_AFTER.match(text, end) or _BLANK_BEFORE.search(text, max(0, start - 2), start))
            mark = token["comma"] != ","
            found.append(_Comma(start, end, *scopes[-1], groups, zero, mark, spaced, blank))
    return found


def _ordered(text: str) -> bool:
    """Three or more groups of three digits that ascend: a list sooner than a number. But 123,456,789 is a number."""
    match = _ORDERED.fullmatch(text.strip())
    if match is None or match[2] == "123,456,789":
        return False
    groups = match[2].split(",")
    return groups[0][0] != "0" and all(a < b for a, b in pairwise(groups))


def _one_number(commas: list[_Comma]) -> bool:
    return bool(commas) and all(c.groups and not (c.zero or c.mark or c.bracketed) for c in commas)


def _is_list(text: str, commas: list[_Comma], ordered: bool) -> bool:
    """A bare list or a set. A pair, a point and an interval have an order, and say nothing of a bare text."""
    if text.lstrip(" $").startswith(("(", "[", r"\left(", r"\left[")):
        return False
    return ordered or any(not c.groups or (c.bracketed and not c.mark) for c in commas)


def _settled(text: str, commas: list[_Comma], as_list: bool) -> str:
    tight = {(c.scope, c.mark) for c in commas if not c.groups and not c.spaced}
    loose = {c.scope for c in commas if not c.groups and c.spaced}
    pieces, done = [], 0
    for comma in commas:
        pieces.append(text[done : comma.start])
        done = comma.end
        beside = (comma.scope, comma.mark) in tight
        parts = beside or (not comma.mark and (as_list or (comma.bracketed and comma.scope not in loose)))
        if comma.groups and (comma.zero or not parts):
            continue
        pieces.append(", " if comma.blank else text[comma.start : comma.end])
    return "".join((*pieces, text[done:]))
