"""Normalises signs that are written in many ways: full-width digits, Unicode minus, ½, √, \\dfrac, \\mbox."""

import re
import unicodedata

SPACES = re.compile(r"[^\S\n]")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2212\ufe63", "-"))
DASH = re.compile(r"(?<!\S)[–—](?=\s*[\d.\\(a-zA-Z])|(?<=[(\[{=,])[–—](?=\s*[\d.\\(a-zA-Z])")
SIGNS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "±": r"\pm ", "°": r"^\circ ", "º": r"^\circ ", "′": "'", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "ℝ": r"\mathbb{R}", "。": ". ",
    "、": ",", "“": '"', "”": '"', "’": "'", "‘": "'", "％": "%", "٪": "%", "٫": ".",
}  # fmt: skip
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
RAISED = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
LOWERED = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
ROOT = re.compile(r"(\\sqrt(?:\[3\])?) +(?:(\d+(?:\.\d+)?|[a-z])(?!\w)|\(([^()]*)\))")


def _raised(words: str) -> str:
    """A pattern of an exponent that is one of the words: ^{\\text{nd}}, ^\\text{nd}, ^{nd}."""
    text = rf"\\text\s*\{{\s*(?:{words})\s*\}}"
    return rf"\^\s*(?:{text}|\{{\s*(?:{text}|{words})\s*\}}|(?:{words})(?![A-Za-z]))"


# LaTeX that changes only the look of a formula.
LATEX = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*\.?(?=[\s()\[\]|\\{}]|$)"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|small|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?:\\(?:text|mathrm|mbox)\s*)?\{\s*,\s*\}"), ","),
    (re.compile(r"\\(?:text)?color\s*\{\w+\}"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|(?<!\\)~|\\(?:thin|med|thick)space(?![a-zA-Z])"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:math(?:rm|it|bf|sf)|text(?:rm|bf|it|normal|sf)|mbox|hbox|bm|boldsymbol)\s*(?=\{)"), r"\\text"),
    (re.compile(rf"(?<=\d)\s*{_raised('st|nd|rd|th')}"), ""),  # 42^{\text{nd}}
    (re.compile(rf"(?<=\d)\s*{_raised('o')}"), r"^\\circ "),  # 90^\text{o}
    (
        re.compile(r"\\begin\{(aligned|align\*?|gathered|split)\}((?:(?!\\\\|\\begin).)*?)\\end\{\1\}", re.DOTALL),
        lambda match: re.sub(r"(?<!\\)&", "", match[2]),
    ),  # of one row
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\(?:neq)(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))|\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\text\s*\{\s*\}"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\([lr])brace(?![a-zA-Z])"), lambda match: r"\{" if match[1] == "l" else r"\}"),
    (re.compile(r"\\([%#&])"), r"\1"),
]  # fmt: skip


def plain(text: str) -> str:
    """The text with plain signs: ASCII digits, minus and spaces, and one LaTeX command for each group of equal ones."""
    text = INVISIBLE.sub("", text) if not text.isascii() else text
    if not text.isascii():
        text = RAISED.sub(lambda match: "^{" + "".join(SUPERSCRIPTS[sign] for sign in match[0]) + "}", text)
        text = LOWERED.sub(lambda match: "_{" + "".join(SUBSCRIPTS[sign] for sign in match[0]) + "}", text)
        text = "".join(map(_plain_character, text.translate(MINUS)))
        text = DASH.sub("-", text)
        text = re.sub(r"(?<=\s)[–—](?=\s)", "-", text)
    text = SPACES.sub(" ", text)
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return ROOT.sub(lambda match: f"{match[1]}{{{match[2] or match[3]}}}", text)


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in SIGNS:
        return SIGNS[character]
    if "\uff01" <= character <= "\uff5e":  # the full-width forms of ASCII
        return chr(ord(character) - 0xFEE0)
    if character.isdecimal():  # the digits of any script
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No" and "FRACTION" in unicodedata.name(character, ""):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return unicodedata.normalize("NFKC", character) if unicodedata.category(character) in ("Zs", "Sc") else character
