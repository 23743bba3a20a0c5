"""The answer of a `sample` operation as both of OpenAI's forms need it: texts without their stops, tokens with log-probs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from service.sessions.codec import as_json

BROKEN = "\ufffd"  # how a token looks that is a part of a character


@dataclass(frozen=True)
class Token:
    text: str
    log_prob: float | None  # None for a prompt's first token: nothing stands before it
    top: list[tuple[str, float]]  # the likeliest first
    start: int  # where it begins and ends in the text, in whole characters: of a character's parts, the last one has it
    end: int


@dataclass(frozen=True)
class Choice:
    """One answer. `tokens` only if log-probs were asked for."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: list[Token] = field(default_factory=list)
    prompt: str = ""  # what stands before the text, where it was asked for


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # all that were sampled: the token that ends an answer too


@dataclass(frozen=True)
class Sampled:
    choices: list[Choice]
    usage: Usage


def cut(text: str, stops: list[str]) -> str:
    """The text up to the first stop."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def held_back(text: str, stops: list[str]) -> str:
    """The text without an end with which a stop may begin: what of a growing answer is certain."""
    text = cut(text, stops)
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[:-length]
    return text


def sampled(raw: bytes, stops: list[str], *, echo: Sequence[str | list[int]] | None = None) -> Sampled:
    """`raw`: the operation's answer. `echo`: the prompts, if they shall stand before the answers."""
    found = as_json(raw)
    count, most = len(found["texts"]), len(found["prompt_tokens"])
    pieces: dict[str, str] | None = found.get("pieces")
    choices: list[Choice] = []
    for place, (text, reason) in enumerate(zip(found["texts"], found["finish_reasons"], strict=True)):
        text, prompt, tokens = cut(text, stops), "", list[Token]()
        if pieces is not None:
            number = place * most // count
            whole = _tokens(pieces, found, place, "tokens", "log_probs", "top_ids", "top_log_probs", "text_ends")
            # Without those behind a stop, and the one that ends a turn.
            tokens = [token for token in whole if reason == "length" or token.start < len(text)]
            if echo is not None:
                sent, shown = echo[number], _prompt_text(found, pieces, number)
                prompt = sent if isinstance(sent, str) else shown
                names = ("prompt_tokens", "prompt_log_probs", "top_prompt_ids", "top_prompt_log_probs", "prompt_ends")
                added = len(shown) - len(prompt) if shown.endswith(prompt) else 0  # by the tokenizer: a begin token
                before = [_moved(token, -added) for token in _tokens(pieces, found, number, *names)]
                tokens = before + [_moved(token, len(prompt)) for token in tokens]
        choices.append(Choice(text, reason, tokens, prompt))
    return Sampled(choices, Usage(sum(map(len, found["prompt_tokens"])), sum(map(len, found["tokens"]))))


def _tokens(
    pieces: dict[str, str],
    found: dict[str, Any],
    place: int,
    ids: str,
    log_probs: str,
    top_ids: str,
    top_log_probs: str,
    ends: str,
) -> list[Token]:
    if log_probs not in found:
        return []
    row, values = found[ids][place], found[log_probs][place]
    # Workers of 29 November 2026 and before do not say where they end.
    marks = [0, *(found[ends][place] if ends in found else accumulate(len(pieces[str(token)]) for token in row))]
    tops = zip(found[top_ids][place], found[top_log_probs][place], strict=True) if top_ids in found else (((), ()),) * len(row)
    return [
        Token(pieces[str(token)], value, [(pieces[str(i)], v) for i, v in zip(*top, strict=True) if v is not None], start, end)
        for token, value, top, (start, end) in zip(row, values, tops, pairwise(marks), strict=True)
    ]


def _prompt_text(found: dict[str, Any], pieces: dict[str, str], number: int) -> str:
    """As the tokenizer shows it, or as its tokens are shown one by one: see above."""
    if "prompt_texts" in found:
        return found["prompt_texts"][number]
    return "".join(pieces[str(token)] for token in found["prompt_tokens"][number])


def _moved(token: Token, by: int) -> Token:
    return replace(token, start=max(0, token.start + by), end=max(0, token.end + by))
