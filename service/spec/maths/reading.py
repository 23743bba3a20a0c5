"""Reads the reference of a row and the final answer of a text by the same rules."""

import re
from collections.abc import Iterator

from service.spec.maths.finals import Final, marked, neighbours, runs
from service.spec.maths.signs import plain
from service.spec.maths.units import is_unit
from service.spec.maths.values import INEQUALITY, Atom, Listing, Unreadable, Value, Words, trimmed, value, words_of

COUNTED = re.compile(r"\b(\d+) \d+(?:\.\d+)?[ -]?([A-Za-z]+) ([a-z]{3,})")  # three of a size: `3 250 ml bottles`
MAX_TRIED = 5  # marks, or formulas after a mark, to try before giving up
MAX_WORDS, MAX_SENTENCE = 40, 500  # a model that repeats itself must not keep the grader busy
CALCULATED = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator
SEAMS = re.compile(r"(?<=[A-Za-z]{2}:)(?=[\d$\\(-])|(?<![\w-])[=-]{1,20}>|[→⇒]")  # where a word or an arrow touches a number
APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])|≈")
CONSTANT = re.compile(r"\\(?:sqrt|frac|pi|log|ln|sin|cos|tan|cdot|times|binom|circ)(?![A-Za-z])|(?<![A-Za-z])e(?![A-Za-z])")
FALSE = r"(?:false|untrue|wrong|incorrect|impossible)"
TRUE = r"(?:true|right|correct|valid|so|the\s+case)"
NOT = re.compile(
    rf"(?:(?:(?<!\bor )(?<!\bif )\b(?:not|cannot|never)|n['’]t|\\(?:neg|lnot))"
    rf"(?:\s+(?:be|have|always|necessarily|{TRUE}(?=\s+that)))?(?:\s+that[\s}}$({{]*|[ \t}}$({{]*)"
    rf"|\b{FALSE}\s+that[\s}}$({{]*)\Z",
    re.IGNORECASE,
)  # in front of what is denied
NOT_SO = re.compile(
    rf"[)}}\]$*_\\]{{0,4}}[ \t]+(?:(?:is|are)\s+(?:{FALSE}|not\s+{TRUE})|(?:is|are)n['’]t\s+{TRUE}"
    r"|(?:(?:does|do|can)\s+not|(?:does|do|ca)n['’]t|cannot|never)\s+hold|never\s+holds|fails)\b",
    re.IGNORECASE,
)  # behind it, after at most a few signs of the formula
NEAR = 80  # so many signs in front and behind are looked at: enough for these words, and long answers take no longer
ALLOWED = (
    "a number (1,000, 1.5e3, 3 1/2, 50%, 5 cm), a LaTeX formula, a list, tuple, interval or set of these, one word or "
    "\\text{...}, or a text with its final answer in \\boxed{...}, <answer> or after ####"
)


def reference(text: str, percent: str = "hundredths") -> Value:
    """The value of the reference. Raises ValueError with what came and what is allowed."""
    text = plain(text)
    try:
        finals = marked(text)
        if finals and (
            finals[0].exact
            or "<answer>" in text.casefold()
            or re.match(r"\W*(?:the )?(?:final )?answer\b", text.strip(), re.IGNORECASE)
        ):
            return value(_exact(finals[0].text), percent)
        return value(_exact(text), percent)
    except RecursionError:
        raise ValueError("the reference is nested too deeply") from None
    except Unreadable as error:
        raise ValueError(f"the reference {text[:80]!r} {error}; allowed are {ALLOWED}") from None


def _exact(text: str) -> str:
    """The exact value of `2\\sqrt{13} \\approx 7.21`; the whole text if what is before the sign is a name, an
    integer or a decimal."""
    before, *rounded = APPROXIMATELY.split(trimmed(text), maxsplit=1)
    exact = before.rpartition("=")[2]
    unknown = re.search(r"[A-Za-z.]", CONSTANT.sub("", exact)) or re.fullmatch(r"[\s\d,+-]*", exact)
    return before if rounded and not unknown else text


def answers(text: str, expected: Value, *, cut: bool, percent: str = "hundredths") -> Iterator[Value]:
    """Possible values of the answer's final result, best first; none if it has no result or was cut off inside it."""
    text = COUNTED.sub(lambda match: f"{match[1]} {match[3]}" if is_unit(match[2]) else match[0], plain(text))
    text = SEAMS.sub(" ", CALCULATED.sub("", text))
    wants_list = isinstance(expected, Listing) or _is_union(expected)
    if wants_list and len(boxes := neighbours(text)) > 1:
        yield from _read(", ".join(boxes), percent)
    for final in marked(text)[:MAX_TRIED]:
        if final.open and cut and _in_the_middle(final, text):
            return
        if found := list(_within(final, expected, percent, cut)):
            yield from found
            return
    if isinstance(expected, Words):
        yield Words(words_of(text))
        return
    one_line = "\n" not in text.strip() or re.match(r"[\s$]*\\(?:begin|\[|\()", text)
    if one_line and not cut and (whole := list(_read(text, percent))):
        yield from whole
        return
    yield from _last_run(text, expected, percent, cut)


def _in_the_middle(final: Final, text: str) -> bool:
    """Whether the value itself may be incomplete, and not only the words after it."""
    if not final.exact and (found := runs(final.text)):
        return found[0].open or (
            len(found) == 1 and bool(re.search(r"[\d.,\\{^/]\s*\Z", text)) and final.text.rstrip().endswith(found[0].text)
        )
    return True


def _within(final: Final, expected: Value, percent: str, cut: bool) -> Iterator[Value]:
    """The value of a marked answer: of all of it, or the first value in its prose."""
    if isinstance(expected, Words):
        sentence = re.split(r"(?<=[\w)}*])[.!?](?=\s|$)", final.text.strip())[0]
        yield Words(words_of(sentence))
        if option := re.match(r"\W*([A-Za-z])[).:]", final.text):  # `C) 42` of several choices
            yield Words(option[1].lower())
        return
    if not final.exact and final.text.rstrip(" *\n").endswith("!"):  # it may end a sentence or be a factorial
        yield from _read(final.text.rstrip(" *!\n"), percent)
    if found := list(_read(final.text, percent)):
        yield from found
        return
    if final.exact and not re.search(r"[A-Za-z]{2,}.*\d|\d.*[A-Za-z]{2,}", final.text):
        return
    sentence = re.split(r"(?<=\w)[.!?](?=\s)", final.text)[0]
    if found := list(_read(sentence, percent)):
        yield from found
        return
    for run in runs(sentence[:MAX_SENTENCE])[:MAX_TRIED]:
        if _is_denied(run, sentence):
            return
        if found := list(_read(run.text, percent)):
            yield from found
            return


def _is_denied(run: Final, text: str) -> bool:
    """Whether the run is a relation that the words around it deny: it says the opposite of what it would alone."""
    if not ("=" in run.text or INEQUALITY.search(run.text)):
        return False
    end = max(text.find(run.text, run.at), run.at) + len(run.text)  # `at` is that of the sign in front of a formula
    return bool(NOT.search(text[max(0, run.at - NEAR) : run.at]) or NOT_SO.match(text[end : end + NEAR]))


def _is_union(expected: Value) -> bool:
    return isinstance(expected, Atom) and "\\cup" in expected.formula


def _last_run(text: str, expected: Value, percent: str, cut: bool) -> Iterator[Value]:
    found = runs(text)
    if not found or (cut and found[-1].open) or _is_denied(found[-1], text):
        return
    last = found[-1].text
    if (isinstance(expected, Listing) and not expected.brackets) or _is_union(expected):
        joined = re.search(r"[^.!?\n]*\Z", text.rstrip(" .\n"))
        for tail in _tails(joined[0] if joined else ""):
            if read := list(_read(tail, percent)):
                yield from read
                return
    if read := list(_read(last, percent)):
        yield from read
    elif " " in last:  # several words: take the last
        yield from _read(last.split()[-1], percent)


def _tails(sentence: str) -> Iterator[str]:
    """The ends of a sentence that may be lists, the longest first."""
    words = sentence.split()[-MAX_WORDS:]
    for start in range(len(words)):
        tail = " ".join(words[start:])
        if re.search(r",|\b(?:and|or)\b", tail):
            yield tail


def _read(text: str, percent: str) -> Iterator[Value]:
    """What the text may mean: all of it, what follows an introduction (`Therefore, x = 5`), and the exact value beside its
    rounding (`\\sqrt{2} \\approx 1.41`)."""
    for part in (text, *APPROXIMATELY.split(text, maxsplit=1)[:-1]):
        try:
            read = value(part, percent)
        except (Unreadable, RecursionError):
            continue
        if not isinstance(read, Words) or len(read.text) == 1:
            yield read
        if (
            isinstance(read, Listing)
            and not read.brackets
            and isinstance(first := read.items[0], Words)
            and len(first.text) > 1
        ):
            yield read.items[1] if len(read.items) == 2 else Listing("", read.items[1:])
