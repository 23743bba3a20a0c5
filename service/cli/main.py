"""The command's entry: global options, the commands of each module, and errors as exit statuses."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ratchet_client import RatchetApiError, RatchetConnectionError, RatchetError, RatchetNotFound
from service.cli import (
    advice,
    aliases,
    compare,
    completion,
    curves,
    doctor,
    exits,
    export,
    helps,
    init,
    jobs,
    resources,
    sample,
    sessions,
    spending,
    stack,
    webhooks,
    workers,
)
from service.cli.ascii import adapt_streams
from service.cli.connection import Target
from service.cli.output import complain, print_error_json, print_problem, say

HELP = """Improve language models by reinforcement learning: GSPO, GRPO and their relatives.

$ ratchet up                          start everything on this machine
$ ratchet demo                        watch a small model learn
$ ratchet validate job.yaml           what the job would be; nothing is created
$ ratchet submit job.yaml --follow    run it, watch it, exit as it does
$ ratchet metrics job_01k...          draw its curves

The service is found through RATCHET_URL and RATCHET_API_KEY, else through the files that `ratchet up` keeps in
RATCHET_DATA_DIR (default: ./.ratchet, then ~/.ratchet).
"""


class Command(typer.Typer):
    """Turns expected errors into a message and an exit status."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        as_json = "--json" in (args[0] if args else sys.argv[1:])
        adapt_streams()
        try:
            return super().__call__(*args, **kwargs)
        except RatchetApiError as error:
            if as_json:
                print_error_json({**error.problem, "code": error.code, "detail": error.detail})
            else:
                print_problem(error)
            sys.exit(exits.REFUSED)
        except RatchetNotFound as error:
            _refuse("no_service", str(error), exits.UNREACHABLE, as_json=as_json)
        except RatchetConnectionError as error:
            detail = f"{error}. Is it running? `ratchet up` starts a local one"
            _refuse("no_answer", detail, exits.UNREACHABLE, as_json=as_json)
        except OSError as error:
            detail = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            _refuse("refused", detail, exits.REFUSED, as_json=as_json)
        except RatchetError as error:
            _refuse("refused", str(error), exits.REFUSED, as_json=as_json)


class Group(TyperGroup):
    """Says what is wrong with an option without pydantic's prefix, and as JSON if that was asked for."""

    _as_json = False

    def main(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        self._as_json = "--json" in (sys.argv[1:] if args is None else args)
        return super().main(args, *rest, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.TyperException as error:  # the command line is wrong
            if isinstance(error, typer.BadParameter):
                error.message = error.message.removeprefix("Value error, ")
            if not self._as_json:
                raise
            _refuse("usage", str(error.format_message()), exits.USAGE, as_json=True)


def _refuse(code: str, detail: str, status: int, *, as_json: bool) -> NoReturn:
    if as_json:
        print_error_json({"code": code, "detail": detail})
    else:
        complain(f"error: {detail}")
    sys.exit(status)


def _version(asked: bool) -> None:
    if asked:
        say(f"ratchet {version('ratchet-rl')}")
        raise typer.Exit


completion.install_script()
app = Command(
    cls=Group,
    help=helps.text(HELP),
    epilog=exits.HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="the service's address; default: RATCHET_URL, else a local stack")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="talk to the local stack that runs from this directory")] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    context.obj = Target(url, data_dir)


for module in (
    stack,
    doctor,
    init,
    jobs,
    sessions,
    curves,
    export,
    advice,
    compare,
    resources,
    aliases,
    sample,
    spending,
    webhooks,
    workers,
):
    module.register(app)
