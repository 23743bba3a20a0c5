"""`ratchet advice`: what stands out in a job's curves."""

import typer

from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import JobId, Json
from service.cli.output import one_line, print_json, say


def register(app: typer.Typer) -> None:
    command(app, advice)


def advice(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Look at a job's curves and say what stands out: collapse, entropy that is gone, length that is paid, no signal.

    $ ratchet advice job_01k...
    $ ratchet advice job_01k... --json | jq '.[] | select(.severity == "warning")'
    """
    with connect(context) as ratchet:
        found = ratchet.advice(job_id)
    if as_json:
        print_json(found)
        return
    if not found:
        say("nothing stands out")
    for each in found:
        span = f"steps {each['from_step']} to {each['to_step']}"
        say(f"{each['severity']}: {each['rule']} ({each['metric']}, {span})")
        for name in ("detail", "cause", "remedy"):
            say(f"  {name:7}{one_line(each[name], 400)}")
