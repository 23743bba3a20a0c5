"""`ratchet sample`: the model of a checkpoint, run here. What it answers is what the policy answers that was saved."""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from service.cli import sample
from service.ids import new_id
from service.jobs import lease
from service.jobs.lease import CheckpointRow
from service.spec.model import ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.checkpoint import write_manifest
from workers.policy.learner import Learner
from workers.policy.load import adapter_of
from workers.sample import told

Cli = Callable[..., Any]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "layers": 1}
SPEC = {
    "kind": "rl",
    "model": {"source": "tiny", "tiny": SHAPE},
    "data": {"train": {"source": "inline", "rows": [{"q": "1"}]}, "prompt": "{q}"},
    "objective": {"preset": "grpo"},
    "reward": {"graders": [{"kind": "length", "max_tokens": 4}]},
    "limits": {"max_steps": 1},
}
GREEDY = {"group_size": 1, "max_tokens": 8, "temperature": 0.0, "seed": 0}


def saved(folder: Path, seed: int, adapter: str) -> tuple[ModelSpec, str]:
    """A checkpoint of a model of this seed, and its greedy answer to `rev 12>`."""
    model = ModelSpec.model_validate({"source": "tiny", "tiny": {**SHAPE, "seed": seed}, "adapter": {"kind": adapter}})
    base = Base.load(model, device="cpu", threads=1)
    learner = Learner(base, adapter_of(model), name="mine", optimizer=OptimizerSpec(), steps=1, seed=0)
    if adapter == "lora":  # an adapter that does something: its second factor starts at zero
        for name, parameter in base.adapters.parameters("mine").items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.5)
    folder.mkdir(parents=True)
    learner.save(folder)
    write_manifest(folder)
    [[answer]] = learner.sample([learner.text.encode("rev 12>")], **GREEDY)
    return model, answer.text


def stored(hand: Any, cli: Cli, folder: Path, model: ModelSpec) -> str:
    """The folder as a checkpoint of a job."""
    cli("submit", "-", stdin=str(SPEC))
    held = hand.take()
    temporary = hand.store.blobs.temporary_dir()
    temporary.rmdir()
    folder.rename(temporary)
    row = CheckpointRow(
        id=new_id("ckpt"), step=1, adapter=adapter_of(model).kind, model=model.model_dump(mode="json"),
        path=f"checkpoints/{held.job_id}/1", size_bytes=1, manifest_sha256=write_manifest(temporary), metrics={},
        has_optimizer=True, is_final=True,
    )  # fmt: skip
    hand.store.blobs.commit_dir(temporary, row.path)
    lease.commit_checkpoint(hand.store, held, row)
    hand.succeed(held)
    return row.id


def ask(cli: Cli, *args: str) -> Any:
    return cli("sample", *args, "--temperature", "0", "--max-tokens", "8")


def here() -> AbstractContextManager[sample.Ask]:
    """The model runs in this process, where torch is loaded already."""
    return nullcontext(told)


def test_a_folder_and_a_checkpoint_answer_side_by_side(
    api: str, cli: Cli, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full = saved(tmp_path / "full", 1, "full")
    model, lora = saved(tmp_path / "lora", 2, "lora")
    checkpoint_id = stored(hand, cli, tmp_path / "lora", model)
    assert full != lora
    both = ask(cli, str(tmp_path / "full"), checkpoint_id, "rev 12>", "--json").json["answers"]
    assert [one["text"] for one in both[str(tmp_path / "full")]] == [full]
    assert [one["text"] for one in both[checkpoint_id]] == [lora]
    monkeypatch.setattr(sample, "_model_process", here)
    alone = ask(cli, str(tmp_path / "full"), "rev 12>")
    assert (alone.code, alone.out) == (0, full + "\n")
    cli("promote", checkpoint_id, "d@best")
    table = ask(cli, str(tmp_path / "full"), "d@best", "rev 12>", "-n", "2").out.splitlines()
    assert [re.split(r"\s{2,}", line)[:2] for line in table[1:]] == [
        ["1", str(tmp_path / "full")],
        ["1", "d@best"],
        ["2", str(tmp_path / "full")],
        ["2", "d@best"],
    ]


def test_what_cannot_be_sampled_is_a_plain_error(api: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_model_process", here)
    empty = ask(cli, str(tmp_path), "rev 12>")
    assert empty.code == 1 and "no folder of a checkpoint" in empty.err
    absent = ask(cli, "ckpt_nobody", "rev 12>")
    assert absent.code == 1 and "ckpt_nobody" in absent.err
    second = ask(cli, "rev 12>", "rev 34>")
    assert second.code == 1 and "'rev 12>' is neither a checkpoint's id (ratchet checkpoints), an alias " in second.err
    lone = ask(cli, "ckpt_nobody")
    assert lone.code == 2 and "a prompt is missing" in lone.err
    saved(tmp_path / "full", 1, "full")
    talked = ask(cli, str(tmp_path / "full"), "hello", "--chat")
    assert talked.code == 1 and "chat template" in talked.err and "Traceback" not in talked.err
    (tmp_path / "full" / "model" / "config.json").unlink()
    broken = ask(cli, str(tmp_path / "full"), "rev 12>")
    assert broken.code == 1 and "cannot be loaded" in broken.err and "Traceback" not in broken.err
    monkeypatch.setattr(sample, "find_spec", lambda name: None if name == "torch" else sys)
    without = ask(cli, str(tmp_path / "full"), "rev 12>")
    assert without.code == 1 and "torch is missing: pip install 'ratchet-rl[worker]'" in without.err


def test_a_model_whose_process_dies_says_what_it_said(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "full", 1, "full")
    (tmp_path / "dies").write_text("#!/bin/sh\necho out of memory >&2\nexit 9")
    (tmp_path / "dies").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "dies"))
    died = ask(cli, str(tmp_path / "full"), "rev 12>")
    assert died.code == 1 and "out of memory" in died.err and "ended with status 9" in died.err


def test_what_the_chat_template_gets_is_passed_on_and_no_optimizer_is_fetched(
    api: str, cli: Cli, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[dict[str, Any], list[str]]] = []

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        files = [path.name for path in Path(request["folder"]).iterdir()]
        asked.append((request, sorted(files)))
        return {"answers": [{"text": "x", "tokens": 1, "finish_reason": "stop"}]}

    monkeypatch.setattr(sample, "_model_process", lambda: nullcontext(ask))
    cli("submit", "-", stdin=str(SPEC))
    held = hand.take()
    checkpoint_id = hand.save(held, 1, **{"weights": b"w", "optimizer.safetensors": b"moments", "trainer.json": b"{}"})
    hand.succeed(held)
    (tmp_path / "tools.json").write_text('[{"function": {"name": "add"}}]')
    options = ("--chat", "--tools", str(tmp_path / "tools.json"), "--chat-template-kwargs", '{"enable_thinking": false}')
    assert cli("sample", checkpoint_id, "2+2?", *options).code == 0
    [(request, files)] = asked
    assert request["options"] == {"tools": [{"function": {"name": "add"}}], "enable_thinking": False}
    assert request["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert files == ["README.md", "manifest.json", "trainer.json", "weights"]
    whole = cli("checkpoints", "download", checkpoint_id, "--to", str(tmp_path / "whole"))  # the negative control
    assert whole.code == 0 and (tmp_path / "whole" / "optimizer.safetensors").read_bytes() == b"moments"
