"""Prints tables, JSON, and errors with what came, what is allowed, and where. No text is interpreted as markup."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ratchet_client import RatchetApiError

ID = re.compile(r"[a-z]+_[0-9a-z]{26}")
PIPE_WIDTH = 500  # without a terminal, lines need not be cut

ABSENT = re.compile(r"no (\w+) \S+ in this project")  # a 404, whether it never was or is another project's
LISTINGS = {
    "job": "ratchet jobs",
    "session": "ratchet sessions",
    "checkpoint": "ratchet checkpoints",
    "dataset": "ratchet datasets",
    "key": "ratchet keys",
    "webhook": "ratchet webhooks",
}

STATUS_STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "paused": "magenta",
}


def console(*, stderr: bool = False) -> Console:
    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, width=None if file.isatty() else PIPE_WIDTH, markup=False, highlight=False, emoji=False)


def say(*parts: str | Text) -> None:
    """Print our own lines. Pass foreign text in them through `clean` first, so that it cannot add lines."""
    console().print(*(lines(part) if isinstance(part, str) else part for part in parts), soft_wrap=True)


def complain(*parts: str | Text) -> None:
    """Like `say`, on standard error."""
    console(stderr=True).print(*(lines(part) if isinstance(part, str) else part for part in parts), soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json_text(value, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, nothing: str) -> None:
    """A plain table; `nothing` is printed instead of an empty one."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    cells = [[cell if isinstance(cell, Text) else Text(clean(shown(cell))) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        whole = any(ID.fullmatch(row[number].plain) for row in cells) or ID.fullmatch(column)  # never cut ids: people copy them
        least = max(len(column), *(len(row[number]) for row in cells)) if whole and cells else None
        right = column in ("step", "size", "rows", "reward", "seq", "waiting")
        table.add_column(column, overflow="fold", min_width=least, no_wrap=bool(whole), justify="right" if right else "left")
    for row in cells:
        table.add_row(*row)
    if table.row_count:
        console().print(table)
    else:
        complain(nothing)


def print_facts(facts: Mapping[str, Any]) -> None:
    """One name and value per line; empty values are left out."""
    facts = {name: value for name, value in facts.items() if value not in (None, "", [], {})}
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        say(Text(f"{name:<{width}}  ", style="dim") + (value if isinstance(value, Text) else Text(clean(shown(value)))))


def print_error_json(problem: Mapping[str, Any]) -> None:
    """An error for programs: one JSON object on standard error, with `code`, `detail` and the service's other members."""
    members = {name: value for name, value in problem.items() if name != "error"}  # `error` repeats the others
    sys.stderr.write(json_text({"error": members}) + "\n")


def print_problem(error: RatchetApiError) -> None:
    """A refusal: the message, then each fault with its place, what came and what is allowed."""
    complain(Text("error: ", style="bold red") + Text(clean(error.detail)), Text(f"({error.code})", style="dim"))
    for wrong in error.errors:
        pointer, detail = wrong.get("pointer") or "", wrong.get("detail", "")
        if error.detail not in (detail, f"{pointer}: {detail}"):  # a single fault is the message itself
            complain(Text(f"  {clean(pointer or '(the whole)')}", style="bold"), Text(clean(detail)))
        for label, name in (("came", "got"), ("allowed", "allowed")):
            if wrong.get(name) is not None:
                complain(Text(f"      {label}: ", style="dim") + Text(clean(shown(wrong[name]))))
    allowed = error.problem.get("allowed_moves") or error.problem.get("allowed_actions")
    if allowed:
        complain(Text("  allowed now: ", style="dim") + Text(clean(shown(allowed))))
    if error.hint is None and (absent := ABSENT.match(error.detail)) and (listing := LISTINGS.get(absent[1])):
        complain(Text("  hint: ", style="dim") + Text(f"`{listing}` lists those that this key sees: its own project's"))
    if error.hint and error.code != "illegal_transition":  # its hint only repeats what is allowed
        complain(Text("  hint: ", style="dim") + Text(clean(error.hint)))


def status_text(status: str) -> Text:
    return Text(clean(status), style=STATUS_STYLES.get(status, ""))


def shown(value: Any) -> str:
    """A value for a cell: numbers shortened, lists joined, anything else as JSON."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(shown, value))
    return json_text(value)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Readable JSON in which characters that cannot be printed are escapes, so that none controls the terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2e}"


def clean(text: str) -> str:
    """One line, line ends and control characters as escapes: foreign text can neither fake a line nor control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def lines(text: str) -> str:
    """Like `clean`, but line ends and tabs are kept."""
    return "".join(char if char in "\n\t" else clean(char) for char in text)


def one_line(text: str, width: int = 60) -> str:
    text = clean(text.replace("\n", "⏎"))
    return text if len(text) <= width else text[: width - 1] + "…"


def size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ago(moment: str | None) -> str:
    """The time since a timestamp of the service."""
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"
