"""Finds a Ratchet: first by the environment, then by the files that `ratchet up` wrote into its data directory.

A local stack writes two files, `url` (while it runs) and `key`. A key from a file is sent only to the URL in the same folder.
"""

import os
from difflib import get_close_matches
from pathlib import Path

from ratchet_client.errors import RatchetNotFound

URL_VARIABLE, KEY_VARIABLE, DATA_DIR_VARIABLE = "RATCHET_URL", "RATCHET_API_KEY", "RATCHET_DATA_DIR"


def data_dirs(data_dir: Path | None = None) -> list[Path]:
    """The folders where a local stack's files may be: `data_dir` if given, else ./.ratchet, then ~/.ratchet."""
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    return [Path(named)] if named else [Path(".ratchet"), Path.home() / ".ratchet"]


def find(url: str | None = None, api_key: str | None = None, data_dir: Path | None = None) -> tuple[str, str]:
    """Address and key. Raises RatchetNotFound, which says where it looked and what to do."""
    url = url or (os.environ.get(URL_VARIABLE) if data_dir is None else None)
    api_key = api_key or (os.environ.get(KEY_VARIABLE) if data_dir is None else None)
    if data_dir is None:  # or a local stack would be asked what was meant for another service
        for variable, given in ((URL_VARIABLE, url), (KEY_VARIABLE, api_key)):
            if given is None and (misspelt := get_close_matches(variable, _others(variable), n=1, cutoff=0.84)):
                raise RatchetNotFound(f"{misspelt[0]} sets nothing; did you mean {variable}?")
    folders = data_dirs(data_dir)
    for folder in folders:
        if url and api_key:
            break
        local = _line(folder / "url")
        if local is not None and (url is None or url.rstrip("/") == local):
            url, api_key = url or local, api_key or _line(folder / "key")
    looked = " and ".join(str(folder.absolute()) for folder in folders)
    if url is None:
        raise RatchetNotFound(
            f"no Ratchet found: {URL_VARIABLE} is not set, and no stack runs from {looked}. "
            f"Start one with `ratchet up`, or set {URL_VARIABLE} and {KEY_VARIABLE}"
        )
    if api_key is None:
        raise RatchetNotFound(f"no API key for {url}: set {KEY_VARIABLE} (looked for a local stack's key in {looked})")
    return url, api_key


def _others(variable: str) -> list[str]:
    """What may be meant for it: not RATCHET_API_KEY_FILE, which somebody else's program may read."""
    known = (URL_VARIABLE, KEY_VARIABLE)
    return [n for n in os.environ if n.startswith("RATCHET_") and n not in known and not n.startswith(f"{variable}_")]


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RatchetNotFound(f"cannot read {path}: {error.strerror}") from None
