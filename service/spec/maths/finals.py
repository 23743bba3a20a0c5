"""Finds an answer's final result: in a box, in an <answer> tag, after #### or "answer:", else at the end of the text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from service.spec.maths.units import is_unit
from service.spec.maths.values import FUNCTIONS, PROSE

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
TAG = re.compile(r"<answer>(?P<inside>.*?)(?P<end></answer>|\Z)", re.DOTALL | re.IGNORECASE)
HASHES = re.compile(r"^[ \t]*####[ \t]*(?P<inside>[^\n#][^\n]*)", re.MULTILINE)
SAYS = re.compile(
    r"(?:\banswers?\b[*_\"]*(?:\s+(?:to|of|for|in)\s[^.\n:=]{1,60}?)?[*_]*\s*(?:(?:is|are|was|be|equals)\b\s*:?|[:=])|答案\s*[是为:]+)"
    r"[*_\s]*(?P<inside>[^\n]+)",
    re.IGNORECASE,
)
MAX_BOXES = 20  # the last ones
ORDINAL = re.compile(r"\d+(?:st|nd|rd|th)", re.IGNORECASE)
MATHS = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)((?:[^$\n]|\\\$)+?)(?<=\S)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
UNFINISHED = re.compile(r"[\w.,^/*+\-\\{}(\[=%$]\Z")


@dataclass(frozen=True)
class Final:
    """A text that may be the final answer. `open`: it reaches the end of the sampled text, so it may be incomplete.
    `exact`: all of it is the answer, without prose."""

    text: str
    at: int
    open: bool = False
    exact: bool = False


def marked(text: str) -> list[Final]:
    """The texts in boxes, in tags and after marks, the last first."""
    finals = [*_boxes(text)]
    finals += [Final(match["inside"], match.start("inside"), not match["end"]) for match in TAG.finditer(text)]
    for pattern, exact in ((HASHES, True), (SAYS, False)):
        finals += [
            Final(match["inside"], match.start("inside"), match.end() == len(text), exact)
            for match in _overlapping(pattern, text)
        ]
    return sorted(finals, key=lambda final: final.at, reverse=True)


def _overlapping(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """All matches, including marks inside the line of another mark: `the answer is 41. No, the answer is 42`."""
    at = 0
    while match := pattern.search(text, at):
        yield match
        at = match.start("inside")


def _boxes(text: str) -> Iterator[Final]:
    for match in list(BOX.finditer(text))[-MAX_BOXES:]:
        if not match["brace"]:
            yield Final(*_word(text, match.end()), exact=True)
            continue
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        yield Final(text[match.end() : end - (depth == 0)], match.end(), depth > 0, exact=True)


def _word(text: str, start: int) -> tuple[str, int, bool]:
    match = re.compile(r"\s*(\S+)").match(text, start)
    return (match[1], match.start(1), match.end() == len(text)) if match else ("", start, True)


def neighbours(text: str) -> list[str]:
    """The contents of the last boxes that have only `and`, commas or dollar signs between them."""
    boxes = list(_boxes(text))
    together = boxes[-1:]
    for box in reversed(boxes[:-1]):
        between = text[box.at + len(box.text) + 1 : together[0].at]
        if not re.fullmatch(r"[\s,;$]*(?:\\text\{\s*)?(?:and|or)?[\s}$,]*(?:[a-z]\s*=\s*)?\\(?:boxed|fbox)\s*\{", between):
            break
        together.insert(0, box)
    return [box.text for box in together]


def runs(text: str) -> list[Final]:
    """Formulas and numbers in prose, in order: the texts between math signs, and words of digits, signs and letters."""
    finals, end = [], 0
    for match in MATHS.finditer(text):
        inside = next(group for group in match.groups() if group is not None)
        if (
            any(len(word) > 3 and word not in FUNCTIONS for word in re.findall(r"(?<![\\{A-Za-z])[A-Za-z]+", inside))
            and "\\" not in inside
        ):
            continue
        finals += [*_plain_runs(text[end : match.start()], end, False), Final(inside, match.start(), exact=True)]
        end = match.end()
    return [*finals, *_plain_runs(text[end:], end, True)]


def _plain_runs(text: str, offset: int, last: bool) -> Iterator[Final]:
    run: list[str] = []
    start = 0
    tokens = [(match[0], match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    for number, (token, begins, ends) in enumerate(tokens):
        kind, bare = _kind(token)
        if kind and not (run and _bullet(text, begins, token)):
            start = start if run else begins
            run.append(bare)
            if (bare == token or token.endswith(",")) and (number + 1 < len(tokens) or not last):
                continue
        if run:
            following = "" if kind else _unit_of([token for token, _, _ in tokens[number : number + 4]])
            whole = " ".join([*run, following]).strip()
            reaches = last and kind and ends == len(text) and bool(UNFINISHED.search(text))
            minus = re.search(r"\b(?:minus|negative)\s+\Z", text[max(0, start - 12) : start], re.IGNORECASE)
            if re.search(r"\d|\\[a-z]|[a-z]\s*[-+*/^=]|[-+*/^=]\s*[a-z]", whole):
                yield Final(
                    ("-" if minus and whole[0].isdigit() else "") + _without_bullet(whole, text, start), offset + start, reaches
                )
        run = []


def _kind(token: str) -> tuple[bool, str]:
    """Whether the word belongs to a formula, and the word without Markdown's signs and final punctuation."""
    bare = token.strip("*_`\"'").rstrip(".:;!?*_`\"'").removeprefix("*").strip("*_`")
    bare = re.sub(r"^=+$", "=", bare) or bare
    if not bare:
        return token in ("-", "+", "*", "/", "="), token
    if re.fullmatch(r"[-+*/^=,<>~]|\\(?:times|cdot|pm|le|ge|frac|pi|infty|cup)\b.*", bare):
        return True, bare
    letters = re.findall(r"[A-Za-z]+", re.sub(r"\\[a-zA-Z]+", "", bare))
    known = all(len(word) == 1 or word in FUNCTIONS or is_unit(word) or (len(word) < 4 and bare != word) for word in letters)
    if not known or ORDINAL.fullmatch(bare) or any(word.casefold() in PROSE for word in letters):
        return False, bare
    if any(sign.isdigit() for sign in bare):
        return bool(not letters or re.match(r"[-+(\[{]*[\d.]", bare) or re.search(r"[-+*/^=(\\{]", bare)), bare
    return bare not in ("a", "A", "I") and bool(
        re.fullmatch(r"[a-zA-Z]|[({\[]+[-+]?[a-zA-Z\\].*|.*[a-zA-Z][)}\]]+,?|.*[-+*/^=\\].*", bare)
    ), bare


def _unit_of(words: list[str]) -> str:
    """The unit at the start of the words: `square feet in all` -> `square feet`."""
    words = [word.rstrip(".,;:!?*") for word in words]
    if words and (
        words[0] in ("%", "percent", "pct") or words[0].casefold() in ("million", "billion", "thousand", "trillion", "dozen")
    ):
        return words[0]
    return next(
        (" ".join(words[:count]) for count in (3, 2, 1) if len(words) >= count and is_unit(" ".join(words[:count]))), ""
    )


def _bullet(text: str, start: int, token: str) -> bool:
    return token in ("-", "*", "+") and "\n" in text[:start][len(text[:start].rstrip()) :]


def _without_bullet(run: str, text: str, start: int) -> str:
    """Remove a minus at the start of a line if other lines start with one too: it marks a list item."""
    line_start = start == 0 or text[:start].rstrip(" ").endswith("\n")
    bullet = line_start and re.match(r"[-*+]\s", run) and len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)) > 1
    return run[1:].strip() if bullet else run
