"""`ratchet workers`: what works, and what waits."""

import typer

from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import Json
from service.cli.output import duration, print_json, print_table, say


def register(app: typer.Typer) -> None:
    command(app, workers)


def workers(context: typer.Context, as_json: Json = False) -> None:
    """List the workers that are alive, what they hold of yours, and how much waits.

    $ ratchet workers
    $ ratchet workers --json | jq '.queue.waiting'
    """
    with connect(context) as ratchet:
        alive, queue = ratchet.list_workers(), ratchet.get_queue()
    if as_json:
        print_json({"workers": alive["data"], "queue": queue})
        return
    rows = [
        (
            one["id"],
            one["device"],
            ", ".join(one["resource_classes"]) or "losses",
            "draining" if one["draining"] else "",
            " ".join(one["job_ids"]),
        )
        for one in alive["data"]
    ]
    print_table(("worker", "device", "takes", "", "your jobs"), rows, nothing="no worker is alive: jobs wait in the queue")
    for name, waiting in queue["waiting"].items():
        if waiting["jobs"]:
            say(f"{waiting['jobs']} of class {name} wait, the oldest for {duration(waiting['oldest_wait_s'] or 0)}")
