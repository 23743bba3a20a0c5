"""Help texts from docstrings. A paragraph that begins with `$ ` has examples, whose lines are not wrapped."""

from collections.abc import Callable
from inspect import cleandoc
from textwrap import indent
from typing import Any

import typer

KEEP = "\b\n"  # tells Click not to wrap this paragraph


def text(docstring: str | None) -> str:
    paragraphs = cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(KEEP + indent(part, "    ") if part.startswith("$ ") else part for part in paragraphs)


def command(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    app.command(name or function.__name__, help=text(function.__doc__))(function)


def group(app: typer.Typer, name: str, default: Callable[..., Any], **commands: Callable[..., Any]) -> None:
    """Add `ratchet NAME` and `ratchet NAME list`, which run `default`, and `ratchet NAME COMMAND` for each of `commands`."""
    inner = typer.Typer(help=text(default.__doc__), rich_markup_mode=None)
    inner.callback(invoke_without_command=True)(default)
    inner.command("list", help=text(default.__doc__), hidden=True)(default)
    for command_name, function in commands.items():
        command(inner, function, command_name)
    app.add_typer(inner, name=name)
