r"""A reward for models that first have to learn the form of an answer, as a function by dotted path: ``reward.function:
dcpo_megatron.rewards.answer_at_end:reward``.

It rewards the FORM before the number: a small model that is hardly ever right still differs from response to response
in whether it comes to an end with an answer.
"""

import re

from dcpo_megatron.rewards.mathematics.numbers import read_number

_LAST = re.compile(r"\bAnswer:\s{0,3}\$?(-?[\d.,]*\d)\Z")


def reward(response: str, ground_truth: str) -> float:
    """Three levels: +1 the response ends with ``Answer: N`` and N is ``ground_truth``; 0 it ends so with another
    number; -1 anything else.

    "Ends" is meant: words after the number, and a response cut off before its answer, are -1.
    """
    found = _LAST.search(response.rstrip().removesuffix("."))
    if found is None:
        return -1.0
    answer, wanted = read_number(found[1]), read_number(ground_truth.strip())
    return 1.0 if answer is not None and wanted is not None and answer.equals(wanted) else 0.0
