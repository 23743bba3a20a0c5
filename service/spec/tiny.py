"""The built-in tiny model as the service knows it without torch: what its character tokenizer can say.

One character is one token; nothing stands before a prompt, and an answer ends with one end token. The worker builds the
tokenizer from TINY_CHARACTERS, so a prompt that it could not read is refused before the job is queued.
"""

import string

TINY_CHARACTERS = string.digits + string.ascii_lowercase + " \n" + "+-*/=<>().,:;?!'"
_KNOWN = frozenset(TINY_CHARACTERS)


def strange_characters(text: str) -> str:
    """The characters of `text` that the tiny tokenizer does not know, each once, in order."""
    if _KNOWN.issuperset(text):  # every character of every row passes here
        return ""
    return "".join(dict.fromkeys(sign for sign in text if sign not in _KNOWN))
