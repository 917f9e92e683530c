r"""Finding the final answer: the content of the last balanced ``\boxed{...}`` of a response.

One pass over the text with a stack of open braces, so that 100,000 unclosed boxes cost no more than 100,000 letters.
Escaped braces (``\{``, ``\}``) are letters of the answer, not structure. Only ``\boxed`` with braces counts: that is what
the prompt asks for, so ``\fbox{5}`` and ``\boxed 5`` are not well-formed.
"""

import re

# One or two backslashes before "boxed": models that were trained on escaped JSON write "\\boxed".
_TOKEN = re.compile(r"(?P<box>\\{1,2}boxed\s{0,8}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the ``\boxed{...}`` that begins last among those whose braces balance; None where there is none.

    A box that was cut off (an unclosed last ``\boxed{``) does not hide a complete one before it. Of nested boxes the
    inner one is taken. The content is stripped of surrounding white space and may be empty.
    """
    open_braces: list[int | None] = []  # start of the content for a box, None for any other brace
    best: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token["open"]:
            open_braces.append(None)
        elif token["close"] and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]].strip()
