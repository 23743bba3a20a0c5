"""Checkpoints load in transformers and peft with no help from us; a torn one is found out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import JobFailed
from service.spec.model import Full, Lora, ModelSpec
from workers.policy.checkpoint import CheckpointBroken, verify, write_manifest
from workers.policy.reference import open_reference


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_full_weights_are_a_plain_transformers_folder(tmp_path: Path, load, learn):
    policy = load()
    learn(policy, 0)
    policy.save(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("rev 12 + x>")["input_ids"]
    assert ids == policy.text.encode("rev 12 + x>")
    assert tokenizer.decode(ids) == "rev 12 + x>"
    assert torch.equal(logits_of(model, ids), logits_of(policy.base.model, ids))
    assert not torch.equal(logits_of(model, ids), logits_of(load().base.model, ids)), "it has learned"
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :].tolist()
    assert answer == policy.sample([ids], group_size=1, max_tokens=6, temperature=0.0, seed=0)[0][0].tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_checkpoint_is_a_plain_peft_adapter(dtype, tmp_path: Path, load, learn, family_folder):
    folder = str(family_folder("qwen3"))
    policy = load(ModelSpec(source=folder, dtype=dtype, adapter=Lora(rank=4, alpha=8)))
    for step in range(3):
        learn(policy, step)
    policy.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("rev 12>")["input_ids"]
    before = logits_of(base, ids)
    model = PeftModel.from_pretrained(base, str(tmp_path / "model"))
    assert torch.equal(logits_of(model, ids), logits_of(policy.base.model, ids))
    assert not torch.equal(logits_of(model, ids), before)
    adapter = [p for n, p in policy.base.model.named_parameters() if ".lora_" in n]
    assert adapter and all(parameter.dtype == torch.float32 for parameter in adapter)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path, load, learn, tiny_lora_spec):
    for name, policy in (("full", load()), ("lora", load(tiny_lora_spec))):
        learn(policy, 0)
        policy.save(tmp_path / name)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}


def test_a_frozen_reference_is_not_part_of_the_checkpoint(tmp_path: Path, load, learn, tiny_lora_spec):
    start = load(tiny_lora_spec)
    learn(start, 0)
    start.save(tmp_path / "start")
    policy = load(tiny_lora_spec, weights_from=tmp_path / "start")
    open_reference(policy, tiny_lora_spec, tmp_path / "start")
    policy.save(tmp_path / "next")
    names = {path.relative_to(tmp_path / "next").as_posix() for path in (tmp_path / "next").rglob("*.safetensors")}
    assert names == {"model/adapter_model.safetensors", "optimizer.safetensors"}


def test_full_checkpoints_of_a_source_with_a_tied_head_keep_it_tied(tmp_path: Path, load, learn):
    policy = load()
    learn(policy, 0)
    policy.save(tmp_path)
    again = load(weights_from=tmp_path)
    assert again.base.model.lm_head.weight is again.base.model.model.embed_tokens.weight
    assert again.facts["parameters"] == policy.facts["parameters"]


@pytest.fixture
def saved(tmp_path: Path, load) -> tuple[Path, str]:
    load().save(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    return tmp_path, write_manifest(tmp_path)


def test_an_untouched_checkpoint_is_accepted(saved):
    folder, sha256 = saved
    verify(folder)
    verify(folder, sha256)


@pytest.mark.parametrize("name", ["model/model.safetensors", "progress.json", "trainer.json"])
def test_a_checkpoint_of_which_one_byte_was_altered_is_broken(saved, name):
    path = saved[0] / name
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointBroken, match=f"{name} was altered"):
        verify(saved[0])


def test_a_torn_checkpoint_is_broken(saved):
    folder, sha256 = saved
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] or b"")
    with pytest.raises(CheckpointBroken, match=r"optimizer.safetensors has \d+ bytes, written were"):
        verify(folder)
    path.unlink()
    with pytest.raises(CheckpointBroken, match="is missing"):
        verify(folder)
    (folder / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointBroken, match="not the one that was written"):
        verify(folder, sha256)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointBroken, match="is not a manifest"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointBroken, match="no readable"):
        verify(folder)


def test_a_file_that_nobody_wrote_is_not_loaded(saved):
    (saved[0] / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointBroken, match=r"pytorch_model\.bin is not in the manifest"):
        verify(saved[0])


def test_a_link_is_not_followed(saved, tmp_path_factory):
    (saved[0] / "model" / "extra.json").symlink_to(tmp_path_factory.mktemp("elsewhere") / "secret")
    with pytest.raises(CheckpointBroken, match="is a link"):
        verify(saved[0])


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path, load, tiny_spec, tiny_lora_spec):
    load(tiny_spec).save(tmp_path / "full")
    load(tiny_lora_spec).save(tmp_path / "lora")
    with pytest.raises(JobFailed, match=r"holds lora weights and model\.adapter asks for full"):
        load(tiny_spec, weights_from=tmp_path / "lora")
    with pytest.raises(JobFailed, match=r"holds full weights and model\.adapter asks for lora"):
        load(tiny_lora_spec, weights_from=tmp_path / "full")
    other = ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(rank=8, alpha=8))
    with pytest.raises(JobFailed, match="rank 4 and alpha 8"):
        load(other, weights_from=tmp_path / "lora")
    elsewhere = ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(rank=4, alpha=8, target_modules=["q_proj"]))
    with pytest.raises(JobFailed, match="not sit on the same layers"):
        load(elsewhere, weights_from=tmp_path / "lora")
    assert load(ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Full()), weights_from=tmp_path / "full").kind == "full"


SAVES = """
import sys
import os
import subprocess
import sys
from pathlib import Path
from service.spec.model import ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.checkpoint import write_manifest
from workers.policy.learner import Learner, Start
from workers.policy.load import adapter_of

out, *sources = sys.argv[1:]
named = {"kind": "lora", "rank": 2, "target_modules": ["v_proj", "q_proj", "up_proj", "o_proj"]}
for number, source in enumerate(sources):
    for kind, adapter in {"full": {"kind": "full"}, "all": {"kind": "lora", "rank": 2}, "named": named}.items():
        start = None
        for turn in ("first", "resumed"):
            spec = ModelSpec.model_validate({"source": source, "adapter": adapter})
            base = Base.load(spec, device="cpu", threads=1, checkpoint=start)
            rest = {"name": "mine", "optimizer": OptimizerSpec(), "steps": 1, "seed": 0, "start": Start(start, start)}
            learner = Learner(base, adapter_of(spec), **rest)
            start = Path(out) / str(number) / turn / kind
            start.mkdir(parents=True)
            learner.save(start)
            print(number, kind, write_manifest(start))
"""


def test_equal_runs_write_equal_checkpoints_byte_for_byte(
    tmp_path: Path, family_folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In whatever process, and whether it was resumed or not: a set has another order in each."""
    sources = ["tiny", str(family_folder("llama"))]
    other = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", SAVES, str(tmp_path / "there"), *sources]
    root = Path(__file__).parents[3]
    there = subprocess.run(argv, env=other, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert there.returncode == 0, there.stderr
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "here"), *sources])
    exec(SAVES, {})
    manifests = dict[tuple[str, str], set[str]]()
    for line in (there.stdout + capsys.readouterr().out).splitlines():
        source, kind, manifest = line.split()
        manifests.setdefault((source, kind), set()).add(manifest)
    assert sorted(manifests) == [(source, kind) for source in "01" for kind in ("all", "full", "named")]
    assert {len(found) for found in manifests.values()} == {1}
