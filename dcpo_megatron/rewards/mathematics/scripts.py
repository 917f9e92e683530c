r"""Answers in other scripts than the Latin one, brought to the marks and words that the rest of the judgement knows.

    ５，（Ａ）、٣   ->  5,(A),3         x=1 или x=2  ->  x=1\text{ or }x=2
    10⁻³, ½, 5℃     ->  10^{-3}, \frac{1}{2}, 5^\circ \text{C}         1或2, 1 και 2  ->  1\text{ or }2, 1\text{ and }2

Letters stay letters: words are compared as they stand, in NFKC and without case (``letters``), and a word behind a
number is a unit unless it says how much (``changes_value``, ``scale``).
"""

import re
import unicodedata

_OR = "或者|或是|或|または|もしくは|あるいは|또는|혹은"
_AND = "以及|并且|和|与|與|及|且|および|かつ|と|그리고|및|와|과"
_OR_WORDS = "или|либо|або|чи|ή|είτε|או|أو|या|अथवा|หรือ|hoặc"
_AND_WORDS = "и|й|та|і|και|ו|و|और|तथा|และ|và"
# Between formulas only: 和 and と are parts of words, too.
_BETWEEN = r"(?<=[\w)}}\]%$°^])\s*(?:{})\s*(?=[-+±\d(\[{{\\$A-Za-z.√π])"
_CONJUNCTIONS = (
    (re.compile(rf"\\text\{{\s*(?:{_OR}|{_OR_WORDS})\s*\}}"), r"\\text{ or }"),
    (re.compile(rf"\\text\{{\s*(?:{_AND}|{_AND_WORDS})\s*\}}"), r"\\text{ and }"),
    (re.compile(_BETWEEN.format(_OR)), r"\\text{ or }"),
    (re.compile(_BETWEEN.format(_AND).replace(r"\w", r"\dA-Za-z", 1)), r"\\text{ and }"),
    (re.compile(rf"(?<=[\s\d)}}$])(?:{_OR_WORDS})(?=[\s\d({{\\$-])"), r"\\text{ or }"),
    (re.compile(rf"(?<=[\s\d)}}$])(?:{_AND_WORDS})(?=[\s\d({{\\$-])"), r"\\text{ and }"),
)
# Also what may stand between two boxes.
CONJUNCTIONS = "|".join((_OR, _AND, _OR_WORDS, _AND_WORDS))

_MARKS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5E)} | str.maketrans({
    "\u3000": " ", "、": ",", "。": ".", "【": "[", "】": "]", "〔": "(", "〕": ")",
    "「": "", "」": "", "『": "", "』": "", "«": "", "»": "", "“": "", "”": "",
    "‘": "'", "’": "'", "￥": "¥", "￡": "£", "￠": "¢", "￦": "₩", "℃": r"^\circ \text{C}", "℉": r"^\circ \text{F}",
    "،": ",", "؛": ";", "٫": ".", "٬": "",
})  # fmt: skip
_TEMPERATURE = re.compile(r"°\s*([CF])(?![A-Za-z])")
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_FRACTION = re.compile("[¼-¾⅐-⅞↉]")

# Words behind a number that change its value.
_NOT_UNITS = frozenset((
    "пол", "половина", "половины", "половин", "треть", "трети", "третей", "третьих", "четверть", "четверти",
    "четвертей", "четвёртых", "четвертых", "пятых", "шестых",
    "восьмых", "десятых", "сотых", "тысячных", "дюжина", "дюжины", "дюжин", "десяток", "десятка", "десятков", "пар",
    "пары", "пара", "раз", "раза", "в", "на", "квадрате", "кубе",
    "степени", "целых", "целая", "плюс", "минус", "и", "или", "более", "менее", "больше", "меньше",
))  # fmt: skip
# The same in scripts that write words without blanks: anywhere in what stands behind the number.
_COUNTING = re.compile(
    "[万萬亿億兆半倍成折又負负余餘多几幾两兩〇零一二三四五六七八九十百千拾打双對]|分之|次方|平方$|立方$|以[上下内外]|左右|點|点|만|억|조|천|백|십|반$|배$|割"
)
_SCALES = {
    "тыс": 3, "тысяча": 3, "тысячи": 3, "тысяч": 3, "млн": 6, "миллион": 6, "миллиона": 6, "миллионов": 6, "млрд": 9,
    "миллиард": 9, "миллиарда": 9, "миллиардов": 9,
    "百": 2, "千": 3, "万": 4, "萬": 4, "十万": 5, "百万": 6, "百萬": 6, "千万": 7, "千萬": 7, "亿": 8, "億": 8,
    "兆": 12, "백": 2, "천": 3, "만": 4, "백만": 6, "천만": 7, "억": 8, "조": 12,
    "χιλιάδες": 3, "εκατομμύριο": 6, "εκατομμύρια": 6,
}  # fmt: skip
_LIKE_LATIN = frozenset("асеорхукн")  # alone behind a number they may be meant as a variable
_SCALED = re.compile("(" + "|".join(sorted(_SCALES, key=len, reverse=True)) + ")(元|円|원|人|個|个|名|块)?")


def fold(text: str) -> str:
    """The same text with the digits, marks and conjunctions of other scripts in LaTeX's; ASCII text as it is."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text).translate(_MARKS)
    text = _TEMPERATURE.sub(r"^\\circ \\text{\1}", text)
    text = _RAISED.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-") + "}", text)
    text = _FRACTION.sub(lambda m: r"\frac{" + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "}{") + "}", text)
    text = "".join(_plain(letter) for letter in text)
    for pattern, replacement in _CONJUNCTIONS:
        text = pattern.sub(replacement, text)
    return text


def letters(text: str) -> str:
    """The letters of a text alone, in NFKC and without case. Accents stay: they tell words apart."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in folded if _is_letter(c))


def is_foreign_word(text: str) -> bool:
    """Whether a text is no product of variables: it has a letter not Latin or Greek, or accents and length."""
    if text.isascii() or any(unicodedata.normalize("NFKC", c) != c for c in text):
        return False  # 2ⁿ is no word
    other = [c for c in text if not c.isascii() and c.isalpha()]
    if any(not unicodedata.name(c, "").startswith(("LATIN", "GREEK")) for c in other):
        return True
    return len(text) >= 4 and any(unicodedata.normalize("NFD", c) != c for c in text)


def is_word(text: str) -> bool:
    """Whether a text is of letters, in any script, and of what stands inside words."""
    return text[:1].isalpha() and all(_is_letter(c) or c in " '.-·・" for c in text)


def is_unit(word: str) -> bool:
    """Whether one word beyond ASCII, behind a number, is of letters that stand in no formula."""
    return all(_is_letter(c) for c in word) and is_foreign_word(word) and word not in _LIKE_LATIN


def changes_value(word: str) -> bool:
    """Whether a word behind a number says how much it is."""
    return word in _NOT_UNITS or _COUNTING.search(word) is not None


def scale(words: str) -> int | None:
    """The power of ten that the words behind a number name, as in ``5万元``; None for any others."""
    match = _SCALED.fullmatch(words.split()[0].rstrip("."))
    return _SCALES[match[1]] if match is not None else None


def _is_letter(letter: str) -> bool:
    return letter.isalpha() or unicodedata.category(letter)[0] == "M"


def _plain(letter: str) -> str:
    if letter.isascii():
        return letter
    if letter.isdecimal():
        return str(unicodedata.decimal(letter))
    return unicodedata.normalize("NFKC", letter) if 0x1D400 <= ord(letter) <= 0x1D7FF else letter
