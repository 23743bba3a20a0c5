"""`ratchet export checkpoint`: a checkpoint's model into a folder or a bucket, with a model card, as other tools load it."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from ratchet_client import RatchetError
from service.cli.completion import complete_checkpoint_or_alias
from service.cli.connection import connect
from service.cli.output import say

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LOADING = "## How to load it"
MERGED = f"""{LOADING}

The adapter is merged into the weights. From this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
GGUF = f"""{LOADING}

`{{file}}` holds the whole model and its tokenizer, as llama.cpp and what is built on it read them:

```sh
llama-server -m {{file}}
```
"""


class OutType(StrEnum):
    """Of the matrices in a GGUF file; vectors stay float32."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def export_checkpoint(
    context: typer.Context,
    checkpoint_id: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="ckpt_..., or an alias", autocompletion=complete_checkpoint_or_alias)
    ],
    to: Annotated[str, typer.Option(metavar="WHERE", help="a new folder, or a bucket: s3://bucket/path, gs://, az://")],
    merged: Annotated[bool, typer.Option("--merged", help="merge an adapter into the base's weights")] = False,
    gguf: Annotated[
        OutType | None, typer.Option("--gguf", help="merge, and write one GGUF file with weights of this type")
    ] = None,
) -> None:
    """Write a checkpoint's model as other tools load it, with a model card.

    $ ratchet export checkpoint ckpt_01k... --to additions
    $ ratchet export checkpoint digits@production --to digits
    $ ratchet export checkpoint ckpt_01k... --to s3://models/additions --merged
    $ ratchet export checkpoint ckpt_01k... --to additions-gguf --gguf q8_0

    A LoRA checkpoint becomes a peft adapter, or with --merged a transformers folder (which needs what a worker needs, and the
    base model); one of all weights is a transformers folder as it is. With --gguf it is model-TYPE.gguf for
    llama.cpp: Llama, Qwen2 and Qwen3 with a byte-level BPE tokenizer. Buckets are found by the variables of their command
    line tools: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL ...
    """
    bucket = _bucket(to) if "://" in to else None
    folder = Path(to).absolute()
    if bucket is None and folder.is_symlink():
        raise RatchetError(f"{to} is a link; name a new folder")
    if bucket is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RatchetError(f"{to} is there already; name a new folder")
    if bucket is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        connect(context) as ratchet,
        tempfile.TemporaryDirectory(prefix=".ratchet-export-", dir=None if bucket else folder.parent) as temporary,
    ):  # beside the folder, so that it appears whole
        checkpoint = ratchet.get_checkpoint(checkpoint_id)
        checkpoint_id = checkpoint["id"]  # of an alias: what it points at now
        merging = gguf is not None or (merged and checkpoint["adapter"] == "lora")
        try:
            got = ratchet.download_checkpoint(checkpoint_id, Path(temporary) / "checkpoint", optimizer=False)
            made = _merged(got, checkpoint["model"], Path(temporary) / "merged", gguf, to) if merging else got / "model"
            text = card(
                ratchet.checkpoint_card(checkpoint_id), checkpoint["model"], checkpoint["adapter"], merged=merging, gguf=gguf
            )
            (made / "README.md").write_text(text, "utf-8")
        except OSError as error:  # a full disk: name what was asked for, or the place where it is put together
            if not error.strerror:
                raise
            raise OSError(error.errno, error.strerror, temporary if bucket else to) from error
        if bucket is not None:
            _upload(made, bucket, to)
        else:
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    say(f"{checkpoint_id} written to {to}")


def card(text: str, model: Mapping[str, Any], adapter: str, *, merged: bool, gguf: OutType | None = None) -> str:
    """The checkpoint's card as a model card: with the fields that model hubs read, and paths from the exported folder."""
    is_adapter = adapter == "lora" and not merged
    library = "gguf" if gguf else "peft" if is_adapter else "transformers"
    fields = {"library_name": library, "pipeline_tag": "text-generation"}
    if HUB_ID.fullmatch(source := str(model.get("source"))):
        fields |= {"base_model": source}
    head = "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
    if merged:
        text = text.partition(LOADING)[0] + (GGUF.format(file=f"model-{gguf}.gguf") if gguf else MERGED)
    text = re.sub(r'(from_pretrained\((?:base, )?)"model"', r'\1"."', text)
    return f"---\n{head}tags: [ratchet, reinforcement-learning]\n---\n\n{text}"


def _merged(checkpoint: Path, model: Mapping[str, Any], out: Path, gguf: OutType | None, to: str) -> Path:
    if missing := [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]:
        raise RatchetError(f"merging happens on this machine, where {missing[0]} is missing: pip install 'ratchet-rl[worker]'")
    if gguf and find_spec("gguf") is None:
        raise RatchetError("the package gguf is missing: pip install 'ratchet-rl[gguf]'")
    # -P: do not import a `workers` folder in the current directory. Warnings of the packages are not for who exports.
    argv = [sys.executable, "-P", "-W", "ignore", "-m", "workers.merge", str(checkpoint), str(out)]
    if gguf:
        out.mkdir()
        argv[-1:] = [str(out / f"model-{gguf}.gguf"), gguf.value]
    done = subprocess.run(argv, input=json.dumps(model), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RatchetError(f"{to}: it could not be merged: {done.stderr.strip()[-2000:]}")
    return out


def _bucket(url: str) -> Any:
    from service.settings import BUCKETS  # not at the top, as everywhere in the command line: it takes long to load

    parts = urlsplit(url)
    if parts.scheme not in BUCKETS:
        raise RatchetError(f"{parts.scheme}:// is no kind of bucket that this can write to; these are: {', '.join(BUCKETS)}")
    if parts.username is not None or parts.password is not None:
        raise RatchetError("a URL must not hold a key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the like")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise RatchetError(f"obstore is not installed ({error}): pip install 'ratchet-rl[s3]'") from None
    try:
        return from_url(url)
    except Exception as error:  # obstore's own, of several types
        raise RatchetError(f"{url} cannot be used: {error}") from None


def _upload(made: Path, bucket: Any, to: str) -> None:
    """All files, the card last: where there is a README.md, the rest is whole."""
    import obstore

    try:
        if next(iter(bucket.list()), None):
            raise RatchetError(f"{to} has files already; name a new path")
        files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: (path.name == "README.md", path))
        for path in files:
            obstore.put(bucket, path.relative_to(made).as_posix(), path)
    except obstore.exceptions.BaseError as error:
        why = str(error).partition("\n\nDebug source:")[0]  # what follows is for obstore's own developers
        raise RatchetError(f"{to} could not be written: {why}") from None
