"""Reads a final answer as a value: a number, a formula, a list or words. Nothing is calculated here."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from service.spec.maths.numerals import BASED, GROUPED, SCALES, Numeral, numeral
from service.spec.maths.units import CURRENCIES, Unit, is_unit, unit


class Unreadable(ValueError):
    """The text is not a single number, formula, list or word; the message says why."""


@dataclass(frozen=True)
class Atom:
    """A number or a formula: `formula` (LaTeX) is always set, `numeral` if the text is one number."""

    formula: str
    numeral: Numeral | None = None
    unit: Unit | None = None
    name: str | None = None  # x of `x = 5`, or `mod 11`
    base: int | None = None  # of the digits in `formula`, if one is written


@dataclass(frozen=True)
class Listing:
    """(1, 2), [0, 5), {1, 2, 3}, 3:2, or (brackets "") plain 1, 2, 3. `joined`: how inequalities are, if by a word."""

    brackets: str
    items: tuple["Value", ...]
    name: str | None = None
    joined: Literal["", "or", "and"] = ""


@dataclass(frozen=True)
class Words:
    """A text answer, in lower case, without surrounding signs."""

    text: str


Value = Atom | Listing | Words

OPEN, CLOSE = "([{", ")]}"
WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.+)\$\$", r"\$((?:[^$]|\\\$)+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\*\*(.+)\*\*", r"__(.+)__",
        r"`+([^`]+)`+", r"\"([^\"]*)\"", r"'([^']*)'", r"\*([^*]+)\*", r"\\boxed\s*\{([^{}]*)\}",
    )
]  # fmt: skip
TEXT = r"\\text\s*\{([^{}]*)\}"
DATES = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}|\d{1,2}([/.])\d{1,2}\3\d{2}|\d{3}-\d{3}-\d{4}")
NAME = re.compile(
    r"(?P<name>(?P<letters>\\?[A-Za-z]+)(?:_(?:\w|\{\w+\}))?'?(?:\([a-z]\))?|\([a-z](?:, ?[a-z])+\))\s*"
    r"(?:=(?!=)|\\approx(?![a-z])|≈|\\equiv(?![a-z])|≡|\\in(?![a-z]))\s*(?P<rest>.+)",
    re.DOTALL,
)
EQUALS = re.compile(r"(?<![<>!=\\])=+(?![=])|\\approx(?![a-zA-Z])|≈")
OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*or\s*\}|(?<![\w\\])or(?!\w)|\\(?:lor|vee)(?![a-zA-Z]))\s*")
BOTH = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*and\s*\}|(?<![\w\\])and(?!\w)|\\(?:land|wedge)(?![a-zA-Z]))\s*")
AND = re.compile(rf"{OR.pattern}|{BOTH.pattern}|\s*,?\s*;\s*")
INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-z])")
PERCENT = re.compile(
    rf"(.+?)\s*(?:\\?%|(?:\\text\s*\{{\s*)?(?:percent|per cent|pct)(?:\s*\}})?)\s*(?:{TEXT})?", re.DOTALL | re.IGNORECASE
)
DEGREES = re.compile(r"(.+?)\s*\^\\circ\s*(?:\\text\s*\{\s*)?([CF]?)\}?", re.DOTALL)
TEXT_BEHIND = re.compile(rf"(.*?[^\s\\{{(])\s*((?:{TEXT}|\s|\\cdot|/|\^\s*\{{?\s*-?\d\s*\}}?)+)", re.DOTALL)
WORDS_BEHIND = re.compile(
    r"(.*?[\d)}])(\s*)([A-Za-z][A-Za-z.]*(?:[ /-][A-Za-z.]+)*(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?)", re.DOTALL
)
RATIO = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*(?:\\text\s*\{\s*)?([ap]\.?\s?m\.?)?(?:\s*\})?", re.IGNORECASE)
INTRODUCED = re.compile(r"\\text\s*\{[^{}\d]*?\b(?:is|are|equals|answer)\s*:?\s*\}\s*(?=\S)", re.IGNORECASE)
DENIED = re.compile(r"\b(?:not|never|no)\b|n't", re.IGNORECASE)
MODULO = re.compile(
    r"(\d+)\s*(?:\\pmod\s*(?:\{\s*(\d+)\s*\}|(\d))|\\bmod\s*\{?\s*(\d+)\s*\}?|"
    r"\(\s*(?:\\bmod|\\mod|mod)\s*\{?\s*(\d+)\s*\}?\s*\))"
)
IMPLIES = re.compile(r"\\(?:Rightarrow|rightarrow|implies|iff|Leftrightarrow|to)(?![a-zA-Z])|[⇒→]|[=-]+>")
SPELT = re.compile(r"(?<![a-zA-Z\\])(pi|infinity|sin|cos|tan|log|ln)(?![a-zA-Z])")
NUMBER_WORDS = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty",
    "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion", "half",
}  # fmt: skip
NO_ANSWERS = {"true", "false", "null", "none", "nan", "n/a", "undefined"}
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
    "exp", "sqrt", "pi", "max", "min", "gcd", "lcm", "mod", "inf", "infinity", "det", "theta", "alpha", "beta",
}  # fmt: skip
PROSE = {
    "the", "is", "so", "and", "or", "of", "to", "in", "we", "it", "at", "by", "for", "are", "was", "not", "no", "an", "as",
    "if", "on", "be", "he", "she", "you", "has", "had", "can", "all", "any", "but", "how", "its", "our", "out", "that",
    "this", "there", "then",
}  # fmt: skip
MAX_CHARACTERS = 2000


def value(text: str, percent: str = "hundredths") -> Value:
    """The value of the text, which must have plain signs. Raises Unreadable."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"is longer than {MAX_CHARACTERS} characters")
    text = trimmed(text)
    if not text:
        raise Unreadable("is empty")
    if (said := INTRODUCED.match(text)) and not DENIED.search(said[0]):
        return value(text[said.end() :], percent)
    if (residue := MODULO.fullmatch(text)) and int(residue[1]) < (modulus := int(next(filter(None, residue.groups()[1:])))):
        return replace(_atom(residue[1], percent), name=f"mod {modulus}")
    if DATES.fullmatch(text):
        raise Unreadable("is a date or a number of another kind that is not calculated with")
    if len(steps := [step for step in IMPLIES.split(text) if step.strip()]) > 1:
        return value(steps[-1], percent)
    if (words := _words(text)) is not None:
        return words
    if INEQUALITY.search(text):
        if len(parts := OR.split(text)) > 1:
            return Listing("", tuple(value(part, percent) for part in parts), joined="or")
        if len(parts := BOTH.split(text)) > 1:
            return Listing("", tuple(value(part, percent) for part in parts), joined="and")
    if len(parts := split(text)) > 1:
        return Listing("", tuple(value(part, percent) for part in parts))
    if (listing := _bracketed(text, percent)) is not None:
        return listing
    if (named := NAME.fullmatch(text)) and not _is_prose(named["letters"] or ""):
        return _named(named, text, percent)
    if len(sides := EQUALS.split(text)) > 1 and not re.search(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", sides[0])):
        turned = re.fullmatch(r"\s*(?![ei])[A-Za-z]\s*", sides[-1])  # 5 = x
        return value(f"{sides[-1]}={sides[-2]}" if turned else sides[-1], percent)
    if match := RATIO.fullmatch(text):
        half = match[2] and re.sub(r"[.\s]", "", match[2].lower())  # am or pm, if given
        return Listing(":", tuple(_atom(part, percent) for part in match[1].split(":")), half)
    if text.count("\\pm") == 1 and "\\mp" not in text:
        plus, minus = (text.replace("\\pm", sign) for sign in "+-")
        return Listing("", (value(plus, percent), value(minus, percent)))
    return _atom(text, percent)


def trimmed(text: str) -> str:
    """The text without surrounding white space and signs of mathematics and Markdown, and without final punctuation."""
    before = None
    while before != text:
        before = text
        text = text.strip("*` \t\n").rstrip("?;,").strip()
        text = text.removesuffix("\\\\").removesuffix("\\")
        if text.endswith(".") and not re.search(r"[ap]\.m\.$", text):
            text = text[:-1]
        for wrapper in WRAPPERS:
            if (match := wrapper.fullmatch(text)) and "$" not in match[1].replace("\\$", ""):
                text = match[1]
    return text


def words_of(text: str) -> str:
    """The text in the form in which words are compared: lower case, without \\text, without surrounding brackets or signs."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", trimmed(text)).replace("\\", " ")
    return " ".join(re.sub(r"^[\s\"'(\[*.]+|[\s\"')\]*.!,]+$", "", text).casefold().split())


def split(text: str) -> list[str]:
    """The members of a list without brackets; one if it is not a list. A comma before three digits separates thousands."""
    text = AND.sub(",", text)
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        sign = text[i]
        depth += (sign in OPEN) - (sign in CLOSE)
        if sign == "," and depth <= 0:
            grouped = re.match(rf"(?:{GROUPED})(?!\d)", text[_number_start(text, i) :])
            if grouped and _number_start(text, i) + grouped.end() > i and "," in grouped[0]:
                i = _number_start(text, i) + grouped.end()
                continue
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _number_start(text: str, comma: int) -> int:
    start = comma
    while start and text[start - 1].isdigit():
        start -= 1
    return start


def _bracketed(text: str, percent: str) -> Value | None:
    """A list in brackets; None if the text is not one."""
    if text.replace(" ", "") in ("\\emptyset", "\\{\\}", "{}"):
        return Listing("{}", ())
    inner = re.sub(r"\\([{}])", r"\1", text)
    if not inner or inner[0] not in OPEN or inner[-1] not in CLOSE or not _encloses(inner):
        return None
    if re.search(r"\\mid|\\cup|\\cap", inner):
        return None
    content = inner[1:-1]
    if re.search(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)", content):
        raise Unreadable("has brackets around digits with commas, which may be one number or several; write (1, 234) or 1234")
    parts = [part for part in _split_plainly(content) if part.strip()]
    if len(parts) < 2 and not text.startswith("\\{"):
        return None if inner[0] != "[" or not parts else Listing("[]", (value(content, percent),))
    return Listing(inner[0] + inner[-1], tuple(value(part, percent) for part in parts))


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last one. A half-open interval's brackets differ."""
    depth = 0
    for i, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False


def _split_plainly(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if sign in ",;" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _words(text: str) -> Words | None:
    """A text answer: \\text{east}, or one word; None for anything else. Raises Unreadable for a number in words."""
    stripped = re.sub(r"^\((.*)\)$", r"\1", text)
    inside = re.fullmatch(rf"{TEXT}(?:\s*\.)?", stripped)
    if inside and not re.search(r"\d", inside[1]):
        return Words(words_of(inside[1]))
    if inside:
        return None if numeral(inside[1].strip()) else Words(words_of(inside[1]))
    if not re.fullmatch(r"[^\W\d_]{2,}|[A-Za-z]", stripped) or (stripped in FUNCTIONS and stripped != text.upper()):
        return None
    word = stripped.casefold()
    if word in NO_ANSWERS or word in NUMBER_WORDS:
        raise Unreadable("holds no number or formula")
    if len(stripped) in (2, 3) and word not in ("yes", "no", "odd") and stripped.islower():
        return None  # xy is a product
    return Words(word)


def _named(match: re.Match[str], text: str, percent: str) -> Value:
    """`x = 5`: the value keeps the name. An equation of two unknowns stays a formula."""
    rest = EQUALS.split(match["rest"])[-1]
    read = value(rest, percent)
    name = re.sub(r"[\s\\{}]", "", match["name"])
    if isinstance(read, Words) or (read.name or "").startswith("mod "):  # the modulus says more than the name
        return read
    return replace(read, name=name)


def _atom(text: str, percent: str) -> Atom:
    if text.startswith("\\text"):
        text = re.sub(rf"^{TEXT}", r"\1", text).strip()
    if based := BASED.fullmatch(re.sub(r"\s", "", text)):
        return Atom(based["digits"].lower().lstrip("0") or "0", base=int(based["base"] or based["short"]))
    body, measured, factor = quantity(text, percent)
    if (read := numeral(body)) is not None:
        return Atom(body, read * factor, measured)
    formula = _formula(body, percent)
    if factor != 1:
        formula = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({formula})"
    return Atom(formula, None, measured)


def quantity(text: str, percent: str = "hundredths") -> tuple[str, Unit | None, Fraction]:
    """The text of the number, its unit, and the factor to multiply it by (percent, million)."""
    found, factor = None, Fraction(1)
    if match := re.fullmatch(rf"([+-]?)\s*(?:US|USD|AU|CA)?\s*\\?([{CURRENCIES}])\s*([+-]?)\s*(.+)", text, re.DOTALL):
        text, found = match[1] + match[3] + match[4], unit(match[2])
    if match := re.fullmatch(r"(USD|EUR|GBP|JPY|INR|RUB)\s*([\d.].*)", text):
        text, found = match[2], unit(match[1])
    if found and (match := re.fullmatch(r"([+-]?[\d.,]+)\s*([kKM])", text)):  # $70k; without a currency, k may be a variable
        text, factor = match[1], Fraction(10**6 if match[2] == "M" else 1000)
    if match := re.fullmatch(rf"(.*[\d}})])\s*\\?([{CURRENCIES}])", text, re.DOTALL):
        text, found = match[1], unit(match[2])
    if match := PERCENT.fullmatch(text):
        return match[1].strip(), None, factor / (100 if percent == "hundredths" else 1)
    if (match := DEGREES.fullmatch(text)) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", match[1]):
        return match[1], unit("°" + match[2]), factor
    if (match := TEXT_BEHIND.fullmatch(text)) and (tail := match[2].strip()).startswith("\\text"):
        return _scaled(match[1], re.sub(TEXT, r" \1 ", tail).replace("\\cdot", " "), found)
    if (match := WORDS_BEHIND.fullmatch(text)) and _may_follow(*match.groups()):
        return _scaled(match[1], match[3], found)
    return text, found, factor


def _may_follow(body: str, space: str, words: str) -> bool:
    """Whether the words after a number are a unit or counted things, and not part of a formula."""
    first, *others = words.split()
    if not space and not (is_unit(words) and len(words) > 1) and first.casefold() not in SCALES:
        return False
    if numeral(body) is None:
        return is_unit(words) and (len(words) > 1 or "frac" in body)
    if re.search(r"\d \d{3}", body) and others and not is_unit(words):
        return False  # `3 250 ml bottles` are three
    return is_unit(words) or first.casefold() in SCALES or (len(first) > 1 and len(others) < 4 and words not in FUNCTIONS)


def _scaled(body: str, words: str, found: Unit | None) -> tuple[str, Unit | None, Fraction]:
    """Read the words after a number: in `million dollars`, the first is a factor and the second a unit."""
    factor, parts = Fraction(1), words.split()
    while parts and parts[0].casefold().strip(".,") in SCALES:
        factor *= SCALES[parts.pop(0).casefold().strip(".,")]
    rest = " ".join(parts)
    return body.strip(), unit(rest) if rest and found is None else found, factor


def _formula(text: str, percent: str) -> str:
    """The text as LaTeX that sympy reads with the same meaning. Raises Unreadable for prose and for numbers side by side."""
    text = re.sub(rf"(?<![\d.])({GROUPED})(?![\d])", lambda match: re.sub(r"[ ,'_]", "", match[1]), text)
    text = re.sub(r"(\d)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(\d(?:[\d.]*))[eE]([+-]?\d+)", r"(\1 \\cdot 10^{\2})", text)
    text = re.sub(r"(\d[\d.]*)\s*\\?%", r"\\frac{\1}{100}" if percent == "hundredths" else r"\1", text)
    text = re.sub(r"\*\*", "^", text)
    text = re.sub(r"\^\s*(-?\d{2,}|-\d)", r"^{\1}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(sqrt)\s*\(([^()]*)\)", r"\\sqrt{\2}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(pi|infinity|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1 ", text).replace(
        "\\infinity", "\\infty"
    )
    bare = re.sub(r"\\begin\{.*?\}|\\end\{.*?\}", "", text)
    if re.search(r"\d\s+\d", bare.replace("&", ",").replace("\\\\", ",")) and not re.search(r"_|frac|log|sqrt|binom", bare):
        raise Unreadable("has numbers side by side with nothing between them")
    if any(_is_prose(word) for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", re.sub(TEXT, "", bare))):
        raise Unreadable("holds words beside a formula" if re.search(r"\d", bare) else "holds no number or formula, only words")
    if re.search(r'[a-zA-Z]\'[a-zA-Z]|["#@?!]{2}|["#@?:;…]|\.\.', bare) or re.search(r"\d\.\d+\.\d", bare):
        raise Unreadable("holds no number or formula that could be read")
    if not re.search(r"[\dA-Za-z]|\\infty|\\emptyset", bare):
        raise Unreadable("holds no number or formula")
    if _unbalanced(bare):
        raise Unreadable("has a bracket that is not closed")
    return text


def _is_prose(word: str) -> bool:
    word = word.removeprefix("\\")
    return word.casefold() in PROSE or (len(word) > 3 and word.casefold() not in FUNCTIONS)


def _unbalanced(text: str) -> bool:
    return text.count("{") != text.count("}") or sum(map(text.count, OPEN)) != sum(map(text.count, CLOSE))
