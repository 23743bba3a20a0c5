"""Shell completion of ids and states. It offers nothing if no service is found."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import typer
from rich.markup import escape

from ratchet_client import Ratchet
from service.cli.connection import connect
from service.cli.output import one_line
from service.metric_names import METRICS
from service.states import Status

OFFERED = 50
SHELL = str.maketrans(dict.fromkeys("\\$`\"'", "·"))  # special inside the double quotes that zsh reads descriptions in

# Bash gives a word with @ or = in it in pieces (COMP_WORDBREAKS), and replaces only its end, which is $2. So pieces without a
# blank between them are joined before the service is asked, and what stands before that end is taken off its answers.
BASH = """
%(complete_func)s() {
    local IFS=$'\\n' piece blank word rest=$COMP_LINE words=()
    for piece in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        blank=${rest%%%%[![:blank:]]*}
        if [[ -n $blank || ${#words[@]} -eq 0 ]]; then words+=("$piece"); else words[${#words[@]}-1]+=$piece; fi
        rest=${rest#"$blank$piece"}
    done
    word=${words[${#words[@]}-1]}
    COMPREPLY=( $( env COMP_WORDS="${words[*]}" \\
                   COMP_CWORD=$(( ${#words[@]} - 1 )) \\
                   %(autocomplete_var)s=complete_bash $1 ) )
    COMPREPLY=( "${COMPREPLY[@]#"${word%%"$2"}"}" )
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def install_script() -> None:
    """Let `--install-completion` and `--show-completion` give bash the script above in place of Typer's."""
    with suppress(ImportError, AttributeError):  # no part of its interface: without it, bash gets Typer's script
        from typer import _completion_shared

        _completion_shared._completion_scripts["bash"] = BASH  # pyright: ignore[reportPrivateUsage]


def complete_job(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(_offer(context, incomplete, lambda ratchet: ratchet.list_jobs(limit=OFFERED), _job))


def complete_session(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(_offer(context, incomplete, lambda ratchet: ratchet.list_sessions(limit=OFFERED), _job))


def complete_checkpoint(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(_offer(context, incomplete, lambda ratchet: ratchet.list_checkpoints(limit=OFFERED), _checkpoint))


def complete_alias(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(
        _offer(context, incomplete, lambda ratchet: ratchet.list_aliases(limit=OFFERED), lambda one: str(one["checkpoint_id"]))
    )


def complete_checkpoint_or_alias(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return complete_alias(context, incomplete) + complete_checkpoint(context, incomplete)


def complete_dataset(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(
        _offer(context, incomplete, lambda ratchet: ratchet.list_datasets(limit=OFFERED), lambda dataset: str(dataset["name"]))
    )


def complete_metric(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """A further job, or the name of a metric."""
    known = [(one.name, escape(one.means.translate(SHELL))) for one in METRICS if one.name.startswith(incomplete)]
    return complete_job(context, incomplete) + known


def complete_download(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """A job with --best, else a checkpoint or an alias."""
    return (complete_job if context.params.get("best") else complete_checkpoint_or_alias)(context, incomplete)


def complete_key(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(_offer(context, incomplete, lambda ratchet: ratchet.list_keys(), lambda key: str(key["name"])))


def complete_webhook(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return list(_offer(context, incomplete, lambda ratchet: ratchet.list_webhooks(), lambda hook: str(hook["url"])))


def complete_status(incomplete: str) -> list[str]:
    return [status.value for status in Status if status.value.startswith(incomplete)]


def _job(job: Any) -> str:
    return f"{job['status']}  {job['name']}"


def _checkpoint(checkpoint: Any) -> str:
    return f"step {checkpoint['step']} of {checkpoint['job_id']}"


def _offer(
    context: typer.Context, incomplete: str, ask: Callable[[Ratchet], Any], describe: Callable[[Any], str]
) -> Iterator[tuple[str, str]]:
    try:
        with connect(context) as ratchet:
            items = ask(ratchet)["data"]
    except Exception:  # a shell that completes must never show an error
        return
    for item in items:
        if item["id"].startswith(incomplete):
            # Typer reads it as markup, and escapes only some of the characters that are special in shells.
            yield item["id"], escape(one_line(describe(item)).translate(SHELL))
