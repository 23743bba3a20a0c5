"""`ratchet sample`: what checkpoints answer to a prompt. The model runs on this machine, in a separate process with torch."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ratchet_client import Ratchet, RatchetError
from service.cli.completion import complete_checkpoint_or_alias
from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import Json
from service.cli.output import complain, lines, one_line, print_json, print_table
from service.spec.aliases import is_alias

Ask = Callable[[dict[str, Any]], dict[str, Any]]
NEEDS = ("torch", "transformers", "peft")


def register(app: typer.Typer) -> None:
    command(app, sample)


def sample(
    context: typer.Context,
    named: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT... PROMPT",
            help="checkpoints: their ids, aliases, or folders with downloaded ones; then the prompt, written as data.prompt "
            "renders it (- reads standard input)",
            autocompletion=complete_checkpoint_or_alias,
        ),
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=64, help="how many answers each checkpoint gives")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, max=32768, help="the longest answer in tokens")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="sampling temperature; 0: always the likeliest token")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same answers")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a user's message to a chat model")] = False,
    tools: Annotated[
        str | None, typer.Option(metavar="JSON", help="with --chat: a list of tools, as data.tools; or a file with it")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="with --chat: as data.chat_template_kwargs; or a file with it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask checkpoints, and see their answers side by side.

    $ ratchet sample ckpt_01k... "rev 123456>"
    $ ratchet sample ckpt_01k... ckpt_01m... "3+8=" -n 4 --temperature 0.7
    $ ratchet sample digits@staging digits@production "rev 123456>"
    $ ratchet sample my-model "rev 123456>"          a folder of `ratchet checkpoints download`
    $ ratchet sample ckpt_01k... "2+2?" --chat --tools tools.json --chat-template-kwargs '{"enable_thinking": false}'

    Checkpoints are downloaded, and run on this machine: it needs what a worker needs, and the base model of an adapter.
    """
    *checkpoints, prompt = named
    if not checkpoints:
        raise typer.BadParameter("a prompt is missing; the last argument is the prompt: ratchet sample CHECKPOINT... PROMPT")
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        absent = " and ".join(missing)
        raise RatchetError(f"the model runs on this machine, where {absent} is missing: pip install 'ratchet-rl[worker]'")
    options = _template_options(tools, chat_template_kwargs)
    if not chat and (tools is not None or chat_template_kwargs is not None):
        raise typer.BadParameter("--tools and --chat-template-kwargs are for the chat template: they need --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    request = {
        "prompt": [{"role": "user", "content": text}] if chat else text,
        "count": count,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "options": options,
    }
    if sys.stderr.isatty():
        complain("loading torch and the model: some seconds ...")
    with _model_process() as ask:
        answers = {name: _answers(ask({**request, **place})) for name, place in _places(context, checkpoints)}
    if as_json:
        print_json({"prompt": request["prompt"], "answers": answers})
    elif len(answers) == count == 1:
        print(lines(next(iter(answers.values()))[0]["text"]))
    else:
        rows = [
            (i + 1, name, one_line(told[i]["text"], 500), told[i]["tokens"], told[i]["finish_reason"])
            for i in range(count)
            for name, told in answers.items()
        ]
        print_table(("#", "checkpoint", "answer", "tokens", "ended by"), rows, nothing="")


def _template_options(tools: str | None, chat_template_kwargs: str | None) -> dict[str, Any]:
    """What the chat template gets beside the messages. Raises BadParameter for what is neither JSON nor a file of JSON."""
    options = {} if chat_template_kwargs is None else _json(chat_template_kwargs, dict, "--chat-template-kwargs", "an object")
    if tools is None:
        return options
    listed = _json(tools, list, "--tools", "a list of objects")
    if not all(isinstance(tool, dict) for tool in listed):
        raise typer.BadParameter("must be a list of objects", param_hint="--tools")
    return {**options, "tools": listed} if listed else options


def _json(given: str, kind: type, option: str, must_be: str) -> Any:
    try:
        text = given if given.lstrip().startswith(("{", "[")) else Path(given).read_text("utf-8")
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"is neither JSON nor a file of JSON: {error}", param_hint=option) from None
    if not isinstance(value, kind):
        raise typer.BadParameter(f"must be {must_be}", param_hint=option)
    return value


def _places(context: typer.Context, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each checkpoint's name once, with its folder and model section. A downloaded checkpoint is removed again."""
    with ExitStack() as stack:
        ratchet: Ratchet | None = None
        for name in dict.fromkeys(names):
            folder = Path(name)
            if folder.is_dir():
                yield name, {"folder": str(folder.absolute()), "model": _model_of(folder)}
                continue
            if not (name.startswith("ckpt_") or is_alias(name)):
                known = "a checkpoint's id (ratchet checkpoints), an alias (ratchet aliases) nor a folder"
                raise RatchetError(f"{name!r} is neither {known}; the prompt is one argument, the last")
            ratchet = ratchet or stack.enter_context(connect(context))
            with tempfile.TemporaryDirectory(prefix="ratchet-sample-") as temporary:
                checkpoint = ratchet.get_checkpoint(name)
                folder = ratchet.download_checkpoint(checkpoint["id"], Path(temporary) / "checkpoint", optimizer=False)
                yield name, {"folder": str(folder), "model": checkpoint["model"]}


def _model_of(folder: Path) -> dict[str, Any]:
    try:
        trainer = json.loads((folder / "trainer.json").read_text("utf-8"))
        model = {name: trainer[name] for name in ("source", "revision")} | {"adapter": {"kind": trainer["adapter"]}}
    except (OSError, ValueError, KeyError, TypeError):
        raise RatchetError(f"{folder} is no folder of a checkpoint (`ratchet checkpoints download` makes one)") from None
    if model["source"] == "tiny" and trainer["adapter"] == "lora":
        raise RatchetError(f"{folder} does not say which shape of `tiny` its adapter is for: name the checkpoint by its id")
    return model


@contextmanager
def _model_process() -> Iterator[Ask]:
    """A process that runs models: torch is loaded once for all checkpoints, and while the first is downloaded."""
    # -P: do not import a `workers` folder in the current directory.
    argv = [sys.executable, "-P", "-m", "workers.sample"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        requests, told = process.stdin, process.stdout

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            with suppress(BrokenPipeError):
                requests.write(json.dumps(request).encode() + b"\n")
            try:
                return json.loads(told.readline())
            except ValueError:
                requests.close()  # its end, if this was not
                status = process.wait()
                errors.seek(0)
                complain(errors.read().decode(errors="replace").strip()[-2000:])
                raise RatchetError(f"the process that runs the model ended with status {status}") from None

        try:
            yield ask
        except BaseException:
            process.kill()
            raise


def _answers(told: dict[str, Any]) -> list[dict[str, Any]]:
    if error := told.get("error"):
        raise RatchetError(" ".join(filter(None, (error["detail"], error["hint"] and f"({error['hint']})"))))
    return told["answers"]
