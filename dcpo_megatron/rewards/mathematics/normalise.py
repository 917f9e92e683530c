r"""One spelling for answers that mean the same: the string that is compared, and the LaTeX that math-verify is given.

``clean`` removes what carries no value (spacing commands, ``\left``, dollar signs, degree signs, units) and settles
spellings (``\dfrac12`` becomes ``\frac{1}{2}``). Units are removed here and not by math-verify, because its list of
units holds single letters: it takes ``2t`` and ``2`` for equal. ``unit_of`` tells the unit that was removed, where it
is a known one. The patterns hold no nested repetition, so that a hostile answer of 2,000 letters costs milliseconds.
"""

import re

from dcpo_megatron.rewards.mathematics.scripts import changes_value, is_foreign_word, is_unit, is_word, letters, scale
from dcpo_megatron.rewards.mathematics.units import Unit, read_unit

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "°": "", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "²": "^2", "³": "^3", "，": ",", "（": "(", "）": ")", "％": "%",
    "⋅": r"\cdot ", "∗": "*", "＋": "+", "≠": r"\ne ", "√": r"\sqrt ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ",
    "ℝ": r"\mathbb{R}",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ",
})  # fmt: skip

_PI = re.compile(r"(?<![^\W\d_A-Za-z])π(?![^\W\d_A-Za-z])")  # but not in a Greek word
# The first alternative keeps the row break of a matrix, "\\", from being read as a backslash and "\ ".
_SPACING = re.compile(r"(?P<keep>\\\\)|(?P<none>\\!\s*)|\\[,;:> ]|\\(?:q?quad|thinspace)(?![A-Za-z])|~|\s+")
_NO_VALUE = re.compile(
    r"\\(?:left|right)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])"
    r"|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z])|\\?\$|[£€¥₽₹₩₺₫฿₴₪₱₦₸¢]|\\(?:pounds|euro)(?![A-Za-z])\s*"
)
_DEGREES = re.compile(
    r"°|\^\s*\{?\s*\\circ(?![A-Za-z])|\\degrees?(?![A-Za-z])|(?<![A-Za-z])degrees?(?![A-Za-z])|\d\s?度|градус"
)
# In the argument of a function a degree sign is a factor; elsewhere it is a unit.
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:°|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z]))")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_WRAPPER = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|pmb|mathit|mathsf|emph|underline|fbox|num|displaystyle|textstyle)\s*(?=\{)"
)
_PREFACE = re.compile(  # "The answer is 5", "\\text{Answer: } 5"
    r"^\s*(?:\\text\{)?\s*(?:so |thus |hence |therefore )?(?:the )?(?:final )?answer(?: is|:)(?: is|:)?\s*\}?\s*(?=.)",
    re.IGNORECASE,
)
_HALF_DAY = re.compile(r"(?<=\d)\s*(?:\\text\{)?\s*([ap])\.?\s?m\.?\s*\}?$", re.IGNORECASE)
_ATOM = r"(?:\d|\\pi(?![A-Za-z]))"  # an argument that TeX takes without braces
_SPELLINGS = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\le(?:q|qslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\ge(?:q|qslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\(?:approx|simeq)(?![A-Za-z])"), "="),
    (re.compile(r"^\s*="), ""),
    (re.compile(r"\\(?:l|r)angle(?![A-Za-z])"), lambda m: "(" if m[0][1] == "l" else ")"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\overline\s*\{\s*([A-Z]{2})\s*\}"), r"\1"),
    (re.compile(r"\\dot\s*\{\s*(\d)\s*\}"), r"\\overline{\1}"),
    (re.compile(r"\{\s*([^{}\\]{1,20}?)\s*\\choose\s+([^{}\\]{1,20}?)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\{\s*([^{}\\]{1,20}?)\s*\\over\s+([^{}\\]{1,20}?)\s*\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\mathrm\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"\\mathbf\s*\{?\s*([RZNQC])\s*\}?$"), r"\\mathbb{\1}"),
    (re.compile(r"\\mathbb\s*([RZNQC])(?![A-Za-z])"), r"\\mathbb{\1}"),
    (_WRAPPER, ""),
    (re.compile(r"\\middle(?![A-Za-z])"), ""),
    (re.compile(r"\\bigcup(?![A-Za-z])"), r"\\cup"),
    (re.compile(r"\\equiv(?![A-Za-z])"), "="),
    (re.compile(r"\\[pb]?mod\s*\{?\s*(\w+)\s*\}?"), r"\\pmod{\1}"),
    (re.compile(r"\\(?:mbox|hbox|mathrm|text(?:bf|it|rm|sf|normal)?)\s*\{"), r"\\text{"),
    (re.compile(r"\\(?:text|operatorname)\{\s*(sin|cos|tan|ln|log|arcsin|arccos|arctan)\s*\}"), r"\\\1 "),
    (re.compile(r"_\s*\{?\s*\\text\{\s*(\w+)\s*\}\s*\}?"), r"_{\1}"),
    (re.compile(r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*$"), r"\\text{\1/\2}"),
    (_PREFACE, ""),
    (re.compile(r"^\s*\\text\{[^{}]*(?:\bis|\bare|=|:)\s*\}(?=\s*\S)"), ""),
    (re.compile(r"\b(?:option|choice)\s+(?=\(?[A-J]\)?\s*\}?$)", re.IGNORECASE), ""),
    (re.compile(r"(?<=\d)\s*\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?$"), ""),
    (re.compile(r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|to)\s*(?=\d)"), ":"),
    (re.compile(r"(\.\d{0,9}?)(\d)\2\2+\s*(?:\.{3}|…|\\[lc]?dots(?![A-Za-z]))"), r"\1\\overline{\2}"),
    (re.compile(r"\((\w+)\)\s*_"), r"\1_"),
    (_HALF_DAY, lambda m: rf"\text{{ {m[1].lower()}m}}"),
    (re.compile(r"\\text\{\s*\}"), ""),
    (re.compile(r"\\%|\\text\{\s*(?:percent|\\?%)\s*\}|\b(?:percent|процент(?:а|ов)?)\b"), "%"),
    (re.compile(rf"\\frac\s*({_ATOM})\s*({_ATOM})"), r"\\frac{\1}{\2}"),
    (re.compile(rf"\\frac\s*({_ATOM})\s*\{{"), r"\\frac{\1}{"),
    (re.compile(rf"\\frac\s*(\{{[^{{}}]*\}})\s*({_ATOM})"), r"\\frac\1{\2}"),
    (re.compile(r"\\frac\s+\{"), r"\\frac{"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"([_^])\s*\{\s*(\w)\s*\}"), r"\1\2"),
)
_MEMBERSHIP = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*")

_TEXT_UNIT = re.compile(r"\\text\{([^{}]*)\}\s*(?:\^\s*\{?(\d)\}?)?$")
_BARE_UNIT = re.compile(r"(?<=[\d})%])\s*([A-Za-z\u0080-\uffff][A-Za-z./ \u0080-\uffff]{0,60})(?:\^\s*\{?([23])\}?)?$")
_MONEY = r"(\\\$|[£€¥₽₹₩₺₫฿₴₪₱₦₸¢])"
_CURRENCY = re.compile(rf"^\s*{_MONEY}(?!.*\$)|^[^$]*?{_MONEY}\s*$", re.DOTALL)  # but not the dollars around a formula
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# fmt: off
_SHORT_UNITS = frozenset((
    "cm", "mm", "km", "in", "ft", "yd", "mi", "mph", "kmh", "kph", "kg", "mg", "lb", "lbs", "oz", "ml", "hr", "hrs",
    "min", "sec", "sq", "cu", "per", "day", "men", "deg", "rad",
))
# Words after a number that change its value: such an answer keeps them, and is equal only to the same words.
_NOT_UNITS = frozenset((
    "am", "pm", "or", "and", "plus", "minus", "times", "over", "dozen", "dozens", "half", "halves", "third", "thirds",
    "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths",
    "tenth", "tenths", "hundredth", "hundredths", "thousandth", "thousandths", "squared", "cubed", "factorial",
    "choose",
))
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on


def clean(text: str) -> str:
    """The answer in its settled spelling, without units and other marks that carry no value. Idempotent on most
    input."""
    head, words, _ = _split_unit(_spell(text))
    power = _SCALES.get(words.lower().split()[0].removesuffix("s"), scale(words.lower())) if words else None
    return _without_braces_around(head if power is None else rf"{head}\times10^{{{power}}}").strip()


def unit_of(text: str) -> Unit | None:
    """The known unit that an answer is written with; None where there is none, or none that is known."""
    currency = _CURRENCY.match(text)
    if currency is not None:
        return read_unit((currency[1] or currency[2])[-1])
    _, words, power = _split_unit(_spell(text))
    if not words:
        return read_unit("degree") if in_degrees(text) else None
    return read_unit(words, power)


def in_degrees(text: str) -> bool:
    """Whether an answer has a degree sign or the word."""
    return _DEGREES.search(text) is not None


def _spell(text: str) -> str:
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(r"\\frac{\1\\pi}{180}", text)
    text = _PI.sub(r"\\pi ", text.translate(_UNICODE)).strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = _SPACING.sub(lambda m: m["keep"] or ("" if m["none"] else " "), text)
    text = " ".join(_NO_VALUE.sub("", text).split())
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _MEMBERSHIP.sub("", text.strip().rstrip(".,;"))
    text = _without_parentheses(_without_braces_around(text.strip()))
    if text.startswith(r"\text{") and text.find("}") == len(text) - 1 and any(c.isdigit() for c in text):
        text = text[len(r"\text{") : -1].strip()
    return text


def key(text: str) -> str:
    """The answer without white space that means nothing: ``( 1, 2 )`` and ``(1,2)`` agree, ``1 2`` and ``12`` do
    not."""
    text = " ".join(text.split())
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def word(text: str) -> tuple[str, bool] | None:
    r"""Reads a cleaned answer in words, such as ``\text{Evelyn}``, ``(B)`` or ``no solution``.

    Returns its letters in lower case, and whether it is text for sure, by ``\text`` or by its script; None for anything
    that is not words.
    """
    bare = text.replace(r"\text{", "{")
    marked = bare != text
    bare = bare.strip("(){} .")
    foreign = is_foreign_word(bare)
    if not is_word(bare) or not (marked or foreign or (bare.isascii() and "-" not in bare)):
        return None
    return letters(re.sub(r"^(?:an?|the) (?=[a-z]{2})", "", bare.casefold())), marked or foreign


def word_list(text: str) -> list[str] | None:
    r"""The words of a cleaned list of two or more, in order of the alphabet: ``\text{Bob and Ann}``; None for anything
    else."""
    items = [
        word(item)
        for item in re.split(r",|;|&|\band\b|[和与與及]|\bи\b", text.replace(r"\text{", "").replace("}", ""))
        if item.strip()
    ]
    return sorted(item[0] for item in items) if len(items) > 1 and all(items) else None


def number_word(text: str) -> str | None:
    """The digits of a whole number from 0 to 20 in words; None for anything else."""
    found = word(text)
    return str(_NUMBER_WORDS.index(found[0])) if found is not None and found[0] in _NUMBER_WORDS else None


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


def _split_unit(text: str) -> tuple[str, str, int]:
    """What stands before the unit, the unit's words ("" for none), and its exponent."""
    match = _TEXT_UNIT.search(text) or _BARE_UNIT.search(text)
    if match is None:
        return text, "", 1
    head = text[: match.start()].rstrip()
    words = match[1].replace(".", "").replace("/", " ").lower().split()
    if not head or not words or _NOT_UNITS.intersection(words) or head.endswith((" and }", " or }")):
        return text, "", 1
    known = not match[1].isascii() and (read_unit(match[1]) or scale(match[1].lower())) is not None
    if not known and any(changes_value(w) for w in words):
        return text, "", 1
    if match.re is _TEXT_UNIT:
        if not (head[-1].isalnum() or head[-1] in ")}]%!"):
            return text, "", 1
    elif not match[1].isascii():
        if not known and not all(is_unit(w) or (w.isascii() and len(w) >= 4) for w in words):
            return text, "", 1
    elif "/" not in match[1] and not all(len(w) >= 4 or w in _SHORT_UNITS for w in words):
        return text, "", 1  # without \text, short words are products of variables
    elif "/" in match[1] and not all(w in _SHORT_UNITS or w in ("m", "s", "h", "g", "hour", "second") for w in words):
        return text, "", 1
    return head, match[1].strip(), int(match[2] or 1)


def _without_parentheses(text: str) -> str:
    """``(5)`` as ``5``; a pair, an interval and a choice such as ``(B)`` keep theirs."""
    while text.startswith("(") and text.endswith(")") and len(text) > 3:
        depth = 0
        for position, letter in enumerate(text):
            depth += (letter in "([{") - (letter in ")]}")
            if (depth == 0 and position < len(text) - 1) or (depth == 1 and letter in ",;"):
                return text
        text = text[1:-1].strip()
    return text


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
