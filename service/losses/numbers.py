"""Arrays of JSON to tensors. Python's `array` converts them in C, as long as everything is a plain number.

NaN and the infinities may be literals, as Python's JSON writes them, or the strings "NaN", "Infinity", "-Infinity"; null is
NaN, too. They are legal because masked values may be anything. If the fast conversion fails, values are checked one by one.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from service.errors import FieldError, Portable
from service.relay.tensors import Tensor
from service.validation import quoted, shown

SPECIAL: Mapping[Any, float] = {
    "NaN": float("nan"),
    None: float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
DTYPES: Mapping[str, str] = {"d": "F64", "f": "F32", "q": "I64", "i": "I32"}
PLAIN = {"d": {float, int}, "f": {float, int}, "q": {int}}
INT64 = range(-(2**63), 2**63)


class NotThese(Portable):
    """The values cannot be converted to these numbers."""

    def __init__(self, error: FieldError) -> None:
        super().__init__(error.detail)
        self.error = error


def tensor(values: "array[Any]", *shape: int) -> Tensor:
    """A tensor without a copy; one-dimensional unless a shape is given."""
    data = memoryview(values).cast("B") if values else memoryview(b"")  # an empty memoryview cannot be cast
    return Tensor(DTYPES[values.typecode], shape or (len(values),), data)


def _refuse(pointer: str, must_be: str, got: Any) -> NoReturn:
    got = shown(got)
    raise NotThese(FieldError(pointer, f"must be {must_be}, got {quoted(got)}", "invalid", got, must_be))


# ---------------------------------------------------------------- arrays and arrays of arrays


def flat(values: list[Any], pointer: str, typecode: str, *, flags: bool = False) -> "array[Any]":
    """[n] numbers. `flags`: true and false are numbers too. Raises NotThese."""
    numbers = array(typecode)
    _extend(numbers, values, pointer, flags)
    return numbers


def rows(
    values: list[Any], pointer: str, typecode: str, *, flags: bool = False, each: str = "a sequence"
) -> "tuple[array[Any], array[int]]":
    """The concatenated numbers of arrays of any lengths, and the lengths. Raises NotThese."""
    numbers, lengths = array(typecode), array("q")
    for number, row in enumerate(values):
        if type(row) is not list:
            _refuse(f"{pointer}/{number}", f"an array: one for {each}", row)
        _extend(numbers, row, pointer, flags, number)
        lengths.append(len(row))
    return numbers, lengths


def _extend(numbers: "array[Any]", values: list[Any], pointer: str, flags: bool, row: int | None = None) -> None:
    kinds = set(map(type, values))
    if kinds <= PLAIN[numbers.typecode] or (flags and kinds <= {float, int, bool}):
        try:
            numbers.fromlist(values)
            return
        except OverflowError:
            pass
    whole = numbers.typecode == "q"
    pointer = pointer if row is None else f"{pointer}/{row}"
    numbers.extend(_one_by_one(values, pointer, whole, flags))


def _one_by_one(values: Iterable[Any], pointer: str, whole: bool, flags: bool) -> Iterator[Any]:
    for number, value in enumerate(values):
        place = f"{pointer}/{number}"
        if isinstance(value, bool) and not flags:
            _refuse(place, "an integer" if whole else "a number", value)
        if whole:
            if not isinstance(value, int) or value not in INT64:
                _refuse(place, "an integer of 64 bits", value)
            yield value
        elif isinstance(value, int | float):
            try:
                yield float(value)
            except OverflowError:
                _refuse(place, "a number below 1.8e308", value)
        elif (value is None or isinstance(value, str)) and value in SPECIAL:
            yield SPECIAL[value]
        else:
            _refuse(place, "a number", value)


# ---------------------------------------------------------------- names of groups


def labels(values: list[Any], pointer: str) -> "array[int]":
    """Integers unchanged. If there are texts, each distinct value gets a number in order of appearance. Raises NotThese."""
    kinds = set(map(type, values))
    if not kinds <= {int, str}:
        number, wrong = next((n, value) for n, value in enumerate(values) if type(value) not in (int, str))
        _refuse(f"{pointer}/{number}", "an integer or a string", wrong)
    if kinds <= {int}:
        try:
            return array("q", values)
        except OverflowError:
            pass
    seen: dict[Any, int] = {}
    return array("q", [seen.setdefault(value, len(seen)) for value in values])


# ---------------------------------------------------------------- tensors as Python's numbers


def integers(values: Tensor) -> "array[int]":
    """The numbers of an I64 or I32 tensor."""
    numbers = array("q" if values.dtype == "I64" else "i", values.data.tobytes())
    return numbers if numbers.typecode == "q" else array("q", numbers)
