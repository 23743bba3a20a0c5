"""What the service knows of the built-in tiny model without torch: the characters of its tokenizer.

One character is one token. Nothing is put before a prompt, and an answer ends with one end token. The worker builds the
tokenizer from TINY_CHARACTERS, so prompts with other characters are refused before the job is queued.
"""

import string

TINY_CHARACTERS = string.digits + string.ascii_lowercase + " \n" + "+-*/=<>().,:;?!'"
_KNOWN = frozenset(TINY_CHARACTERS)


def strange_characters(text: str) -> str:
    """The characters of `text` that the tiny tokenizer does not know, each once, in order."""
    if _KNOWN.issuperset(text):  # fast path, because all characters of all rows are checked
        return ""
    return "".join(dict.fromkeys(sign for sign in text if sign not in _KNOWN))
