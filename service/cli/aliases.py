"""Commands about aliases: names that point at a checkpoint."""

from typing import Annotated

import typer

from service.cli.completion import complete_alias, complete_checkpoint, complete_checkpoint_or_alias
from service.cli.connection import connect
from service.cli.helps import command, group
from service.cli.jobs import Json
from service.cli.output import ago, clean, complain, print_facts, print_json, print_table, say
from service.cli.resources import After, Limit

AliasName = Annotated[
    str, typer.Argument(metavar="ALIAS", help="MODEL@ALIAS, such as digits@production", autocompletion=complete_alias)
]
Expected = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="only if it points at this one now; none: only if there is no such alias",
        autocompletion=complete_checkpoint,
    ),
]
Note = Annotated[str | None, typer.Option(help="why: it stands in the history")]


def register(app: typer.Typer) -> None:
    command(app, promote)
    group(app, "aliases", list_aliases, show=show, history=history, rollback=rollback, delete=delete)


def promote(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="ckpt_..., or another alias", autocompletion=complete_checkpoint_or_alias),
    ],
    alias: AliasName,
    expected: Expected = None,
    note: Note = None,
    as_json: Json = False,
) -> None:
    """Let an alias point at a checkpoint, which is kept from then on. A new alias is made.

    $ ratchet promote ckpt_01k... digits@staging
    $ ratchet promote digits@staging digits@production --note "0.98 held out"
    $ ratchet promote ckpt_01m... digits@production --expected ckpt_01k...

    OpenAI's clients name it as their model, jobs as model.from_checkpoint; `ratchet sample` and `ratchet export` take it, too.
    """
    with connect(context) as ratchet:
        made = ratchet.promote(checkpoint, alias, expected=expected, note=note)
    if as_json:
        print_json(made)
    else:
        say(f"{made['id']} points at {made['checkpoint_id']}")


def list_aliases(context: typer.Context, limit: Limit = 20, after: After = None, as_json: Json = False) -> None:
    """List aliases, look at their history, roll back and delete them. `ratchet promote` makes and moves them.

    $ ratchet aliases
    $ ratchet aliases history digits@production
    $ ratchet aliases rollback digits@production --note "it loops"
    """
    if context.invoked_subcommand is not None:
        return
    with connect(context) as ratchet:
        page = ratchet.list_aliases(after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (alias["id"], alias["checkpoint_id"], alias["step"], ago(alias["changed_at"]), alias["changed_by"], alias["note"] or "")
        for alias in page["data"]
    ]
    print_table(("alias", "checkpoint", "step", "changed", "by", "note"), rows, nothing="no aliases")
    if page["has_more"]:
        complain(f"more: ratchet aliases --after {page['last_id']}")


def show(context: typer.Context, alias: AliasName, as_json: Json = False) -> None:
    """Show one alias."""
    with connect(context) as ratchet:
        found = ratchet.get_alias(alias)
    if as_json:
        print_json(found)
    else:
        print_facts({name: value for name, value in found.items() if name != "object"})


def history(context: typer.Context, alias: AliasName, limit: Limit = 20, after: After = None, as_json: Json = False) -> None:
    """Show what an alias pointed at, newest first: who changed it, when and why."""
    with connect(context) as ratchet:
        page = ratchet.alias_history(alias, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            change["seq"],
            change["created_at"][:19],
            change["action"],
            change["from_checkpoint_id"],
            change["checkpoint_id"],
            change["key_name"] or change["key_id"],
            change["note"] or "",
        )
        for change in page["data"]
    ]
    print_table(("seq", "when (UTC)", "what", "from", "to", "by", "note"), rows, nothing="")
    if page["has_more"]:
        complain(f"more: ratchet aliases history {clean(alias)} --after {page['last_id']}")


def rollback(
    context: typer.Context, alias: AliasName, expected: Expected = None, note: Note = None, as_json: Json = False
) -> None:
    """Promote the checkpoint that an alias pointed at before. Repeated, it goes further back."""
    with connect(context) as ratchet:
        found = ratchet.rollback_alias(alias, expected=expected, note=note)
    if as_json:
        print_json(found)
    else:
        say(f"{found['id']} points at {found['checkpoint_id']} again")


def delete(context: typer.Context, alias: AliasName, expected: Expected = None, note: Note = None) -> None:
    """Delete an alias. Its checkpoint and its history stay."""
    with connect(context) as ratchet:
        ratchet.delete_alias(alias, expected=expected, note=note)
    say(f"{clean(alias)} deleted")
