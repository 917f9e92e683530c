r"""Two answers in one form: what depends on both sides, after each has its settled spelling.

    gold has no "="      x = 2, x = 3           ->  2,3
    gold has no modulus  17 \pmod{20}           ->  17
    two signs in one     \frac{1\pm\sqrt5}{2}   ->  the list of both
    gold has a \pi       90 with a degree sign  ->  \frac{90\pi}{180}
    gold is a union      x<1 or x>2             ->  (-\infty,1)\cup(2,\infty)
    gold is a point      A(1,2)                 ->  (1,2)

and the same with the sides exchanged.
"""

import re

from dcpo_megatron.rewards.mathematics.intervals import as_intervals, has_condition
from dcpo_megatron.rewards.mathematics.normalise import number_word
from dcpo_megatron.rewards.mathematics.numbers import read_number

_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?\s*=\s*([^=<>]+)")
_OR = re.compile(r"\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_MODULUS = re.compile(r" ?\(? ?\\pmod\{\w+\} ?\)?$")
_NAMED_POINT = re.compile(r"^[A-Z]\s*(?=\()")


def align(answer: str, gold: str, answer_in_degrees: bool, gold_in_degrees: bool) -> tuple[str, str]:
    """Both cleaned answers in one form where the module's text knows one; else as they are."""
    answer, gold = number_word(answer) or answer, number_word(gold) or gold
    if "=" not in gold:
        answer = _values(answer)
    elif "=" not in answer:
        gold = _values(gold)
    if r"\pmod" not in gold:
        answer = _MODULUS.sub("", answer)
    elif r"\pmod" not in answer:
        gold = _MODULUS.sub("", gold)
    if answer.endswith(")") and gold.startswith("("):
        answer = _NAMED_POINT.sub("", answer)
    if answer_in_degrees and not gold_in_degrees and r"\pi" in gold and read_number(answer) is not None:
        answer = rf"\frac{{{answer}\pi}}{{180}}"
    if gold_in_degrees and not answer_in_degrees and r"\pi" in answer and read_number(gold) is not None:
        gold = rf"\frac{{{gold}\pi}}{{180}}"
    return _as_intervals(_both_signs(answer), _both_signs(gold))


def _values(text: str) -> str:
    """``x=2, x=3`` without the letter, where it is one letter; values of several letters stay with them."""
    items = [part for piece in _OR.split(text) for part in top_level_items(piece)] if text.count("=") > 1 else [text]
    found = [_ASSIGNMENT.fullmatch(item) for item in items]
    if not all(found) or len({match[1] for match in found}) != 1:
        return text
    return ",".join(match[2].strip() for match in found)


def top_level_items(text: str) -> list[str]:
    """The parts of a text between the commas that stand in no bracket."""
    items, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    return [item for item in (*items, text[start:]) if item.strip()]


def _both_signs(text: str) -> str:
    r"""Every item with ``\pm`` as two."""
    if r"\pm" not in text or "=" in text or text.startswith(("(", "[", "\\{", "|")):
        return text
    items = []
    for item in top_level_items(text):
        if _PLUS_MINUS.search(item):
            items.append(_PLUS_MINUS.sub("+", item).replace(r"\mp", "-"))
            items.append(_PLUS_MINUS.sub("-", item).replace(r"\mp", "+"))
        else:
            items.append(item)
    return ",".join(items)


def _as_intervals(answer: str, gold: str) -> tuple[str, str]:
    """Both as unions of intervals where one is a condition and the other can be such a union, too."""
    if not (has_condition(answer) or has_condition(gold) or "\\mathbb" in gold + answer or "real" in gold + answer):
        return answer, gold
    found_answer, found_gold = as_intervals(answer), as_intervals(gold)
    letters = {found[0] for found in (found_answer, found_gold) if found is not None}
    if len(letters - {""}) > 1:
        return answer, gold
    return (found_answer[1] if found_answer else answer), (found_gold[1] if found_gold else gold)
