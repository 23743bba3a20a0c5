"""One number, read exactly: 1,000 and 1 000, 1.5e3, 3 1/2, \\frac{7}{2}, 0.1\\overline{6}."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 10_000  # of ten, so that a short text cannot cause unbounded work
SIGN = r"(?P<sign>[+-]\s*)?"
GROUPED = r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ '_]\d{3})+"  # 1,000,000 or 10,00,000 or 1 000 000
DECIMAL = re.compile(
    rf"{SIGN}(?:(?P<whole>{GROUPED}|\d+)(?P<part>\.\d*)?|(?P<bare>\.\d+))"
    r"(?:\s*(?:[eE]|(?:\\times|\\cdot|\*|x)\s*10\s*\^)\s*(?P<brace>\{)?\s*(?P<exponent>[+-]?\d{1,6})\s*(?(brace)\}))?"
)
FRACTION = re.compile(
    rf"{SIGN}(?:(?P<mixed>\d+)\s*(?:(?<=\d)\s+|(?=\\)))?"
    r"(?:(?P<a>\d+)\s*/\s*(?P<b>\d+)|\\frac\s*(?:\{\s*(?P<c>-?\d+)\s*\}|(?P<d>\d))\s*(?:\{\s*(?P<e>-?\d+)\s*\}|(?P<f>\d)))"
)
TEN_TO = re.compile(rf"{SIGN}10\s*\^\s*(?:\{{\s*([+-]?\d{{1,6}})\s*\}}|(\d))")
REPEATING = re.compile(
    rf"{SIGN}(?P<whole>\d*)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*(?:\{{(?P<o>\d+)\}}|(?P<s>\d))|\((?P<p>\d+)\))"
)
BASED = re.compile(r"(?P<digits>[0-9A-Fa-f]+)_\s*(?:\{\s*(?:\\text\{\s*)?(?P<base>\d{1,2})\s*\}?\s*\}|(?P<short>\d))")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True)
class Numeral:
    """A number as written: its value, its decimal places and its significant digits."""

    value: Fraction
    places: int = 0
    significant: int = 0

    def __mul__(self, factor: Fraction | int) -> "Numeral":
        return Numeral(self.value * factor, 0 if factor != 1 else self.places, self.significant)


def numeral(text: str) -> Numeral | None:
    """The number, if the text (with plain signs) is exactly one number; else None."""
    text = re.sub(r"^(?:minus|negative)\s+(?=[\d.\\])", "-", text.strip(), flags=re.IGNORECASE)
    text = _unwrapped(text)
    if match := DECIMAL.fullmatch(text):
        return _decimal(match)
    if match := FRACTION.fullmatch(text):
        above, below = match["a"] or match["c"] or match["d"], match["b"] or match["e"] or match["f"]
        if int(below) == 0 or (match["mixed"] and "-" in above + below):
            return None
        return Numeral(_signed(match, int(match["mixed"] or 0) + Fraction(int(above), int(below))))
    if match := REPEATING.fullmatch(text):
        period, fixed = match["o"] or match["s"] or match["p"], match["fixed"]
        value = int(match["whole"] or 0) + Fraction(int(fixed or 0), 10 ** len(fixed))
        return Numeral(_signed(match, value + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))))
    if match := TEN_TO.fullmatch(text):
        exponent = int(match[2] or match[3])
        return Numeral(_signed(match, Fraction(10) ** exponent)) if abs(exponent) <= MAX_EXPONENT else None
    return None


def _unwrapped(text: str) -> str:
    """The text without braces or brackets around all of it: {5}, (5), (-5)."""
    while match := re.fullmatch(r"\{([^{}]*)\}|\(([^(),]*)\)", text):
        text = (match[1] if match[1] is not None else match[2]).strip()
    return text


def _decimal(match: re.Match[str]) -> Numeral | None:
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    whole, part = re.sub(r"[ ,'_]", "", match["whole"] or "0"), (match["part"] or match["bare"] or ".")[1:]
    value = _signed(match, Fraction(int(whole + part), 10 ** len(part)) * Fraction(10) ** exponent)
    return Numeral(value, max(0, len(part) - exponent), len((whole + part).lstrip("0")))


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if "-" in (match["sign"] or "") else value


def same_number(one: Numeral, other: Numeral, tolerance: float = 0.0) -> bool:
    """Whether two numbers are equal: exactly, except for the noise in a float's last digits. A decimal with six places and six
    significant digits also equals the number that it rounds. With `tolerance` they may differ by that share of `one`."""
    if one.value == other.value:
        return True
    apart = abs(one.value - other.value)
    if tolerance and apart <= Fraction(repr(tolerance)) * abs(one.value):
        return True
    if one.value.denominator != 1 or other.value.denominator != 1:
        if apart <= Fraction(1, 10**13) * max(abs(one.value), abs(other.value)):
            return True
        return _rounds_to(one, other) or _rounds_to(other, one)
    return False


def _rounds_to(one: Numeral, short: Numeral) -> bool:
    if short.places < 6 or short.significant < 6:
        return False
    return 2 * abs(one.value - short.value) * 10**short.places <= 1
