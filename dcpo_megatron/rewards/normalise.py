r"""One spelling for answers that mean the same: the string that is compared, and the LaTeX that math-verify is given.

``clean`` removes what carries no value (spacing commands, ``\left``, dollar signs, degree signs, units) and settles
spellings (``\dfrac12`` becomes ``\frac{1}{2}``). Units are removed here and not by math-verify, because its list of units
holds single letters: it takes ``2t`` and ``2`` for equal. Two answers that differ in their units alone are equal, as in the
field's other graders. The patterns hold no nested repetition, so that a hostile answer of 2,000 letters costs milliseconds.
"""

import re

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "°": "", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "²": "^2", "³": "^3", "，": ",", "（": "(", "）": ")", "％": "%",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ",
})  # fmt: skip

# The first alternative keeps the row break of a matrix, "\\", from being read as a backslash and "\ ".
_SPACING = re.compile(r"(?P<keep>\\\\)|(?P<none>\\!\s*)|\\[,;:> ]|\\(?:q?quad|thinspace)(?![A-Za-z])|~|\s+")
_NO_VALUE = re.compile(
    r"\\(?:left|right)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])"
    r"|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z])|\\?\$"
)
_ATOM = r"(?:\d|\\pi(?![A-Za-z]))"  # an argument that TeX takes without braces
_SPELLINGS = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\le(?:q|qslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\ge(?:q|qslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\mathrm\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"\\(?:mbox|hbox|mathrm|text(?:bf|it|rm|sf|normal)?)\s*\{"), r"\\text{"),
    (re.compile(r"\\text\{\s*\}"), ""),
    (re.compile(r"\\%|\\text\{\s*(?:percent|\\?%)\s*\}|\bpercent\b"), "%"),
    (re.compile(rf"\\frac\s*({_ATOM})\s*({_ATOM})"), r"\\frac{\1}{\2}"),
    (re.compile(rf"\\frac\s*({_ATOM})\s*\{{"), r"\\frac{\1}{"),
    (re.compile(rf"\\frac\s*(\{{[^{{}}]*\}})\s*({_ATOM})"), r"\\frac\1{\2}"),
    (re.compile(r"\\frac\s+\{"), r"\\frac{"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"([_^])\s*\{\s*(\w)\s*\}"), r"\1\2"),
)
_MEMBERSHIP = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*")

_TEXT_UNIT = re.compile(r"\\text\{([^{}]*)\}\s*(?:\^\s*\{?\d\}?)?$")
_BARE_UNIT = re.compile(r"(?<=[\d})%])\s*([A-Za-z][A-Za-z./ ]{0,60})(?:\^\s*\{?[23]\}?)?$")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# fmt: off
_SHORT_UNITS = frozenset((
    "cm", "mm", "km", "in", "ft", "yd", "mi", "mph", "kmh", "kph", "kg", "mg", "lb", "lbs", "oz", "ml", "hr", "hrs", "min",
    "sec", "sq", "cu", "per", "day", "men", "deg", "rad",
))
# Words after a number that change its value: such an answer keeps them, and is equal only to the same words.
_NOT_UNITS = frozenset((
    "am", "pm", "or", "and", "plus", "minus", "times", "over", "dozen", "half", "halves", "third", "thirds", "quarter",
    "quarters", "fourth", "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths", "tenth", "tenths",
    "hundredth", "hundredths", "thousandth", "thousandths", "squared", "cubed", "factorial", "choose",
))
# fmt: on


def clean(text: str) -> str:
    """The answer in its settled spelling, without units and other marks that carry no value. Idempotent on most input."""
    text = text.translate(_UNICODE).strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = _SPACING.sub(lambda m: m["keep"] or ("" if m["none"] else " "), text)
    text = _NO_VALUE.sub("", text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _MEMBERSHIP.sub("", text.strip().rstrip(".,;"))
    text = _without_braces_around(text.strip())
    if text.startswith(r"\text{") and text.find("}") == len(text) - 1 and any(c.isdigit() for c in text):
        text = text[len(r"\text{") : -1].strip()
    return _without_braces_around(_without_unit(text)).strip()


def key(text: str) -> str:
    """The answer without white space that means nothing: ``( 1, 2 )`` and ``(1,2)`` agree, ``1 2`` and ``12`` do not."""
    text = " ".join(text.split())
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def word(text: str) -> tuple[str, bool] | None:
    r"""Reads a cleaned answer in words, such as ``\text{Evelyn}``, ``(B)`` or ``no solution``.

    Returns its letters in lower case, and whether it was marked as text by ``\text``; None for anything that is not words.
    """
    bare = text.replace(r"\text{", "{")
    marked = bare != text
    bare = bare.strip("(){} .")
    if not re.fullmatch(r"[A-Za-z][A-Za-z '.\-]*", bare) or ("-" in bare and not marked):
        return None
    return "".join(c for c in bare.casefold() if c.isalpha()), marked


def brackets(text: str) -> tuple[str, str, int] | None:
    r"""The outer brackets of a cleaned answer such as ``(1,2]`` or ``\{1,2\}``, and the number of its parts.

    None unless one pair of brackets holds everything and at least one comma stands at its top level.
    """
    tokens = re.findall(r"\\[{}]|\\[A-Za-z]+|\\.|.", text, re.DOTALL)
    if len(tokens) < 2 or tokens[0] not in ("(", "[", r"\{") or tokens[-1] not in (")", "]", r"\}"):
        return None
    depth, commas = 0, 0
    for position, token in enumerate(tokens):
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
            if depth == 0 and position < len(tokens) - 1:
                return None
        elif token == "," and depth == 1:
            commas += 1
    return (tokens[0], tokens[-1], commas + 1) if depth == 0 and commas else None


def _without_unit(text: str) -> str:
    match = _TEXT_UNIT.search(text) or _BARE_UNIT.search(text)
    if match is None:
        return text
    head = text[: match.start()].rstrip()
    words = match[1].replace(".", "").replace("/", " ").lower().split()
    if not head or not words or _NOT_UNITS.intersection(words):
        return text
    if match.re is _TEXT_UNIT:
        if not (head[-1].isalnum() or head[-1] in ")}]%!"):
            return text
    elif "/" not in match[1] and not all(len(w) >= 4 or w in _SHORT_UNITS for w in words):
        return text  # without \text, short words are products of variables
    elif "/" in match[1] and not all(w in _SHORT_UNITS or w in ("m", "s", "h", "g", "hour", "second") for w in words):
        return text
    power = _SCALES.get(words[0])
    return head if power is None else rf"{head}\times10^{{{power}}}"


def _without_braces_around(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and not text.endswith(r"\}"):
        depth = 0
        for position, letter in enumerate(text):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                break
        if position < len(text) - 1:
            return text
        text = text[1:-1].strip()
    return text
