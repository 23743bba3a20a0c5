"""`ratchet export checkpoint`: what is written loads in the real packages, from a folder and from a real S3 server."""

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.cli import export_model
from service.ids import new_id
from service.jobs import lease
from service.jobs.lease import CheckpointRow
from service.spec.model import ModelSpec
from service.spec.training import OptimizerSpec
from workers import merge as merging
from workers.merge import merge
from workers.policy.base import Base
from workers.policy.checkpoint import write_manifest
from workers.policy.learner import Learner
from workers.policy.load import adapter_of, load_model

Cli = Callable[..., Any]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "layers": 1}
SPEC = {
    "kind": "rl",
    "name": "exported",
    "model": {"source": "tiny", "tiny": SHAPE},
    "data": {"train": {"source": "inline", "rows": [{"q": "1"}]}, "prompt": "{q}"},
    "objective": {"preset": "grpo"},
    "reward": {"graders": [{"kind": "length", "max_tokens": 4}]},
    "limits": {"max_steps": 1},
}


@pytest.fixture
def checkpoint(api: str, cli: Cli, hand: Any) -> tuple[str, ModelSpec]:
    """A LoRA checkpoint of a job, whose adapter does something."""
    model = ModelSpec.model_validate({"source": "tiny", "tiny": SHAPE, "adapter": {"kind": "lora"}})
    base = Base.load(model, device="cpu", threads=1)
    learner = Learner(base, adapter_of(model), name="mine", optimizer=OptimizerSpec(), steps=1, seed=0)
    for name, parameter in base.adapters.parameters("mine").items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    cli("submit", "-", stdin=json.dumps(SPEC))
    held = hand.take()
    folder = hand.store.blobs.temporary_dir()
    learner.save(folder)
    row = CheckpointRow(
        id=new_id("ckpt"), step=1, adapter="lora", model=model.model_dump(mode="json"), path=f"checkpoints/{held.job_id}/1",
        size_bytes=1, manifest_sha256=write_manifest(folder), metrics={}, has_optimizer=True, is_final=True,
    )  # fmt: skip
    hand.store.blobs.commit_dir(folder, row.path)
    lease.commit_checkpoint(hand.store, held, row)
    hand.succeed(held)
    return row.id, model


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_an_adapter_and_its_merged_model_say_the_same(
    checkpoint: tuple[str, ModelSpec], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_id, model = checkpoint

    def here(folder: Path, spec: Any, out: Path, *_: Any) -> Path:  # where torch is loaded already
        merge(folder, ModelSpec.model_validate(spec), out)
        return out

    monkeypatch.setattr(export_model, "_merged", here)
    assert cli("export", "checkpoint", checkpoint_id, "--to", str(tmp_path / "adapter")).code == 0
    assert cli("export", "checkpoint", checkpoint_id, "--to", str(tmp_path / "merged"), "--merged").code == 0
    base = load_model(model, torch.device("cpu"), None).model
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged").encode("rev 12>")
    plain = logits(base, tokens)
    adapted = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")), tokens)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01
    cards = [(tmp_path / name / "README.md").read_text() for name in ("adapter", "merged")]
    assert [front_matter(text)["library_name"] for text in cards] == ["peft", "transformers"]
    assert all(checkpoint_id in text and "exported" in text for text in cards) and 'from_pretrained(".")' in cards[1]
    again = cli("export", "checkpoint", checkpoint_id, "--to", str(tmp_path / "adapter"))
    assert again.code == 1 and "name a new folder" in again.err
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter", "merged"}
    assert not list(tmp_path.glob(".ratchet-export-*"))


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(
    checkpoint: tuple[str, ModelSpec], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ratchet_client.archive._extract", full)
    said = cli("export", "checkpoint", checkpoint[0], "--to", str(tmp_path / "full" / "out"))
    assert (said.code, said.err) == (1, f"error: {tmp_path / 'full' / 'out'}: No space left on device\n")
    assert list((tmp_path / "full").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_disk_that_fills_up_while_merging_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(merging, "merge", full)
    monkeypatch.setattr("sys.argv", ["merge", "checkpoint", "out"])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"source": "tiny"}'))
    with pytest.raises(SystemExit, match=r"^it cannot be read or written: .*No space left on device$"):
        merging.main()


def test_gguf_is_one_file_and_a_card_or_says_why_not(
    checkpoint: tuple[str, ModelSpec], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cli("export", "checkpoint", checkpoint[0], "--to", str(tmp_path / "gguf"), "--gguf", "f16")
    assert refused.code == 1 and "none of the byte-level BPE" in refused.err and "--merged" in refused.err  # tiny: characters
    assert not (tmp_path / "gguf").exists()

    def writes_a_file(argv: list[str], **_: Any) -> Any:
        Path(argv[-2]).write_bytes(b"GGUF")  # what tests/worker/test_gguf.py looks at
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(export_model.subprocess, "run", writes_a_file)
    assert cli("export", "checkpoint", checkpoint[0], "--to", str(tmp_path / "gguf"), "--gguf", "q8_0").code == 0
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"README.md", "model-q8_0.gguf"}
    text = (tmp_path / "gguf" / "README.md").read_text()
    assert front_matter(text)["library_name"] == "gguf" and "llama-server -m model-q8_0.gguf" in text


def test_a_bucket_gets_every_file_once(checkpoint: tuple[str, ModelSpec], cli: Cli, s3: Any, tmp_path: Path) -> None:
    checkpoint_id, _ = checkpoint
    to = "s3://models/exported/first"
    assert cli("export", "checkpoint", checkpoint_id, "--to", to).code == 0
    assert cli("export", "checkpoint", checkpoint_id, "--to", str(tmp_path / "here")).code == 0
    listed = s3.list_objects_v2(Bucket="models", Prefix="exported/first/")["Contents"]
    there = {
        each["Key"].removeprefix("exported/first/"): s3.get_object(Bucket="models", Key=each["Key"])["Body"].read()
        for each in listed
    }
    here = tmp_path / "here"
    assert there == {path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in there and max(listed, key=lambda each: each["LastModified"])
    again = cli("export", "checkpoint", checkpoint_id, "--to", to)
    assert again.code == 1 and "has files already" in again.err
    absent = cli("export", "checkpoint", checkpoint_id, "--to", "s3://nowhere/x")
    assert absent.code == 1 and "s3://nowhere/x" in absent.err
    strange = cli("export", "checkpoint", checkpoint_id, "--to", "ftp://models/x")
    assert strange.code == 1 and "ftp:// is no kind of bucket" in strange.err
    secret = cli("export", "checkpoint", checkpoint_id, "--to", "s3://name:hush@models/x")
    assert secret.code == 1 and "must not hold a key" in secret.err and "hush" not in secret.err
