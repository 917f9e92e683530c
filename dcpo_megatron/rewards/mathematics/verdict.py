"""The part of the judgement that needs no computer algebra, and therefore no other process.

``quick_verdict`` knows when it knows: True and False are final, None hands the pair on to math-verify. It also holds
the rules where math-verify is too lenient for a reward: ordered against unordered, open against closed, number bases,
and arithmetic left undone: where the ground truth is a plain number, ``12+5`` is not yet 17. Else copying a calculation
out of the question would be a right answer. Powers, roots, logarithms and binomials of numbers (``2^{10}``) are final
answers, and so is a sum that states its value (``12+5=17``).
"""

import re
from typing import NamedTuple

from dcpo_megatron.rewards.mathematics.align import align
from dcpo_megatron.rewards.mathematics.commas import read_commas
from dcpo_megatron.rewards.mathematics.normalise import brackets, clean, in_degrees, key, unit_of, word, word_list
from dcpo_megatron.rewards.mathematics.numbers import read_based, read_number
from dcpo_megatron.rewards.mathematics.scripts import fold
from dcpo_megatron.rewards.mathematics.units import same_quantity

MAX_LENGTH = 2000  # characters; a longer answer is compared as a string only

_NOTHING = frozenset(("nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset"))
_CLOCK = re.compile(r"\d{1,2}:\d\d(?:\s*\\text\{ ?[ap]m\})?")
_CHOICE = re.compile(r"(?:\\text\{)?\(?([A-J])\)?\.?\}?")
_CHOICE_WITH_VALUE = re.compile(r"(?:\\text\{)?(?:\(([A-J])\)|([A-J])[):.])\s*\}?\s*\S")
_ITEM_BREAK = re.compile(r",|;|\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
# Also "12(5)", which math-verify adds.
_UNDONE = re.compile(r"[\w)\]}!%]\s*(?:[+*-]|\\(?:cdot|times|div)(?![A-Za-z]))|(?:(?<!_)\d|\))\s*\(\s*[+-]?\.?\d")
_TWO_NUMBERS = re.compile(r"(?<![_^\d.])\d+(?:\.\d+)?\s+\d")  # but not \log_2 8


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether the extracted answer equals the ground truth (both LaTeX, without the box); None where this cannot
    tell."""
    return settle(answer, gold).equal


class Settled(NamedTuple):
    """``equal``: the verdict, None where only algebra can tell; then ``answer`` and ``gold`` are the LaTeX to
    compare."""

    equal: bool | None
    answer: str = ""
    gold: str = ""


def settle(answer: str, gold: str) -> Settled:
    """See ``quick_verdict``; with the two expressions in the spelling in which they are left to algebra."""
    if key(answer) == key(gold):
        return Settled(bool(gold.strip()))
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return Settled(False)
    answer, gold = fold(answer), fold(gold)
    if "," in answer and "," in gold and key(clean(answer)) == key(clean(gold)):
        return Settled(True)  # one text, whatever its commas mean
    answer, gold = read_commas(answer, gold)
    by_number = _number_verdict(answer.strip(), gold.strip())  # most answers are plain integers: save them the cleaning
    if by_number is not None:
        return Settled(by_number)
    raw_answer, raw_gold = answer, gold
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold:
        return Settled(False)
    by_unit = _unit_verdict(raw_answer, raw_gold, answer, gold)
    if by_unit is not None:
        return Settled(by_unit)
    answer, gold = align(answer, gold, in_degrees(raw_answer), in_degrees(raw_gold))
    return Settled(_verdict(answer, gold), answer, gold)


def _verdict(answer: str, gold: str) -> bool | None:
    if key(answer) == key(gold):
        return True
    by_number = _number_verdict(answer, gold)
    if by_number is not None:
        return by_number
    if read_number(gold) is not None and _left_undone(answer):
        return False
    answer_word, gold_word = word(answer), word(gold)
    if answer_word is not None and gold_word is not None and answer_word[0] == gold_word[0]:
        return True
    answer_words, gold_words = word_list(answer), word_list(gold)
    if answer_words is not None and gold_words is not None and (r"\text" in answer + gold or not gold.isascii()):
        return answer_words == gold_words
    if answer_word is not None and gold_word is not None and (answer_word[1] or gold_word[1]):
        return False
    if gold == r"\emptyset" and answer_word is not None:
        return answer_word[0] in _NOTHING
    if answer == r"\emptyset" and gold_word is not None:
        return gold_word[0] in _NOTHING
    if _CHOICE.fullmatch(gold):
        named = _CHOICE_WITH_VALUE.match(answer)
        if named is not None:
            return (named[1] or named[2]) == _CHOICE.fullmatch(gold)[1]
    if _CLOCK.fullmatch(answer) and _CLOCK.fullmatch(gold):  # math-verify reads 10:30 as a third
        return key(answer) == key(gold)
    if _TWO_NUMBERS.search(answer):  # math-verify multiplies or adds the two
        return False
    if not _same_count(answer, gold):
        return False
    based = _based_verdict(answer, gold)
    return based if based is not None else _bracket_verdict(answer, gold)


def _left_undone(answer: str) -> bool:
    """Whether an answer is arithmetic whose value it does not state."""
    sides = [side.strip() for side in answer.split("=")]
    if any(read_number(side) for side in sides):
        return False
    value = sides[-1] if any(letter.isdigit() for letter in sides[-1]) else sides[0]
    return _UNDONE.search(value) is not None


def _unit_verdict(raw_answer: str, raw_gold: str, answer: str, gold: str) -> bool | None:
    """False where both sides are written with units that measure different things, or with other units and no equal
    numbers; None: units decide nothing."""
    answer_unit, gold_unit = unit_of(raw_answer), unit_of(raw_gold)
    if answer_unit is None or gold_unit is None or answer_unit == gold_unit:
        return None
    kinds = {kind for unit in (answer_unit, gold_unit) for kind, _ in unit.dimensions}
    if "angle" in kinds and kinds & {"celsius", "fahrenheit"}:  # the letter left out
        return None
    factor = same_quantity(answer_unit, gold_unit)
    answer_number, gold_number = read_number(answer), read_number(gold)
    if {r"\pi", "π"} & {piece for text in (answer, gold) for piece in (r"\pi", "π") if piece in text}:
        return None
    if factor is None or answer_number is None or gold_number is None:
        return False
    return answer_number.value * factor == gold_number.value


def _same_count(answer: str, gold: str) -> bool:
    """Whether two bare lists have as many items; True for anything else. As sets, ``1,1,2`` and ``1,2`` would be
    equal."""
    lists = [_ITEM_BREAK.split(text) for text in (answer, gold)]
    plain = all(len(items) > 1 and all(read_number(item.strip()) for item in items) for items in lists)
    return not plain or len(lists[0]) == len(lists[1])


def _number_verdict(answer: str, gold: str) -> bool | None:
    answer_number, gold_number = read_number(answer), read_number(gold)
    return None if answer_number is None or gold_number is None else answer_number.equals(gold_number)


def _based_verdict(answer: str, gold: str) -> bool | None:
    """``204_5`` against ``204_6`` or ``204``: math-verify drops the base. A gold with a base accepts its bare
    digits."""
    answer_based, gold_based = read_based(answer), read_based(gold)
    if gold_based is not None:
        return answer_based == gold_based if answer_based is not None else answer.upper() == gold_based[0]
    if answer_based is not None:
        gold_number = read_number(gold)
        digits, base = answer_based
        return (
            gold_number is not None and base == 10 and digits.lstrip("-").isdigit() and int(digits) == gold_number.value
        )
    return None


def _bracket_verdict(answer: str, gold: str) -> bool | None:
    """A pair or an interval is not a set, and an open end is not a closed one; longer vectors may take either
    bracket."""
    answer_brackets, gold_brackets = brackets(answer), brackets(gold)
    if answer_brackets is None or gold_brackets is None:
        return None
    if (answer_brackets[0] == r"\{") != (gold_brackets[0] == r"\{"):
        return False
    if answer_brackets[2] == gold_brackets[2] == 2 and answer_brackets[:2] != gold_brackets[:2]:
        return False
    return None
