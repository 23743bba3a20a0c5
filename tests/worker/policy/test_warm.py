"""A base that is kept from one job to the next computes what one computes that is loaded anew, to the bit."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from workers.policy import warm
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.policy.warm import WarmBase

TINY = TinyConfig(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=64)
LORA = ModelSpec(source="tiny", tiny=TINY, adapter=Lora(rank=4, alpha=8, dropout=0.3))
LOOK: Any = {"device": "cpu", "threads": 1}


@pytest.fixture(autouse=True, scope="module")
def as_in_a_worker() -> Iterator[None]:
    """What is imported is not looked at when garbage is collected."""
    gc.freeze()
    yield
    gc.unfreeze()


def always(_: Base) -> bool:
    return True


@pytest.fixture
def kept() -> WarmBase:
    return WarmBase(600.0, always)


def learnt(learner: Learner, sequences: Callable[..., Any]) -> list[Any]:
    """All that a job would see: answers, scores, losses, gradient norms, weights."""
    seen: list[Any] = []
    prompts = [prompt for prompt, _ in sequences(3, seed=9)]
    for step in range(2):
        groups = learner.sample(prompts, group_size=2, max_tokens=6, temperature=1.0, seed=step)
        seen += [(answer.tokens, answer.log_probs) for group in groups for answer in group]
        batch = sequences(5, seed=step)
        seen.append(learner.accumulate(batch, lambda log_probs, rows: (log_probs.exp() * log_probs).sum()))
        seen.append(learner.step())
        seen.append(learner.score(batch).log_probs.tolist())
    return [*seen, learner.digest()]


@pytest.mark.parametrize("kind", ["tiny", "stacked experts"])
def test_a_job_on_a_kept_base_is_the_job_on_a_new_one_to_the_bit(
    kind: str, kept: WarmBase, load: Any, some_sequences: Any, family_folder: Any, tmp_path: Path
) -> None:
    model = LORA
    if kind != "tiny":
        adapter = Lora(rank=2, alpha=4, target_parameters="experts")
        model = ModelSpec(source=str(family_folder("gpt_oss")), adapter=adapter)
    first = kept.load(model, **LOOK)
    learner = load(model, on=first, seed=7)
    before = {name: weight.clone() for name, weight in first.model.state_dict().items() if ".lora_" not in name}
    cold = learnt(learner, some_sequences)
    learner.save(tmp_path)
    start = learner.adapter and Policy(first, f"{learner.adapter}-start")
    assert start is not None
    first.adapters.add_saved(f"{learner.adapter}-start", tmp_path / "model")  # as the reference of a job
    kept.keep(first)

    second = kept.load(model, **LOOK)
    assert second is first
    after = second.model.state_dict()
    assert [*after] == [name.replace(".base_layer", "") for name in before]
    assert all(torch.equal(old, new) for old, new in zip(before.values(), after.values(), strict=True))
    assert learnt(load(model, on=second, seed=7), some_sequences) == cold
    kept.keep(second)
    resumed = kept.load(model, checkpoint=tmp_path, **LOOK)
    assert resumed is first
    again, alone = (
        learnt(load(model, on=base, weights_from=tmp_path, optimizer_from=tmp_path), some_sequences)
        for base in (resumed, Base.load(model, checkpoint=tmp_path, **LOOK))
    )
    assert again == alone != cold


def test_another_base_is_loaded_and_the_kept_one_dropped(kept: WarmBase) -> None:
    def given(model: ModelSpec, **how: Any) -> Base:
        base = kept.load(model, **LOOK | how)
        kept.keep(base)
        return base

    first = given(LORA)
    assert given(LORA.model_copy(update={"adapter": Lora(rank=1)})) is first, "another adapter is of the same base"
    others = [
        LORA.model_copy(update={"tiny": TINY.model_copy(update={"seed": 1})}),
        LORA.model_copy(update={"dtype": "bfloat16"}),
        LORA,
    ]
    seen = [first, *map(given, others)]
    assert len(set(map(id, seen))) == len(seen)
    assert given(LORA) is seen[-1]


def test_a_base_that_was_trained_is_not_kept_and_none_waits_beside_it(kept: WarmBase) -> None:
    first = kept.load(LORA, **LOOK)
    kept.keep(first)
    full = LORA.model_copy(update={"adapter": Full()})
    trained = kept.load(full, **LOOK)
    kept.keep(trained)
    assert first is not trained is not kept.load(full, **LOOK)
    assert kept.load(LORA, **LOOK) not in (first, trained)


def test_files_that_change_make_another_base(kept: WarmBase, family_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in family_folder("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = ModelSpec(source=str(folder), adapter=Lora(rank=2))
    first = kept.load(model, **LOOK)
    ours = {name: weight.clone() for name, weight in first.model.state_dict().items()}  # the file itself is mapped there
    kept.keep(first)
    assert kept.load(model, **LOOK) is first
    kept.keep(first)
    weights = folder / "model.safetensors"
    times = weights.stat()
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 0x40
    weights.write_bytes(whole)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # the size and this time are as before
    second = kept.load(model, **LOOK)
    assert second is not first
    theirs = second.model.state_dict()
    assert sum(not torch.equal(ours[name], theirs[name]) for name in ours) == 1


def test_a_branch_that_has_moved_is_loaded_anew(kept: WarmBase, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is played: a commit, and where a branch stands."""
    model, stands = ModelSpec(source=str(family_folder("llama")), adapter=Lora(rank=2)), ["a" * 40]
    load = Base.load.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def loaded(kind: Any, model: ModelSpec, *, revision: str | None = None, **how: Any) -> Base:
        base = load(kind, model, **how)
        base.revision = revision if revision in ("a" * 40, "b" * 40) else stands[0]
        return base

    monkeypatch.setattr(Base, "load", classmethod(loaded))
    monkeypatch.setattr(warm, "commit_of", lambda source, revision: stands[0])
    first = kept.load(model, **LOOK)
    kept.keep(first)
    assert kept.load(model, **LOOK) is first
    kept.keep(first)
    stands[0] = "b" * 40
    assert kept.load(model, revision="a" * 40, **LOOK) is first, "this job began on that commit"
    kept.keep(first)
    second = kept.load(model, **LOOK)
    assert second is not first and second.revision == "b" * 40


@pytest.mark.parametrize(("why", "keep_s"), [("memory gets short", 600.0), ("no job wants it", 0.5)])
def test_it_does_not_wait_for_ever(why: str, keep_s: float, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(warm, "LOOK_S", 0.01)
    watched, short = threading.Event(), why.startswith("memory")
    kept = WarmBase(keep_s, lambda _: not (short and watched.is_set()))
    base = kept.load(LORA, **LOOK)
    with caplog.at_level("INFO", "workers.policy.warm"):
        kept.keep(base)
        assert kept._kept is not None and kept._kept.watch is not None
        watch = kept._kept.watch
        watched.set()
        watch.join(30)
    assert why in caplog.text
    assert kept.load(LORA, **LOOK) is not base


@pytest.mark.parametrize("kept", [WarmBase(0.0, always), WarmBase(600.0, lambda _: False)], ids=["off", "no room"])
def test_none_is_kept_where_there_is_no_room_or_it_is_switched_off(kept: WarmBase) -> None:
    base = kept.load(LORA, **LOOK)
    kept.keep(base)
    assert kept.load(LORA, **LOOK) is not base


def test_the_room_that_is_asked_for_is_that_of_the_base(kept: WarmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base = kept.load(LORA, **LOOK)
    size = sum(weight.nbytes for weight in base.model.parameters())
    assert (warm._available() or 2**30) > 2**20
    for left, room in ((size, True), (size - 1, False), (None, True)):
        monkeypatch.setattr(warm, "_available", lambda left=left: left)
        assert warm._roomy(base) is room
