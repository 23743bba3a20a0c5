import time

import pytest

from service.spec.templates import check, columns_of, render


def test_columns_are_filled_in_and_doubled_braces_stay() -> None:
    assert render("{q}\n{{{a}}}", {"q": "2+2", "a": "4"}) == "2+2\n{4}"


def test_everything_but_text_is_written_as_json() -> None:
    row = {"n": 7, "f": 0.5, "t": True, "z": None, "l": ["ä", 1], "o": {"k": "v"}}
    assert render("{n} {f} {t} {z} {l} {o}", row) == '7 0.5 true null ["ä", 1] {"k": "v"}'


def test_values_are_never_templates_themselves() -> None:
    assert render("{q}", {"q": "{a}", "a": "secret"}) == "{a}"


def test_columns_are_named_in_order() -> None:
    assert columns_of("{b} and {a} and {b} and {{c}}") == ["b", "a", "b"]


def test_an_absent_column_is_named() -> None:
    with pytest.raises(KeyError, match="q"):
        render("{q}", {"a": 1})


@pytest.mark.parametrize("template", ["{}", "{0.x}", "{a.b}", "{a[0]}", "{a!r}", "{a:>10}", '{"a": 1}', "{a", "a}", "{a}}"])
def test_what_could_be_evaluated_or_is_half_a_brace_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"write \{\{ and \}\} for braces"):
        check(template)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1e-05, "0.00001"), (1e21, "1000000000000000000000"), (0.1, "0.1"), (-0.0, "-0.0"), (2**60 + 1, "1152921504606846977"),
        (1.0, "1.0"), (-1e-9, "-0.000000001"), ([1e-7, '1e-5 "x" 1e-6'], '[0.0000001, "1e-5 \\"x\\" 1e-6"]'),
        ({"1e5": 1e22}, '{"1e5": 10000000000000000000000}'),
    ],
)  # fmt: skip
def test_numbers_are_written_in_plain_decimals(value: object, shown: str) -> None:
    assert render("{a}", {"a": value}) == shown


def test_a_number_of_thousands_of_digits_is_looked_at_once():
    """Each digit as a possible beginning would take seconds."""
    row = {"numbers": [int("7" * 4000)] * 200 + [1e-05]}
    began = time.process_time()
    assert render("{numbers}", row).endswith("7, 0.00001]")
    assert time.process_time() - began < 1
