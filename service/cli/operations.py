"""How the operations of a session are shown."""

from collections.abc import Sequence
from datetime import datetime

from ratchet_client import Ratchet
from ratchet_client.types import OperationView
from service.cli.output import ago, clean, print_facts, print_table, say, status_text

SHOWN = 5  # with the session itself


def print_newest(ratchet: Ratchet, session_id: str) -> None:
    """Where the session's log ends: what waits, and the last operations."""
    page = ratchet.list_operations(session_id, limit=1)
    newest = ratchet.list_operations(session_id, after=max(0, page["next_seq"] - 1 - SHOWN), limit=SHOWN)["data"]
    print_facts({"next seq": page["next_seq"], "operations waiting": page["waiting"]})
    if newest:
        say("")
        print_operations(newest)


def print_operations(views: Sequence[OperationView]) -> None:
    rows = [
        (view["seq"], view["kind"], status_text(view["status"]), ago(view["created_at"]), _took(view), _error(view))
        for view in views
    ]
    print_table(("seq", "operation", "status", "sent", "done after", "error"), rows, nothing="no operations")


def _took(view: OperationView) -> str:
    if view["finished_at"] is None:
        return ""
    took = datetime.fromisoformat(view["finished_at"]) - datetime.fromisoformat(view["created_at"])
    return f"{took.total_seconds():.3g} s"


def _error(view: OperationView) -> str:
    return f"{clean(view['error']['detail'])} ({view['error']['code']})" if view["error"] else ""
