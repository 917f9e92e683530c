r"""Units behind a number: which are known, and whether two of them measure the same thing.

A unit that only one side writes carries no value (the question names it), and so does a word that is no known unit
(``12 \text{ ways}``). Where both sides write known units, they count: ``5 cm`` is not ``5 m``, is not ``5 cm^2``, and
is ``50 mm``.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    """``dimensions``: exponent of each kind of quantity that is not 0. ``factor``: one of it in the base unit of
    these."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


# kind -> (names, size of one in the kind's base unit)
_KINDS = {
    "length": (
        ("mm millimeter millimetre", "1/1000"), ("cm centimeter centimetre", "1/100"), ("dm decimeter", "1/10"),
        ("m meter metre", 1), ("km kilometer kilometre", 1000), ("in inch", "254/10000"),
        ("ft foot feet", "3048/10000"), ("yd yard", "9144/10000"), ("mi mile", "1609344/1000"),
    ),
    "mass": (
        ("mg milligram", "1/1000"), ("g gram", 1), ("kg kilogram", 1000), ("oz ounce", "28349523125/1000000000"),
        ("lb pound", "45359237/100000"), ("tonne", 1000000),
    ),
    "tons": (("ton", 1),),  # of which there are several
    "time": (
        ("ms millisecond", "1/1000"), ("s sec second", 1), ("min minute", 60), ("h hr hour", 3600), ("day", 86400),
        ("week", 604800),
    ),
    "calendar": (("month", 1), ("yr year", 12), ("decade", 120), ("century centuries", 1200)),
    "money": (("cent ¢ penny pennies", "1/100"), ("dollar $", 1)),
    "euros": (("€ euro", 1),),
    "sterling": (("£", 1),),
    "yuan": (("角 jiao", "1/10"), ("yuan rmb", 1)),
    "yen": (("yen", 1),),
    "won": (("won", 1),),
    "rubles": (("kopeck", "1/100"), ("ruble", 1)),
    "rupees": (("rupee", 1),),
    "celsius": (("c celsius", 1),),
    "fahrenheit": (("f fahrenheit", 1),),
    "angle": (("degree deg °", 1), ("radian rad", 0)),  # no rational factor: never compared by value
}  # fmt: skip
_VOLUMES = {"ml": "1/1000000", "milliliter": "1/1000000", "l": "1/1000", "liter": "1/1000", "litre": "1/1000"} | {
    name: f"3785411784/{count}000000000000" for name, count in (("gallon", 1), ("quart", 4), ("pint", 8), ("cup", 16))
}
_SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
_POWERS = {
    "square": 2, "sq": 2, "cubic": 3, "cu": 3, "кв": 2, "квадратный": 2, "квадратных": 2, "квадратные": 2, "куб": 3,
    "кубический": 3, "кубических": 3, "кубические": 3,
}  # fmt: skip
_OTHER_NAMES = {
    "mm": "мм миллиметр миллиметра миллиметров 毫米 ミリメートル 밀리미터",
    "cm": "см сантиметр сантиметра сантиметров 厘米 公分 センチメートル 센티미터", "dm": "дм 分米",
    "m": "м метр метра метров 米 公尺 メートル 미터 μέτρα",
    "km": "км километр километра километров 千米 公里 キロメートル 킬로미터 χιλιόμετρα",
    "mg": "мг 毫克", "g": "г грамм грамма граммов 克 グラム 그램", "tonne": "т тонна тонны тонн 吨",
    "kg": "кг килограмм килограмма килограммов 千克 公斤 キログラム 킬로그램",
    "s": "с сек секунда секунды секунд 秒 秒钟 초", "min": "мин минута минуты минут 分钟 分鐘 λεπτά",
    "h": "ч час часа часов 小时 小時 時間 시간 ώρες", "day": "день дня дней 天 日",
    "week": "неделя недели недель 周 星期", "month": "месяц месяца месяцев 个月 個月 月", "yr": "год года лет 年",
    "dollar": "доллар доллара долларов 美元 ドル 달러", "cent": "цент цента центов 美分 セント",
    "euro": "евро ευρώ 欧元 ユーロ 유로",
    "yuan": "元 块 人民币", "yen": "円 日元", "won": "₩ 원", "ruble": "₽ руб рубль рубля рублей",
    "kopeck": "коп копейка копейки копеек", "rupee": "₹ रुपये रुपए",
    "degree": "度 градус градуса градусов", "l": "л литр литра литров 升 リットル", "ml": "мл 毫升",
}  # fmt: skip
_PREFIXES = re.compile("(平方|立方)(?=.)")  # square and cubic, where words have no blanks between
_IRREGULAR = {"inches": "inch", "lbs": "lb", "hrs": "hr", "yrs": "yr", "feet": "foot"} | {
    name: known for known, names in _OTHER_NAMES.items() for name in names.split()
}


@lru_cache(4096)
def read_unit(words: str, power: int = 1) -> Unit | None:
    """The unit that ``words`` name, such as "cm", "square meters", "km/h", "miles per hour"; None where a word is no
    known unit."""
    dimensions: dict[str, int] = {}
    factor = Fraction(1)
    words = re.sub(r"(?i)\bdegrees?\s+(?=c(?:elsius)?\b|f(?:ahrenheit)?\b)", "", words)
    for number, part in enumerate(re.split(r"/|每|\bper\b|\bв\b", words.lower().replace(".", ""))):
        sign, exponent = (1 if number == 0 else -1), 1
        names = _PREFIXES.sub(lambda m: {"平方": "square ", "立方": "cubic "}[m[0]], part).split()
        if not names:
            return None
        for name in names:
            if name in _POWERS:
                exponent = _POWERS[name]
                continue
            if name in ("squared", "cubed"):
                return None
            known = _simple(name)
            if known is None:
                return None
            for kind, count in known.dimensions:
                dimensions[kind] = dimensions.get(kind, 0) + sign * exponent * count
            factor *= known.factor ** (sign * exponent) if known.factor else 0
            exponent = 1
    if power != 1:
        if len(dimensions) != 1:
            return None
        dimensions = {kind: count * power for kind, count in dimensions.items()}
        factor = factor**power
    return Unit(tuple(sorted((kind, count) for kind, count in dimensions.items() if count)), factor)


def same_quantity(answer: Unit, gold: Unit) -> Fraction | None:
    """What a number in ``answer`` is multiplied by to be one in ``gold``; None where the two measure different
    things."""
    if answer == gold:
        return Fraction(1)
    if answer.dimensions != gold.dimensions or not answer.factor or not gold.factor:
        return None
    return answer.factor / gold.factor


def _simple(name: str) -> Unit | None:
    name = _IRREGULAR.get(name, name)
    if name in _SPEEDS:
        return read_unit("/".join(_SPEEDS[name]))
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es")):
        if candidate in _VOLUMES:
            return Unit((("length", 3),), Fraction(_VOLUMES[candidate]))
        if candidate in _NAMES:
            kind, factor = _NAMES[candidate]
            return Unit(((kind, 1),), factor)
    return None


_NAMES = {
    name: (kind, Fraction(factor))
    for kind, units in _KINDS.items()
    for names, factor in units
    for name in names.split()
}
