r"""Finding the final answer: the content of the last balanced ``\boxed{...}`` of a response.

One pass over the text with a stack of open braces, so that 100,000 unclosed boxes cost no more than 100,000 letters.
Escaped braces (``\{``, ``\}``) are letters of the answer, not structure. Only ``\boxed`` with braces counts: that is
what the prompt asks for, so ``\fbox{5}`` and ``\boxed 5`` are not well-formed.
"""

import re

from dcpo_megatron.rewards.mathematics.scripts import CONJUNCTIONS

# One or two backslashes before "boxed": models that were trained on escaped JSON write "\\boxed".
_TOKEN = re.compile(r"(?P<box>\\{1,2}boxed\s{0,8}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# What may stand between boxes that are one answer: "\boxed{2} and \boxed{3}". Not a full stop, not a new line.
_JOINT = re.compile(
    rf"(?:[ \t,;$~，；、]|\\[,;:() ]|\\q?quad|\\text\s?\{{\s*(?:and|or|{CONJUNCTIONS})\s*\}}|and|or|{CONJUNCTIONS})*"
)
_JOINED_BOXES = 16


def last_boxed(text: str) -> str | None:
    r"""The content of the ``\boxed{...}`` that begins last among those whose braces balance; None where there is none.

    A box that was cut off (an unclosed last ``\boxed{``) does not hide a complete one before it. Of nested boxes the
    inner one is taken. The content is stripped of surrounding white space and may be empty.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    _, start, end = max(boxes, key=lambda box: box[1])
    return text[start:end].strip()


def final_answer(text: str) -> str | None:
    r"""As ``last_boxed``; boxes joined by nothing but commas, "and" and "or" are one answer, a list: two guesses are
    not one right answer."""
    boxes = _boxes(text)
    if not boxes:
        return None
    boxes.sort(key=lambda box: box[1])
    begin, start, end = boxes[-1]
    found = [text[start:end].strip()]
    for earlier_begin, earlier_start, earlier_end in reversed(boxes[-_JOINED_BOXES:-1]):
        if earlier_end >= begin or not _JOINT.fullmatch(text, earlier_end + 1, begin):
            break
        begin = earlier_begin
        content = text[earlier_start:earlier_end].strip()
        if content not in found:
            found.insert(0, content)
    return ",".join(found)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Where each balanced box begins, and where its content begins and ends."""
    open_braces: list[tuple[int, int] | None] = []  # of a box its beginning and its content's; None for any other brace
    found = []
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_braces.append((token.start(), token.end()))
        elif token["open"]:
            open_braces.append(None)
        elif token["close"] and open_braces:
            box = open_braces.pop()
            if box is not None:
                found.append((*box, token.start()))
    return found
