"""`ratchet doctor`: what is wrong with this installation, and how to mend it."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.cli import exits
from service.cli.helps import command
from service.cli.jobs import Json
from service.cli.output import clean, complain, print_json, say
from service.cli.stack import DEFAULT_DATA_DIR
from service.validation.environment import why_refused

SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def register(app: typer.Typer) -> None:
    command(app, doctor)


def doctor(
    data_dir: Annotated[
        Path, typer.Option(envvar="RATCHET_DATA_DIR", help="where the system keeps its files")
    ] = DEFAULT_DATA_DIR,
    as_json: Json = False,
) -> None:
    """Look at everything that the service stands on, and say what is wrong and how to mend it.

    $ ratchet doctor
    $ ratchet doctor --data-dir ~/.ratchet --json

    Runs where the service runs, with its RATCHET_* settings: versions, settings, disk, database, migrations, clock, Redis,
    workers, the service itself, GPU, model folders. Nothing is changed. The exit status is 1 if there is an error; warnings
    leave it 0.
    """
    from service.local.doctor import examine
    from service.settings import Settings

    try:
        found = examine(Settings(data_dir=data_dir))
    except ValidationError as error:
        complain(f"error: {why_refused(error)}")
        raise typer.Exit(exits.REFUSED) from None
    if as_json:
        print_json({"object": "list", "data": [finding.as_dict() for finding in found]})
    else:
        for finding in found:
            say(f"{SIGNS[finding.status]}  {finding.check}: {clean(finding.detail)}")
            if finding.remedy is not None:
                say(f"         -> {clean(finding.remedy)}")
    if any(finding.status == "error" for finding in found):
        raise typer.Exit(exits.REFUSED)
