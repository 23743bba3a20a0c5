"""Commands about everything that is not a job: checkpoints, datasets, models, keys."""

from pathlib import Path
from typing import Annotated

import typer

from ratchet_client.types import Checkpoint
from service.cli.connection import connect
from service.cli.headline import EVAL
from service.cli.helps import command, group
from service.cli.jobs import Json
from service.cli.output import ago, complain, number, print_facts, print_json, print_table, say, shown, size

CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="ckpt_...")]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="ds_...")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="how many")]
After = Annotated[str | None, typer.Option(help="go on behind this one (the last id of a page)")]


def register(app: typer.Typer) -> None:
    group(app, "checkpoints", list_checkpoints, show=show_checkpoint, download=download, delete=delete_checkpoint)
    group(app, "datasets", list_datasets, upload=upload, show=show_dataset, rows=rows, delete=delete_dataset)
    command(app, models)
    group(app, "keys", list_keys, create=create_key, revoke=revoke_key)


# ---------------------------------------------------------------- checkpoints


def list_checkpoints(
    context: typer.Context,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="only those of this job")] = None,
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
            one["id"],
            one["job_id"],
            one["step"],
            one["adapter"],
            size(one["size_bytes"]),
            _score(one),
            ago(one["created_at"]),
        )
        for one in page["data"]
    ]
    print_table(("checkpoint", "job", "step", "adapter", "size", "reward", "created"), rows, nothing="no checkpoints")
    if page["has_more"]:
        complain(f"more: ratchet checkpoints --after {page['last_id']}")


def download(
    context: typer.Context,
    checkpoint_id: CheckpointId,
    to: Annotated[Path | None, typer.Option(help="a new folder; default: the checkpoint's id")] = None,
) -> None:
    """Fetch a checkpoint into a new folder.

    Its `model/` loads in transformers (or peft) as it is. Every file is compared with its sha256.
    """
    with connect(context) as ratchet:
        folder = ratchet.download_checkpoint(checkpoint_id, to or Path(checkpoint_id))
    say(f"{folder}/  (the model is in {folder / 'model'})")


def show_checkpoint(context: typer.Context, checkpoint_id: CheckpointId, as_json: Json = False) -> None:
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


def _score(checkpoint: Checkpoint) -> str:
    return number(checkpoint["metrics"].get(EVAL))


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
        (one["id"], one["name"], one["rows"], size(one["size_bytes"]), list(one["columns"]), ago(one["created_at"]))
        for one in page["data"]
    ]
    print_table(("dataset", "name", "rows", "size", "columns", "created"), rows, nothing="no datasets")
    if page["has_more"]:
        complain(f"more: ratchet datasets --after {page['last_id']}")


def upload(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSONL: one JSON object a line", exists=True, dir_okay=False, readable=True)],
    name: Annotated[str | None, typer.Option(help="default: the file's name")] = None,
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
        say(f"{dataset['id']}  {dataset['rows']} rows, columns {', '.join(dataset['columns'])}")


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
    offset: Annotated[int, typer.Option(min=0, help="rows to skip")] = 0,
    limit: Limit = 10,
) -> None:
    """Print rows of a dataset as JSONL."""
    with connect(context) as ratchet:
        for row in ratchet.dataset_rows(dataset_id, offset=offset, limit=limit):
            print(shown(row))


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
    rows = [(one["id"], one["kind"], one["description"]) for one in page["data"]]
    print_table(("model.source", "kind", "what it is"), rows, nothing="no models")


def list_keys(context: typer.Context, as_json: Json = False) -> None:
    """List, make and revoke API keys.

    $ RATCHET_API_KEY=$(ratchet keys create laptop)
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_keys()
    if as_json:
        print_json(page)
        return
    table = [
        (one["id"], one["name"], one["project"], f"...{one['ends_with']}", ago(one["created_at"]), ago(one["last_used_at"]))
        for one in page["data"]
    ]
    print_table(("key", "name", "project", "ends with", "created", "last used"), table, nothing="no keys")


def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="what it is for")],
    project: Annotated[str | None, typer.Option(help="default: the project of the key in use")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key; its text is shown this once."""
    with connect(context) as ratchet:
        key = ratchet.create_key(name, project=project)
    if as_json:
        print_json(key)
        return
    print(key["key"])
    complain(f"this is the only time that {key['id']} is shown")


def revoke_key(context: typer.Context, key_id: Annotated[str, typer.Argument(metavar="KEY", help="key_...")]) -> None:
    """Revoke an API key; it stops working at once."""
    with connect(context) as ratchet:
        ratchet.delete_key(key_id)
    say(f"{key_id} revoked")
