r"""Units of measurement and words of number: what may follow a value, and what it is worth.

    measure("km/h")   ->  (Fraction(5, 18), (("length", 1), ("time", -1)))
    measure("apples") ->  None

Units of one kind are exchanged (60 cm is 0.6 m), units of different kinds never; a word that is
not known here counts things and says nothing.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

# dimension and its power: names with the size of the unit, in the dimension's base unit
KINDS = {
    ("length", 1): """
        mm millimeter millimeters millimetre millimetres 1/1000
        cm centimeter centimeters centimetre centimetres 1/100
        m meter meters metre metres 1
        km kilometer kilometers kilometre kilometres 1000
        in inch inches 0.0254
        ft foot feet 0.3048
        yd yds yard yards 0.9144
        mi mile miles 1609.344""",
    ("length", 2): """
        acre acres 4046.8564224
        ha hectare hectares 10000""",
    ("length", 3): """
        ml mL milliliter milliliters 1/1000000
        l L liter liters litre litres 1/1000
        gal gallon gallons 0.003785411784""",
    ("mass", 1): """
        mg milligram milligrams 1/1000000
        g gm gram grams 1/1000
        kg kilogram kilograms 1
        oz ounce ounces 0.028349523125
        lb lbs pound pounds 0.45359237
        ton tons 907.18474
        tonne tonnes 1000""",
    ("time", 1): """
        ms millisecond milliseconds 1/1000
        s sec secs second seconds 1
        min mins minute minutes 60
        h hr hrs hour hours 3600
        day days 86400
        week weeks 604800""",
    ("months", 1): "month months 1 year years yr yrs 12",
    ("dollar", 1): "$ dollar dollars usd 1 ¢ cent cents 1/100",
    ("euro", 1): "€ euro euros 1",
    ("sterling", 1): "£ gbp 1",
    ("rupee", 1): "₹ rupee rupees 1",
    ("yen", 1): "¥ yen 1",
    ("percent", 1): "% percent 1",
    ("degree", 1): "deg degree degrees 1",
    ("radian", 1): "rad radian radians 1",
    ("morning", 1): "am a.m 1",
    ("afternoon", 1): "pm p.m 1",
    ("force", 1): "N newton newtons 1",
    ("energy", 1): "J joule joules 1 kJ 1000",
    ("power", 1): "W watt watts 1 kW 1000",
    ("voltage", 1): "V volt volts 1",
    ("current", 1): "A amp amps ampere amperes 1",
    ("charge", 1): "C coulomb coulombs 1",
    ("temperature", 1): "K kelvin kelvins 1",
    ("celsius", 1): "celsius 1",
    ("fahrenheit", 1): "fahrenheit 1",
    ("frequency", 1): "Hz hertz 1",
    ("pressure", 1): "Pa pascal pascals 1",
    ("amount", 1): "mol mole moles 1",
}
SHORTHAND = {"mph": "mi/h", "kph": "km/h", "kmph": "km/h", "fps": "ft/s", "cc": "cm^3"}


def _units() -> dict[str, tuple[str, int, Fraction]]:
    """Name -> (dimension, power, size)."""
    found = {}
    for (dimension, power), listed in KINDS.items():
        names: list[str] = []
        for word in listed.split():
            if not word[0].isdigit():
                names.append(word)
                continue
            for name in names:
                found[name] = (dimension, power, Fraction(word))
            names = []
    return found


UNITS = _units()
MODIFIERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
POWERS = {"squared": 2, "cubed": 3}
WORD = re.compile(r"/|-?\d+|[^\s/^{}*·\d-]+")


def known(word: str) -> tuple[str, int, Fraction] | None:
    """Capitals matter in one letter (N, J) and not in a word."""
    word = word.rstrip(".")
    return UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 1 else None)


@lru_cache(1024)
def measure(name: str) -> tuple[Fraction, tuple] | None:
    """A unit as written -> (its size in base units, its dimensions); None where a word of it is
    not known."""
    parts: list[list] = []  # [unit, exponent]
    sign = 1
    modifier = 1
    for word in WORD.findall(SHORTHAND.get(name, name)):
        plain = word.lower().rstrip(".")
        if plain in ("/", "per"):
            sign = -1
        elif plain in MODIFIERS:
            modifier = MODIFIERS[plain]
        elif plain in POWERS or plain.lstrip("-").isdigit():
            exponent = POWERS.get(plain) or int(plain)
            if not parts or abs(exponent) > 4:
                return None
            parts[-1][1] *= exponent
        else:
            unit = known(word)
            if unit is None:
                return None
            parts.append([unit, sign * modifier])
            modifier = 1
    size = Fraction(1)
    dimensions: dict[str, int] = {}
    for (dimension, power, factor), exponent in parts:
        size *= factor**exponent
        dimensions[dimension] = dimensions.get(dimension, 0) + power * exponent
    left = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    return (size, left) if parts else None


# ------------------------------------------------------------------------- words of number
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _numerals() -> dict[str, int]:
    found = {word: n for n, word in enumerate(ONES)}
    for n, ten in enumerate(TENS, 2):
        found[ten] = 10 * n
        for k in range(1, 10):
            found[f"{ten}-{ONES[k]}"] = 10 * n + k
    return found


NUMERALS = _numerals()
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
    "doubled": 2,
    "tripled": 3,
    "quadrupled": 4,
    "halved": Fraction(1, 2),
    "half": Fraction(1, 2),
    "halves": Fraction(1, 2),
    "third": Fraction(1, 3),
    "quarter": Fraction(1, 4),
    "fourth": Fraction(1, 4),
    "fifth": Fraction(1, 5),
    "sixth": Fraction(1, 6),
    "seventh": Fraction(1, 7),
    "eighth": Fraction(1, 8),
    "ninth": Fraction(1, 9),
    "tenth": Fraction(1, 10),
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
    "millionth": Fraction(1, 10**6),
}
MONTHS = set(
    "january february march april may june july august september october november december".split()
)
# words that change the value before them in a way that is not read here
NOT_UNITS = (
    set("plus minus times over not mod modulo negative negatives less more than least most".split())
    | set("squared cubed factorial root power approximately about except or if when".split())
    | set(NUMERALS)
    | MONTHS
)


def scale(word: str) -> Fraction | None:
    """What a value is multiplied by when this word follows: dozens, million, fifths; None for any
    other word."""
    value = SCALES.get(word) or SCALES.get(word.removesuffix("s"))
    return None if value is None else Fraction(value)
