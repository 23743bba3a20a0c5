"""Units after numbers: cm and metres are lengths, `apples` is any word. Conversion factors are exact."""

import re
from dataclasses import dataclass
from fractions import Fraction

# No pounds (money or mass) and no degrees (angle or temperature): an ambiguous name contradicts neither meaning.
# dimension: {unit: factor}, with other names of a unit after a bar
TABLE: dict[str, dict[str, str]] = {
    "length": {
        "mm|millimeter|millimetre": "1/1000", "cm|centimeter|centimetre": "1/100", "dm|decimeter|decimetre": "1/10",
        "m|meter|metre|mtr": "1", "km|kilometer|kilometre": "1000", "inch|inches|in": "254/10000", "ft|foot|feet": "3048/10000",
        "yd|yard": "9144/10000", "mi|mile": "1609344/1000", "nm|nanometer|nanometre": "1/1000000000",
    },
    "mass": {
        "mg|milligram": "1/1000000", "g|gm|gram": "1/1000", "kg|kilogram|kilo": "1", "tonne|metric ton": "1000",
        "lb|lbs": "45359237/100000000", "oz|ounce": "28349523125/1000000000000",
    },
    "time": {
        "ms|millisecond": "1/1000", "s|sec|second": "1", "min|minute": "60", "h|hr|hour": "3600", "day": "86400",
        "week": "604800",
    },
    "months": {"month": "1", "yr|year": "12"},
    "volume": {
        "ml|milliliter|millilitre": "1/1000", "cl|centiliter|centilitre": "1/100", "dl|deciliter|decilitre": "1/10",
        "l|liter|litre": "1", "gal|gallon": "3785411784/1000000000", "quart": "946352946/1000000000",
        "pint": "473176473/1000000000", "cup": "2365882365/10000000000",
    },
    "dollars": {"$|dollar|usd|buck": "1", "¢|cent": "1/100"},
    "euros": {"€|euro|eur": "1"}, "sterling": {"£|gbp": "1"}, "yen": {"¥|yen|jpy|yuan|rmb": "1"},
    "rupees": {"₹|rupee|rs|inr": "1"}, "won": {"₩|won": "1"}, "rubles": {"₽|ruble|rouble|rub": "1"}, "bitcoin": {"₿|btc": "1"},
    "radians": {"rad|radian": "1"},
    "celsius": {"°c|celsius|degrees celsius": "1"}, "fahrenheit": {"°f|fahrenheit|degrees fahrenheit": "1"},
    "am": {"am|a.m.": "1"}, "pm": {"pm|p.m.": "1"}, "hectares": {"hectare|ha": "1"}, "acres": {"acre": "1"},
    "hertz": {"hz|hertz": "1", "khz": "1000", "mhz": "1000000"}, "newtons": {"n|newton": "1", "kn": "1000"},
    "joules": {"j|joule": "1", "kj|kilojoule": "1000"}, "watts": {"w|watt": "1", "kw|kilowatt": "1000"},
    "volts": {"v|volt": "1"}, "amperes": {"amp|ampere": "1"}, "ohms": {"ohm": "1"},
    "pascals": {"pa|pascal": "1", "kpa": "1000"},
    "moles": {"mol|mole": "1"}, "bytes": {"byte": "1", "kb": "1000", "mb": "1000000", "gb": "1000000000"},
}  # fmt: skip
UNITS = {
    name: (dimension, Fraction(worth))
    for dimension, units in TABLE.items()
    for names, worth in units.items()
    for name in names.split("|")
}
CURRENCIES = "$€£¥₹₩₽₿¢"
SPEEDS = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "kmh": "km/h", "cc": "cm^3", "sqft": "ft^2", "sqm": "m^2"}
POWER = re.compile(r"\^\s*(?:\{\s*(-?\d)\s*\}|(\d))$")


@dataclass(frozen=True)
class Unit:
    """The unit of a number. `dimensions` is empty if the word is not a known unit."""

    dimensions: tuple[tuple[str, int], ...]
    worth: Fraction = Fraction(1)


def unit(text: str) -> Unit:
    """The unit named by the text: cm, cm^2, square feet, km/h, miles per hour. Other words have no dimension."""
    text = " ".join(text.replace("\\circ", "degree").replace("^degree", "°").split()).strip(" .")
    text = SPEEDS.get(text.casefold(), text)
    above, *below = re.split(r"\s*/\s*|\s+per\s+", text)
    dimensions: dict[str, int] = {}
    worth = Fraction(1)
    for sign, part in [(1, above), *((-1, part) for part in below)]:
        if (found := _one(part)) is None:
            return Unit(())
        dimension, size, power = found
        dimensions[dimension] = dimensions.get(dimension, 0) + sign * power
        worth *= size ** (sign * power)
    return Unit(tuple(sorted(dimensions.items())), worth)


def is_unit(text: str) -> bool:
    return bool(unit(text).dimensions)


def _one(text: str) -> tuple[str, Fraction, int] | None:
    """Dimension, factor and power of a unit without a slash."""
    power = 1
    if match := POWER.search(text):
        power, text = int(match[1] or match[2]), text[: match.start()].rstrip()
    for word, exponent in (("square", 2), ("sq", 2), ("cubic", 3), ("cu", 3)):
        if match := re.match(rf"{word}\.?\s+", text, re.IGNORECASE):
            power, text = exponent, text[match.end() :]
    name = text.casefold().replace("° ", "°")
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es")):
        if candidate in UNITS:
            return (*UNITS[candidate], power)
    return None


def disagree(one: Unit | None, other: Unit | None) -> bool:
    """Whether both units are given and known, and measure different quantities."""
    return bool(one and other and one.dimensions and other.dimensions and one.dimensions != other.dimensions)
