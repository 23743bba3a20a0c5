"""Whether this machine can get a model of the Hugging Face hub: looks into the local cache, then asks the hub once."""

import os
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from urllib.parse import quote

import httpx

YES = ("1", "ON", "YES", "TRUE")


def why_not(hub_id: str, revision: str | None = None, *, within_s: float) -> str | None:
    """Why the model cannot be fetched, or None. Obeys huggingface_hub's variables (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE ...).

    Asks once, for at most `within_s` seconds, and sends no token. If the hub asks for a token and this machine has one, returns
    None: only loading the model shows whether that token is enough.
    """
    if any(_cache().glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json")):
        return None
    if any(os.environ.get(name, "").upper() in YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return f"it is not in {_cache()}, and HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/{hub_id}/resolve/{quote(revision or 'main', safe='')}/config.json"
    answers: Queue[int | str] = Queue()
    # In a separate thread, because no time limit applies during the DNS lookup.
    Thread(target=lambda: answers.put(_ask(url, within_s)), daemon=True).start()
    try:
        answer = answers.get(timeout=within_s)
    except Empty:
        answer = "no answer"
    if isinstance(answer, str):
        return f"it is not in {_cache()}, and {endpoint} did not answer within {within_s:g} s ({answer})"
    if answer == 404:
        return f"{endpoint} has none with a config.json at {revision or 'main'}"
    if answer in (401, 403) and not _has_token():
        return f"{endpoint} has none, or shows it to the owner of a token only (HF_TOKEN)"
    return None


def _ask(url: str, within_s: float) -> int | str:
    try:
        return httpx.head(url, timeout=within_s).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser()


def _cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or _home() / "hub").expanduser()


def _has_token() -> bool:
    path = Path(os.environ.get("HF_TOKEN_PATH") or _home() / "token").expanduser()
    return bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")) or path.is_file()
