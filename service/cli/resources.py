"""Commands about everything that is not a job: checkpoints, datasets, models, keys."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ratchet_client.types import Checkpoint, Key
from service.cli.completion import (
    complete_checkpoint,
    complete_checkpoint_or_alias,
    complete_dataset,
    complete_download,
    complete_job,
    complete_key,
)
from service.cli.connection import connect
from service.cli.helps import command, group
from service.cli.jobs import Json
from service.cli.output import ago, clean, complain, json_text, number, print_facts, print_json, print_table, say, size
from service.metric_names import EVAL_REWARD_MEAN
from service.validation.words import counted

CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="ckpt_...", autocompletion=complete_checkpoint)]
ReadId = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="ckpt_..., or an alias", autocompletion=complete_checkpoint_or_alias)
]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="key_...", autocompletion=complete_key)]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="ds_...", autocompletion=complete_dataset)]
Limit = Annotated[int, typer.Option(min=1, max=100, help="how many to list")]
After = Annotated[str | None, typer.Option(help="continue after this one (the last id of a page)")]


def register(app: typer.Typer) -> None:
    group(
        app,
        "checkpoints",
        list_checkpoints,
        show=show_checkpoint,
        download=download,
        delete=delete_checkpoint,
        pin=pin,
        unpin=unpin,
        lineage=lineage,
        prune=prune,
    )
    group(app, "datasets", list_datasets, upload=upload, show=show_dataset, rows=rows, delete=delete_dataset)
    command(app, models)
    group(app, "keys", list_keys, create=create_key, rotate=rotate_key, revoke=revoke_key)
    command(app, audit)


# ---------------------------------------------------------------- checkpoints


def list_checkpoints(
    context: typer.Context,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="only those of this job", autocompletion=complete_job)] = None,
    limit: Limit = 20,
    after: After = None,
    as_json: Json = False,
) -> None:
    """List, download and delete checkpoints.

    $ ratchet checkpoints --job job_01k...
    $ ratchet checkpoints download ckpt_01k... --to my-model
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_checkpoints(job_id=job, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            checkpoint["id"],
            checkpoint["job_id"],
            checkpoint["step"],
            checkpoint["adapter"],
            size(checkpoint["size_bytes"]),
            _score(checkpoint),
            ago(checkpoint["created_at"]),
            ", ".join(checkpoint.get("aliases", [])),
        )
        for checkpoint in page["data"]
    ]
    names = ("checkpoint", "job", "step", "adapter", "size", "reward", "created", "aliases")
    print_table(names, rows, nothing="no checkpoints")
    if page["has_more"]:
        complain(f"more: ratchet checkpoints --after {page['last_id']}")


def download(
    context: typer.Context,
    checkpoint_id: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="ckpt_..., or an alias", autocompletion=complete_download)
    ],
    to: Annotated[Path | None, typer.Option(help="the new folder; default: one named after the checkpoint")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="the argument is a job: fetch its checkpoint with the best evaluation")
    ] = False,
) -> None:
    """Fetch a checkpoint into a new folder.

    $ ratchet checkpoints download ckpt_01k... --to my-model
    $ ratchet checkpoints download --best job_01k...

    Its `model/` loads in transformers (or peft) as it is, and its README.md says what it is. Every file is compared with
    its sha256.
    """
    with connect(context) as ratchet:
        if best:
            checkpoint_id = ratchet.best_checkpoint(checkpoint_id)["id"]
        folder = ratchet.download_checkpoint(checkpoint_id, to or Path(checkpoint_id))
    say(f"{folder}/  (the model is in {folder / 'model'})")


def show_checkpoint(context: typer.Context, checkpoint_id: ReadId, as_json: Json = False) -> None:
    """Show one checkpoint."""
    with connect(context) as ratchet:
        checkpoint = ratchet.get_checkpoint(checkpoint_id)
    if as_json:
        print_json(checkpoint)
    else:
        print_facts({name: value for name, value in checkpoint.items() if name not in ("object", "links")})


def delete_checkpoint(context: typer.Context, checkpoint_id: CheckpointId) -> None:
    """Delete a checkpoint that no unfinished job needs."""
    with connect(context) as ratchet:
        ratchet.delete_checkpoint(checkpoint_id)
    say(f"{checkpoint_id} deleted")


def pin(context: typer.Context, checkpoint_id: CheckpointId) -> None:
    """Pin a checkpoint: nothing deletes it until it is unpinned."""
    with connect(context) as ratchet:
        ratchet.pin_checkpoint(checkpoint_id)
    say(f"{checkpoint_id} pinned")


def unpin(context: typer.Context, checkpoint_id: CheckpointId) -> None:
    """Unpin a checkpoint: it may be deleted again."""
    with connect(context) as ratchet:
        ratchet.unpin_checkpoint(checkpoint_id)
    say(f"{checkpoint_id} unpinned")


def lineage(context: typer.Context, checkpoint_id: ReadId, as_json: Json = False) -> None:
    """Show where a checkpoint comes from, back to the base model."""
    with connect(context) as ratchet:
        answer = ratchet.checkpoint_lineage(checkpoint_id)
    if as_json:
        print_json(answer)
        return
    rows = [
        (ancestor["checkpoint_id"], ancestor["step"], ancestor["job_id"], ancestor["job_name"], ago(ancestor["created_at"]))
        for ancestor in answer["data"]
    ]
    print_table(("checkpoint", "step", "job", "name", "created"), rows, nothing="")
    revision = answer["base"]["revision"]
    say(f"base: {clean(str(answer['base']['source']))}" + (f" at {clean(revision)}" if revision else ""))


def prune(
    context: typer.Context,
    job: Annotated[
        str | None, typer.Option(metavar="JOB", help="delete checkpoints of this job", autocompletion=complete_job)
    ] = None,
    older_than_s: Annotated[
        float | None, typer.Option(min=0, help="delete checkpoints that were saved more than this many seconds ago")
    ] = None,
    keep_last: Annotated[int, typer.Option(min=0, help="spare this many of the newest checkpoints of each job")] = 0,
    final: Annotated[bool, typer.Option("--final", help="also delete those that were saved at the end of a job")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="really delete; without this the command only shows what it would delete")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete many checkpoints at once. Without --yes, only show what would be deleted.

    $ ratchet checkpoints prune --job job_01k... --keep-last 1
    $ ratchet checkpoints prune --older-than-s 604800 --yes

    What is pinned, or needed by a job that has not ended or by an alias, stays.
    """
    if job is None and older_than_s is None:
        raise typer.BadParameter("say which: --job JOB, --older-than-s SECONDS, or both")
    which = {"job_id": job, "older_than_s": older_than_s, "keep_last": keep_last, "final": final}
    with connect(context) as ratchet:
        answer = ratchet.delete_checkpoints(**which, dry_run=not yes)
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            checkpoint["id"],
            checkpoint["job_id"],
            checkpoint["step"],
            size(checkpoint["size_bytes"]),
            ago(checkpoint["created_at"]),
        )
        for checkpoint in answer["data"]
    ]
    print_table(("checkpoint", "job", "step", "size", "created"), rows, nothing="nothing to delete")
    for kept in answer["kept"]:
        complain(f"{kept['id']} stays: {clean(kept['reason'])}")
    verb = "deleted" if yes else "would go (--yes deletes them)"
    say(
        f"{counted(len(answer['data']), 'checkpoint')}, {size(answer['size_bytes'])}: {verb}"
        + (", and there are more" if answer["has_more"] else "")
    )


def _score(checkpoint: Checkpoint) -> str:
    return number(checkpoint["metrics"].get(EVAL_REWARD_MEAN))


# ---------------------------------------------------------------- datasets


def list_datasets(context: typer.Context, limit: Limit = 20, after: After = None, as_json: Json = False) -> None:
    """List, upload, look into and delete datasets.

    $ ratchet datasets upload rows.jsonl --name gsm8k
    $ ratchet datasets rows ds_01k... --limit 3
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_datasets(after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            dataset["id"],
            dataset["name"],
            dataset["rows"],
            size(dataset["size_bytes"]),
            list(dataset["columns"]),
            ago(dataset["created_at"]),
        )
        for dataset in page["data"]
    ]
    print_table(("dataset", "name", "rows", "size", "columns", "created"), rows, nothing="no datasets")
    if page["has_more"]:
        complain(f"more: ratchet datasets --after {page['last_id']}")


def upload(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="a JSONL file: one JSON object on each line", exists=True, dir_okay=False, readable=True)
    ],
    name: Annotated[str | None, typer.Option(help="the dataset's name; default: the name of the file")] = None,
    as_json: Json = False,
) -> None:
    """Upload a JSONL file.

    Each line is checked; what is wrong is said with its line number, and nothing is kept.
    """
    with connect(context) as ratchet:
        dataset = ratchet.create_dataset(file, name or file.stem)
    if as_json:
        print_json(dataset)
    else:
        say(f"{dataset['id']}  {counted(dataset['rows'], 'row')}, columns {clean(', '.join(dataset['columns']))}")


def show_dataset(context: typer.Context, dataset_id: DatasetId, as_json: Json = False) -> None:
    """Show one dataset and its columns."""
    with connect(context) as ratchet:
        dataset = ratchet.get_dataset(dataset_id)
    if as_json:
        print_json(dataset)
    else:
        print_facts({name: value for name, value in dataset.items() if name not in ("object", "links")})


def rows(
    context: typer.Context,
    dataset_id: DatasetId,
    offset: Annotated[int, typer.Option(min=0, help="how many rows to skip")] = 0,
    limit: Limit = 10,
) -> None:
    """Print rows of a dataset as JSONL."""
    with connect(context) as ratchet:
        for row in ratchet.dataset_rows(dataset_id, offset=offset, limit=limit):
            print(json_text(row))


def delete_dataset(context: typer.Context, dataset_id: DatasetId) -> None:
    """Delete a dataset that no unfinished job needs."""
    with connect(context) as ratchet:
        ratchet.delete_dataset(dataset_id)
    say(f"{dataset_id} deleted")


# ---------------------------------------------------------------- models and keys


def models(context: typer.Context, as_json: Json = False) -> None:
    """List what a job's model.source may name on this service."""
    with connect(context) as ratchet:
        page = ratchet.list_models()
    if as_json:
        print_json(page)
        return
    rows = [(model["id"], model["kind"], model["description"]) for model in page["data"] if model["kind"] != "checkpoint"]
    print_table(("model.source", "kind", "what it is"), rows, nothing="no models")


def list_keys(context: typer.Context, as_json: Json = False) -> None:
    """List, make and revoke API keys.

    $ RATCHET_API_KEY=$(ratchet keys create laptop)
    $ ratchet keys create dashboard --scope read --expires-in-days 30 --requests-per-s 5
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_keys()
    if as_json:
        print_json(page)
        return
    table = [
        (
            key["id"],
            key["name"],
            key["project"],
            f"...{key['ends_with']}",
            key["scopes"][-1],
            _rate(key),
            ago(key["created_at"]),
            (key["expires_at"] or "never")[:16],
            ago(key["last_used_at"]),
        )
        for key in page["data"]
    ]
    columns = ("key", "name", "project", "ends with", "scope", "rate", "created", "expires", "last used")
    print_table(columns, table, nothing="no keys")


class KeyScope(StrEnum):
    read = "read"
    write = "write"
    admin = "admin"


def _rate(key: Key) -> str:
    return "default" if key["rate"] is None else f"{key['rate']['requests_per_s']:g}/s"


def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="what the key is for")],
    project: Annotated[str | None, typer.Option(help="the key's project; default: the project of the key in use")] = None,
    scope: Annotated[
        KeyScope, typer.Option(help="read: only look; write: everything in the project except its keys; admin: keys, too")
    ] = KeyScope.write,
    expires_in_days: Annotated[float, typer.Option(min=0.0001, help="days after which the key stops working")] = 90.0,
    never_expires: Annotated[bool, typer.Option("--never-expires", help="the key works until it is revoked")] = False,
    requests_per_s: Annotated[
        float | None, typer.Option(help="how many requests a second the key may make; default: the operator's setting")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, help="how many requests the key may make at once; needs --requests-per-s")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an API key. Its text is shown only once.

    $ ratchet keys create laptop                                  reads and writes, for 90 days
    $ ratchet keys create operator --scope admin --never-expires
    """
    with connect(context) as ratchet:
        key = ratchet.create_key(
            name,
            project=project,
            scopes=[scope.value],
            expires_in_s=None if never_expires else expires_in_days * 86_400,
            requests_per_s=requests_per_s,
            burst=burst,
        )
    if as_json:
        print_json(key)
        return
    print(key["key"])
    until = f"works until {key['expires_at'][:10]}" if key["expires_at"] else "does not expire"
    complain(f"this is the only time that the key {key['id']} can be read; its scope is {scope.value}, and it {until}")


def revoke_key(context: typer.Context, key_id: KeyId) -> None:
    """Revoke an API key; it stops working at once."""
    with connect(context) as ratchet:
        ratchet.delete_key(key_id)
    say(f"{key_id} revoked")


def rotate_key(
    context: typer.Context,
    key_id: KeyId,
    grace_s: Annotated[float, typer.Option(min=0, help="seconds for which the old key goes on working")] = 86_400.0,
) -> None:
    """Replace an API key by a new one like it; the old one works a while longer."""
    with connect(context) as ratchet:
        key = ratchet.rotate_key(key_id, grace_s=grace_s)
    print(key["key"])
    complain(f"this is the only time that the key {key['id']} can be read; {clean(key_id)} works for {grace_s:g} s more")


def audit(
    context: typer.Context,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="only what this key did", autocompletion=complete_key)] = None,
    about: Annotated[str | None, typer.Option(metavar="ID", help="only what was done to this job, key, webhook ...")] = None,
    limit: Limit = 20,
    after: After = None,
    as_json: Json = False,
) -> None:
    """Show which key changed what, newest first.

    $ ratchet audit --about job_01k...
    """
    with connect(context) as ratchet:
        page = ratchet.audit_log(key_id=key, object_id=about, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            entry["created_at"][:19],
            entry["key_name"] or entry["key_id"],
            entry["action"],
            entry["object_id"] or "",
            entry["request_id"],
        )
        for entry in page["data"]
    ]
    print_table(("when (UTC)", "key", "action", "object", "request"), rows, nothing="nothing was changed")
    if page["has_more"]:
        complain(f"more: ratchet audit --after {page['last_id']}")
