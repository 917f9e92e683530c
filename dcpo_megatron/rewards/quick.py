"""The part of the judgement that needs no computer algebra, and therefore no other process.

``quick_verdict`` knows when it knows: True and False are final, None hands the pair on to math-verify. It also holds the
rules where math-verify is too lenient for a reward: ordered against unordered, open against closed, number bases.
"""

import re

from dcpo_megatron.rewards.exact_numbers import read_based, read_number
from dcpo_megatron.rewards.normalise import brackets, clean, key, word

MAX_LENGTH = 2000  # characters; a longer answer is compared as a string only

_CLOCK = re.compile(r"\d{1,2}:\d\d")
_TWO_NUMBERS = re.compile(r"(?<![_^\d.])\d+(?:\.\d+)?\s+\d")  # but not \log_2 8


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether the extracted answer equals the ground truth (both LaTeX, without the box); None where this cannot tell."""
    if key(answer) == key(gold):
        return bool(gold.strip())
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return False
    by_number = _number_verdict(answer.strip(), gold.strip())  # most answers are plain integers: save them the cleaning
    if by_number is not None:
        return by_number
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold:
        return False
    if key(answer) == key(gold):
        return True
    by_number = _number_verdict(answer, gold)
    if by_number is not None:
        return by_number
    answer_word, gold_word = word(answer), word(gold)
    if answer_word is not None and gold_word is not None:
        if answer_word[0] == gold_word[0]:
            return True
        if answer_word[1] or gold_word[1]:
            return False
    if _CLOCK.fullmatch(answer) and _CLOCK.fullmatch(gold):  # math-verify reads 10:30 as a third
        return answer == gold
    if _TWO_NUMBERS.search(answer):  # math-verify multiplies or adds the two
        return False
    based = _based_verdict(answer, gold)
    return based if based is not None else _bracket_verdict(answer, gold)


def _number_verdict(answer: str, gold: str) -> bool | None:
    answer_number, gold_number = read_number(answer), read_number(gold)
    return None if answer_number is None or gold_number is None else answer_number.equals(gold_number)


def _based_verdict(answer: str, gold: str) -> bool | None:
    """``204_5`` against ``204_6`` or ``204``: math-verify drops the base. A gold with a base accepts its bare digits."""
    answer_based, gold_based = read_based(answer), read_based(gold)
    if gold_based is not None:
        return answer_based == gold_based if answer_based is not None else answer.upper() == gold_based[0]
    if answer_based is not None:
        gold_number = read_number(gold)
        digits, base = answer_based
        return gold_number is not None and base == 10 and digits.isdigit() and int(digits) == gold_number.value
    return None


def _bracket_verdict(answer: str, gold: str) -> bool | None:
    """A pair or an interval is not a set, and an open end is not a closed one; longer vectors may take either bracket."""
    answer_brackets, gold_brackets = brackets(answer), brackets(gold)
    if answer_brackets is None or gold_brackets is None:
        return None
    if (answer_brackets[0] == r"\{") != (gold_brackets[0] == r"\{"):
        return False
    if answer_brackets[2] == gold_brackets[2] == 2 and answer_brackets[:2] != gold_brackets[:2]:
        return False
    return None
