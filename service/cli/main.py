"""The command's entry: global options, the commands of each module, and errors as exit statuses."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ratchet_client import RatchetApiError, RatchetConnectionError, RatchetError, RatchetNotFound
from service.cli import curves, exits, helps, jobs, resources, spending, stack
from service.cli.connection import Target
from service.cli.output import complain, print_problem

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
    """Errors that are answers, not faults, become a message and an exit status."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except RatchetApiError as error:
            print_problem(error)
            sys.exit(exits.REFUSED)
        except RatchetNotFound as error:
            complain(f"error: {error}")
            sys.exit(exits.UNREACHABLE)
        except RatchetConnectionError as error:
            complain(f"error: {error}. Is it running? `ratchet up` starts a local one")
            sys.exit(exits.UNREACHABLE)
        except (RatchetError, OSError) as error:
            complain(f"error: {error}")
            sys.exit(exits.REFUSED)


app = Command(
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
) -> None:
    context.obj = Target(url, data_dir)


for module in (stack, jobs, curves, resources, spending):
    module.register(app)
