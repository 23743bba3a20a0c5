"""Commands that run the stack on this machine: up, down, demo."""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.cli import exits
from service.cli.connection import Target
from service.cli.helps import command
from service.cli.output import complain, say
from service.errors import RatchetError as ServiceError
from service.validation.environment import why_refused

DEFAULT_DATA_DIR = Path(".ratchet")


def register(app: typer.Typer) -> None:
    command(app, up)
    command(app, down)
    command(app, demo)
    command(app, backup)
    command(app, restore)


def up(
    data_dir: Annotated[
        Path,
        typer.Option(
            envvar="RATCHET_DATA_DIR", help="the directory for everything that is kept: the store, checkpoints, the key, logs"
        ),
    ] = DEFAULT_DATA_DIR,
    port: Annotated[
        int, typer.Option(envvar="RATCHET_PORT", min=0, max=65535, help="the port of the API; 0: any free one")
    ] = 8000,
) -> None:
    """Run the whole stack on this machine.

    $ ratchet up
    $ ratchet up --data-dir ~/.ratchet --port 8080

    API, workers, Redis and SQLite, until Ctrl-C, which saves the running job and stops everything. The API key is written
    to DATA_DIR/key (readable by you only), the address to DATA_DIR/url; the other commands find both there. Started again
    on the same directory, it goes on where it was, also after a crash. RATCHET_HOST says on which address it listens
    (default 127.0.0.1), and every other RATCHET_* setting applies, too, except RATCHET_DATABASE_URL and RATCHET_REDIS_URL: it
    brings its own.
    """
    from service.local.up import up as run  # only this command imports the API

    try:
        run(data_dir, port, _say)
    except ServiceError as error:
        complain(f"error: {error.detail}")
        raise typer.Exit(exits.REFUSED) from None
    except OSError as error:
        complain(f"error: {data_dir} cannot be used: {error.strerror or error}")
        raise typer.Exit(exits.REFUSED) from None
    except ValidationError as error:
        complain(f"error: {why_refused(error)}")
        raise typer.Exit(exits.REFUSED) from None


def down(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="RATCHET_DATA_DIR", help="the directory that it runs from  [default: .ratchet]"),
    ] = None,
) -> None:
    """Stop the stack that runs on this machine.

    $ ratchet down
    $ ratchet down --data-dir ~/.ratchet

    As Ctrl-C does in the terminal of `ratchet up`: the running job is saved, and everything is stopped when this returns. The
    next `ratchet up` on the directory goes on where it was.
    """
    from service.local.down import down as run

    target = context.find_object(Target) or Target()
    try:
        run(data_dir or target.data_dir or DEFAULT_DATA_DIR, _say)
    except ServiceError as error:
        complain(f"error: {error.detail}")
        raise typer.Exit(exits.REFUSED) from None


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone, but everything must still be stopped
        print(line, flush=True)


def demo(
    context: typer.Context,
    data_dir: Annotated[Path | None, typer.Option(help="keep everything in this directory; default: a temporary one")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="FOLDER", help="keep the model in this new folder")] = None,
    seed: Annotated[int, typer.Option(min=0, help="the seed from which every random draw derives")] = 0,
) -> None:
    """Watch a small model learn to reverse digits.

    $ ratchet demo
    $ ratchet demo --keep my-model
    $ ratchet --url http://127.0.0.1:8000 demo

    A supervised warm-up job, then a GSPO job that learns from nothing but whether its own sampled answers were right.
    Starts a stack of its own, unless a running one is named. Takes one to two minutes on two CPU cores; the last line of
    standard output is `held-out exact match: BEFORE -> AFTER`.
    """
    from service.cli.demo import run

    target = context.find_object(Target) or Target()
    try:
        run(url=target.url, stack_dir=target.data_dir, data_dir=data_dir, keep=keep, seed=seed)
    except KeyboardInterrupt:
        complain("\nstopped")
        raise typer.Exit(exits.INTERRUPTED) from None


BackupDir = Annotated[Path, typer.Argument(metavar="DIR", help="the backup's folder")]
DataDir = Annotated[Path, typer.Option(envvar="RATCHET_DATA_DIR", help="where the system keeps its files")]


def backup(directory: BackupDir, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Copy a running system's store and files into a new folder.

    $ ratchet backup /backups/2026-11-22

    Runs where the data directory is, with the RATCHET_* settings of the system. Nothing is stopped. docs/backup.md has the
    rest.
    """
    from service.local import backup as backups

    facts = _with_settings(data_dir, lambda settings: backups.backup(settings, directory))
    say(f"{directory}: {_held(facts)}")
    if facts["lost"]:
        complain(f"lost before this backup: {len(facts['lost'])}, such as {', '.join(facts['lost'][:5])}")


def restore(directory: BackupDir, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Put a backup into a new data directory and an empty database.

    $ ratchet restore /backups/2026-11-22 --data-dir ~/.ratchet-restored

    Then start the system there: its jobs go on from their last checkpoints. See to it that the old one does not run.
    """
    from service.local import backup as backups
    from service.local.place import locked

    def work(settings: Any) -> dict[str, Any]:
        with locked(data_dir):  # `ratchet up` and another restore wait elsewhere
            return backups.restore(settings, directory)

    facts = _with_settings(data_dir, work)
    say(f"restored: {_held(facts)}")
    say(f"jobs that ran then are queued: {', '.join(facts['queued']) or 'none'}")


def _held(facts: dict[str, Any]) -> str:
    made_at = datetime.fromisoformat(facts["made_at"])
    return f"the database as of {made_at:%Y-%m-%d %H:%M:%S} UTC; checkpoints and datasets: {facts['blobs']}"


def _with_settings(data_dir: Path, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    from service.settings import Settings

    try:
        return work(Settings(data_dir=data_dir))
    except ServiceError as error:
        complain(f"error: {error}")
        raise typer.Exit(exits.REFUSED) from None
    except ValidationError as error:
        complain(f"error: {why_refused(error)}")
        raise typer.Exit(exits.REFUSED) from None
