"""Compares two values: numbers exactly, formulas with math-verify and sympy. Runs only in the sandbox."""

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import FiniteSet, Float, Intersection, Rational, S, Set, Union
from sympy.core.relational import Relational

from service.spec.maths.numerals import Numeral, same_number
from service.spec.maths.units import disagree
from service.spec.maths.values import INEQUALITY, Atom, Listing, Value, Words

MOST_PARTS = 12  # of a region
HARD = re.compile(r"\^|!(?!=)|\d{20}")  # powers and factorials of any size, which sympy would write out

# Without math-verify's removal of units, which reads 3t as 3.
LATEX = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        )
    )
]
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|lt|gt)(?![a-z])")
UNORDERED = ("", "{}")


class Comparison:
    """Compares an expected value with a given one under the options of a `number` grader."""

    def __init__(self, tolerance: float = 0.0, units: str = "if_given") -> None:
        self._tolerance, self._units = tolerance, units

    def same(self, expected: Value, given: Value) -> bool:
        if isinstance(expected, Words) or isinstance(given, Words):
            return self._same_words(expected, given)
        if expected.name and given.name and expected.name != given.name:
            return False
        if (equal := _same_regions(expected, given)) is not None:
            return equal
        if (texts := _relations(expected, given)) is not None:
            item, other = (expression(Atom(text)) for text in texts)
            return (
                item is not None
                and other is not None
                and bool(verify(item, other, allow_set_relation_comp=True, timeout_seconds=0))
            )
        if isinstance(expected, Listing) or isinstance(given, Listing):
            if _joined_otherwise(expected, given):
                return False
            return self._same_lists(*(_list(item) for item in (expected, given)))
        return self._same_atoms(expected, given)

    def _same_words(self, expected: Value, given: Value) -> bool:
        one, other = _as_words(expected), _as_words(given)
        return one is not None and one == other

    def _same_lists(self, expected: Listing, given: Listing) -> bool:
        if len(expected.items) != len(given.items) or not _brackets_agree(expected, given):
            return False
        if not (expected.brackets in UNORDERED and given.brackets in UNORDERED):
            return all(map(self.same, expected.items, given.items))
        left = list(given.items)
        for item in expected.items:
            match = next((one for one in left if self.same(item, one)), None)
            if match is None:
                return False
            left.remove(match)
        return True

    def _same_atoms(self, expected: Atom, given: Atom) -> bool:
        if expected.base or given.base:
            return (
                expected.formula == given.formula.lower() and given.base in (None, expected.base) and expected.base is not None
            )
        if self._units != "ignored":
            if disagree(expected.unit, given.unit):
                return False
            if self._units == "required" and expected.unit is not None and given.unit is None:
                return False
        factor = Fraction(1)
        if expected.unit and given.unit and expected.unit.dimensions and given.unit.dimensions and self._units != "ignored":
            factor = given.unit.worth / expected.unit.worth
        if expected.numeral is not None and given.numeral is not None:
            return same_number(expected.numeral, given.numeral * factor, self._tolerance)
        return self._same_formulas(expected, given, factor)

    def _same_formulas(self, expected: Atom, given: Atom, factor: Fraction) -> bool:
        one, other = expression(expected), expression(given)
        if one is None or other is None:
            return False
        if factor != 1:
            other = other * Rational(factor.numerator, factor.denominator)
        numbers = [_number(one, expected.numeral), _number(other, given.numeral if factor == 1 else None)]
        if numbers[0] is not None and numbers[1] is not None:
            return same_number(numbers[0], numbers[1], self._tolerance)
        if (numbers[0] is None) != (numbers[1] is None) and not (_relation(one) or _relation(other)):
            return False
        places = max(6, *(_places(atom.formula) for atom in (expected, given)))
        return bool(verify(one, other, float_rounding=places, timeout_seconds=0))


def _same_regions(*values: Value) -> bool | None:
    """Whether inequalities and unions of intervals hold the same real numbers; None if a value is something else."""
    if not any(map(_is_region, values)) or not all(map(_is_small, values)):
        return None
    regions = [_region(value) for value in values]
    if regions[0] is None or regions[1] is None:
        return None
    (names, one), (others, other) = regions[0], regions[1]
    if names and others and names != others:
        return False
    return None if (sides := [one.is_subset(other), other.is_subset(one)]).count(None) else all(sides)


def _is_region(value: Value) -> bool:
    if isinstance(value, Listing):
        return any(map(_is_region, value.items))
    return isinstance(value, Atom) and bool(INEQUALITY.search(value.formula) or "\\cup" in value.formula)


def _is_small(value: Value) -> bool:
    """Whether its regions are quickly found."""
    if isinstance(value, Listing):
        return len(value.items) <= MOST_PARTS and all(map(_is_small, value.items))
    return isinstance(value, Atom) and HARD.search(value.formula) is None and value.formula.count("\\cup") < MOST_PARTS


def _region(value: Value) -> tuple[frozenset[str], Set] | None:
    """The unknown and its real values. Inequalities between which no word stands hold together, if they can."""
    if isinstance(value, Words):
        return None
    if (members := _numbers(value)) is not None:
        return frozenset(), FiniteSet(*members)
    if isinstance(value, Listing) and not value.brackets:
        parts = [part for item in value.items if (part := _region(item)) is not None]
        names, sets = frozenset[str]().union(*(names for names, _ in parts)), [numbers for _, numbers in parts]
        if len(parts) < len(value.items) or len(names) > 1:
            return None
        if value.joined == "or" or not all(map(_is_region, value.items)):
            return names, Union(*sets)
        together = Intersection(*sets)
        return names, Union(*sets) if together is S.EmptySet and not value.joined else together
    text = _as_latex(replace(value, name=None))
    read = None if text is None else expression(Atom(text))
    if read is None:
        return None
    read = read.xreplace({number: Rational(str(number)) for number in read.atoms(Float)})
    names = frozenset({value.name} if value.name else ())
    if isinstance(read, Set):
        return names, read.doit()
    if names and getattr(read, "is_number", False):
        return names, FiniteSet(read)
    return (frozenset(map(str, read.free_symbols)), read.as_set()) if _solved(read) else None


def _numbers(value: Value) -> list[Any] | None:
    """The members of a set of numbers without names and units; None if it is something else."""
    if not isinstance(value, Listing) or value.brackets not in UNORDERED or value.name:
        return None
    plain = [item for item in value.items if isinstance(item, Atom) and not (item.name or item.unit or item.base)]
    read = [expression(item) for item in plain]
    return read if len(read) == len(value.items) and all(getattr(item, "is_number", False) for item in read) else None


def _joined_otherwise(*values: Value) -> bool:
    """Whether one side joins inequalities for different unknowns by `or`, and the other does not: they hold in other places."""
    listings = [value for value in values if isinstance(value, Listing) and _is_region(value)]
    if len(listings) < 2 or len({value.joined == "or" for value in listings}) < 2:
        return False
    read = [expression(item) for item in listings[0].items if isinstance(item, Atom)]
    alone = [{side for side in getattr(item, "args", ()) if getattr(side, "is_Symbol", False)} for item in read]
    return bool(alone) and all(alone) and not set.intersection(*alone)  # x < -m or x > m is for x alone


def _solved(read: Any) -> bool:
    """Whether an inequality has one unknown alone on a side. To repeat that of the question is no answer: x^2 > 4, |x| > 2."""
    relations = read.atoms(Relational) if _relation(read) else set()
    sides = [side for relation in relations for side in relation.args]
    return bool(sides) and len(read.free_symbols) == 1 and all(side.is_Symbol or side.is_number for side in sides)


def _relations(*values: Value) -> list[str] | None:
    """Both values as LaTeX, if one is an inequality and the other an interval (x > 3 and (3, \\infty)), or one an equation and
    the other a named value (y - 2x = 1 and y = 2x + 1). None for other pairs."""
    texts = [_as_latex(value) for value in values]
    if None in texts or not any(isinstance(value, Atom) and RELATION.search(value.formula) for value in values):
        return None
    bare = [isinstance(value, Atom) and not value.name and not RELATION.search(value.formula) for value in values]
    return None if any(bare) else [text for text in texts if text is not None]


def _as_latex(value: Value) -> str | None:
    if isinstance(value, Atom):
        return f"{value.name}={value.formula}" if value.name else value.formula
    if isinstance(value, Words) or value.brackets not in ("()", "[]", "(]", "[)"):
        return None
    inside = [_as_latex(item) for item in value.items]
    return None if None in inside else value.brackets[0] + ",".join(map(str, inside)) + value.brackets[1]


def _as_words(value: Value) -> str | None:
    if isinstance(value, Listing):
        return None
    return value.text if isinstance(value, Words) else value.formula.casefold()


def _list(value: Value) -> Listing:
    return value if isinstance(value, Listing) else Listing("", (value,))


def _brackets_agree(expected: Listing, given: Listing) -> bool:
    kinds = {expected.brackets, given.brackets}
    if len(kinds) == 1:
        return True
    if kinds == {"", "{}"} or len(expected.items) == 1:
        return ":" not in kinds
    # Bare numbers may mean a tuple or a row of numbers, but not an interval.
    return kinds == {"", "()"} or (kinds == {"", "[]"} and len(expected.items) != 2)


@lru_cache(maxsize=4096)  # the answers of a group repeat, and share the reference
def expression(atom: Atom) -> Any | None:
    """The formula in sympy; None if it cannot be read."""
    if atom.numeral is not None:
        return Rational(atom.numeral.value.numerator, atom.numeral.value.denominator)
    read = parse(f"\\boxed{{{atom.formula}}}", LATEX, fallback_mode="no_fallback", parsing_timeout=0)
    return read[0] if read and not isinstance(read[0], str) else None


def unreadable(value: Value) -> str | None:
    """The first formula in the value that cannot be read; None if all can."""
    if isinstance(value, Listing):
        return next((found for item in value.items if (found := unreadable(item)) is not None), None)
    return value.formula if isinstance(value, Atom) and not value.base and expression(value) is None else None


def _number(expression: Any, written: Numeral | None) -> Numeral | None:
    """The expression's value to 40 digits, exact if it is rational; None if it is not a real number."""
    if written is not None:
        return written
    if not getattr(expression, "is_number", False) or getattr(expression, "is_Matrix", False):
        return None
    done = expression.doit()
    if done.is_Float:
        done = Rational(str(done))  # as it was written
    elif not done.is_Rational:
        done = done.evalf(40)
        if not done.is_Float:
            return None
        done = Rational(done)
    above, below = done.as_numer_denom()
    return Numeral(Fraction(int(above), int(below)))


def _relation(expression: Any) -> bool:
    return any(getattr(expression, kind, False) for kind in ("is_Relational", "is_Boolean"))


def _places(formula: str) -> int:
    return min(15, max((len(part) for part in re.findall(r"\.(\d+)", formula)), default=0))
