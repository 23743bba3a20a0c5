"""For terminals with a limited encoding: replacements for the characters that the stream's encoding does not have."""

import codecs
import sys
from io import TextIOWrapper

HANDLER = "ratchet.ascii"
STANDS_FOR = {
    **dict.fromkeys("─━╌╴╶", "-"),
    **dict.fromkeys("│┃╎╵╷", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯", "+"),
    **dict(zip("▁▂▃▄▅▆▇█", "_.,-=+*#", strict=True)),
    "…": "...",
    "⏎": "\\n",
    "·": "-",
    "→": "->",
    "•": "*",
}
BRAILLE = range(0x2800, 0x2900)  # the characters that curves are drawn with


def _instead(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_one, error.object[error.start : error.end])), error.end


def _one(char: str) -> str:
    if ord(char) in BRAILLE:
        return "*" if ord(char) > BRAILLE.start else " "
    return STANDS_FOR.get(char) or char.encode("ascii", "backslashreplace").decode()


def adapt_streams() -> None:
    """Make printing replace characters that the terminal cannot show, instead of raising."""
    codecs.register_error(HANDLER, _instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors=HANDLER)
