"""Two ranks over gloo do what one does: the same tokens, and losses, gradients and weights that differ by rounding alone."""

import gc
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from chaos.rig import Child, Zygote
from service.errors import JobFailed
from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.errors import PolicyFailed
from workers.policy.learner import TRAINER, Learner, Start
from workers.policy.optimizer import FILE, Optimizer, Part, owners
from workers.policy.score.layout import Sequence
from workers.ranks.opening import Opening
from workers.ranks.policies import SpreadLearner, open_spread
from workers.ranks.ranks import Ranks
from workers.ranks.split import split
from workers.tenure.failures import failure_of

TINY = TinyConfig(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=64)
ANEW = Start()
SAME: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
LORA = Lora(rank=4, alpha=8, dropout=0.0)
ADAPTERS = pytest.mark.parametrize("adapter", [Full(), LORA], ids=["full", "lora"])


class Follower(Child):
    """Two threads may ask after it, as after a subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._lock = Lock()

    def poll(self) -> int | None:
        with self._lock:
            return super().poll()


class Forked(Ranks):
    """Their followers are forked, and so need not load torch."""

    def __init__(self, zygote: Zygote, *, short_of_memory: bool = False) -> None:
        super().__init__(2, "cpu")
        self._zygote, self._more = zygote, ["short"] * short_of_memory

    def _start(self, rank: int) -> None:
        folder = Path(self._folder.name)
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(folder / f"rank-{rank}"))
            door.listen()
            door.settimeout(30)
            argv = ["forked_follower", str(rank), str(self.count), door.getsockname(), *self._more]
            self._children.append(Follower(self._zygote.child(argv, {}, folder / "log").pid))  # pyright: ignore[reportArgumentType]
            self._lines.append(Connection(door.accept()[0].detach()))


@pytest.fixture(scope="module")
def started() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for ranks in started:
        ranks.end()


@pytest.fixture
def new_ranks(started: list[Ranks], zygote: Zygote) -> Callable[..., Ranks]:
    def new(**how: bool) -> Ranks:
        for ranks in started:
            ranks.end()
        started[:] = [Forked(zygote, **how).__enter__()]
        return started[0]

    return new


@pytest.fixture
def ranks(started: list[Ranks], new_ranks: Callable[..., Ranks]) -> Ranks:
    """The same for all tests, until one has ended them."""
    return started[0] if started and not started[0].ended else new_ranks()


def opening(adapter: Full | Lora, start: Start = ANEW, dtype: Any = "float32", **more: Any) -> Opening:
    model = ModelSpec(source="tiny", tiny=TINY, adapter=adapter, dtype=dtype)
    return Opening(model, "mine", OptimizerSpec(learning_rate=1e-3), 8, 0, start, 1, **more)


def alone(adapter: Full | Lora, start: Start = ANEW) -> Learner:
    return opening(adapter, start).policies("cpu")[0]


def spread(ranks: Ranks, adapter: Full | Lora, start: Start = ANEW, **more: Any) -> SpreadLearner:
    return open_spread(opening(adapter, start, **more), "cpu", ranks)[0]


def learn(policy: Learner, steps: range, sequences: Callable[..., list[Sequence]]) -> list[float]:
    """Losses and gradient norms. Each token has a weight of its own, normalised over the whole step."""
    seen: list[float] = []
    for step in steps:
        batch = sequences(7, seed=step)
        longest = max(len(completion) for _, completion in batch)
        weights = torch.randn(len(batch), longest, generator=torch.Generator().manual_seed(step)) / len(batch)

        def loss(log_probs: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor = weights) -> torch.Tensor:
            assert log_probs.shape == (len(rows), weights.shape[1])
            return (log_probs.exp() * log_probs * weights[rows]).sum()

        seen.append(policy.accumulate(batch, loss, rows=range(1, 7), microbatch_tokens=32))
        seen.append(policy.step()["grad_norm"])
    return seen


def assert_same(folder: Path, other: Path) -> None:
    """Weights, moments and counters."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        torch.testing.assert_close(load_file(folder / name), load_file(other / name), **SAME)
    assert (folder / "trainer.json").read_bytes() == (other / "trainer.json").read_bytes()


@ADAPTERS
def test_two_ranks_learn_what_one_learns_and_each_goes_on_from_the_others_checkpoint(
    ranks: Ranks, adapter: Any, tmp_path: Path, some_sequences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    hear = ranks.hear
    monkeypatch.setattr(ranks, "hear", lambda rank: heard.append((answer := hear(rank))[0]) or answer)
    one, two = alone(adapter), spread(ranks, adapter)
    ones, twos = learn(one, range(3), some_sequences), learn(two, range(3), some_sequences)
    assert heard.count("part") >= 3, "the other rank had no share"
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")

    again = spread(ranks, adapter, Start(tmp_path / "one", tmp_path / "one"))
    ones += learn(alone(adapter, Start(tmp_path / "two", tmp_path / "two")), range(3, 5), some_sequences)
    twos += learn(again, range(3, 5), some_sequences)
    undisturbed = learn(one, range(3, 5), some_sequences)
    assert twos == pytest.approx(ones, abs=1e-5) and undisturbed == pytest.approx(ones[-4:], abs=1e-5)
    one.save(tmp_path / "end")
    again.save(tmp_path / "again")
    assert_same(tmp_path / "end", tmp_path / "again")


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [(Full(), "float32"), (Full(), "bfloat16"), (Lora(rank=4, alpha=8, dropout=0.5), "float32")],
    ids=["full", "full, half precision", "lora"],
)
def test_a_shared_optimizer_gives_the_same_bits_and_a_checkpoint_for_any_number_of_ranks(
    ranks: Ranks, adapter: Any, dtype: str, tmp_path: Path, some_sequences: Any
) -> None:
    """Half of the moments each, and of the masters."""

    def run(policy: Learner, steps: range, name: str) -> tuple[list[float], dict[str, bytes]]:
        seen = learn(policy, steps, some_sequences)
        policy.save(tmp_path / name)
        files = (path for path in (tmp_path / name).rglob("*") if path.suffix == ".safetensors" or path.name == TRAINER)
        return seen, {path.name: path.read_bytes() for path in files}

    shared: Any = {"dtype": dtype, "sharding": "optimizer"}
    plain = run(spread(ranks, adapter, dtype=dtype), range(2), "plain")
    policy = spread(ranks, adapter, **shared)
    assert run(policy, range(2), "shared") == plain and len(plain[1]) == 3
    held = [
        sum(tensor.nbytes for tensor in state.values())
        for state in ranks.together([("optimizer_state",)], super(SpreadLearner, policy).optimizer_state)
    ]
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "shared" / FILE).values())
    assert sum(held) == whole and max(held) < 0.6 * whole

    from_plain = Start(tmp_path / "plain", tmp_path / "plain")
    undisturbed = run(policy, range(2, 4), "end")
    assert run(spread(ranks, adapter, from_plain, **shared), range(2, 4), "again") == undisturbed
    again = run(spread(ranks, adapter, Start(tmp_path / "shared", tmp_path / "shared"), dtype=dtype), range(2, 4), "two")
    assert again == undisturbed
    if dtype == "float32" and isinstance(adapter, Full):
        run(alone(adapter, Start(tmp_path / "shared", tmp_path / "shared")), range(2, 4), "one")
        assert_same(tmp_path / "end", tmp_path / "one")


def held() -> int:
    """The bytes of all tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    local = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in local}.values())


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [(Full(), "float32"), (Full(), "bfloat16"), (LORA, "float32")],
    ids=["full", "full, half precision", "lora"],
)
def test_sharded_weights_learn_the_same_and_go_on_from_any_checkpoint(
    ranks: Ranks, adapter: Any, dtype: str, tmp_path: Path, some_sequences: Any
) -> None:
    """Against one rank; in half precision, where rounding depends on which rows stand together, against two without shards."""

    def other(start: Start = ANEW) -> Learner:
        half = dtype == "bfloat16"
        return spread(ranks, adapter, start, dtype=dtype) if half else opening(adapter, start).policies("cpu")[0]

    def sharded(start: Start = ANEW) -> SpreadLearner:
        return spread(ranks, adapter, start, dtype=dtype, sharding="full")

    plain = other()
    expected = learn(plain, range(2), some_sequences)
    plain.save(tmp_path / "plain")
    expected += learn(plain, range(2, 4), some_sequences)
    plain.save(tmp_path / "end")
    policy = sharded()
    seen = learn(policy, range(2), some_sequences)
    policy.save(tmp_path / "sharded")
    assert_same(tmp_path / "plain", tmp_path / "sharded")
    configs = [path.read_bytes() for path in sorted(tmp_path.glob("*/model/*config.json")) if path.parts[-3] != "end"]
    assert configs[: len(configs) // 2] == configs[len(configs) // 2 :]
    seen += learn(policy, range(2, 4), some_sequences)
    assert seen == pytest.approx(expected, abs=1e-5)
    for went_on, start in ((sharded, "plain"), (other, "sharded")):
        again = went_on(Start(tmp_path / start, tmp_path / start))
        assert learn(again, range(2, 4), some_sequences) == pytest.approx(expected[-4:], abs=1e-5)
        again.save(tmp_path / f"from {start}")
        assert_same(tmp_path / "end", tmp_path / f"from {start}")


@ADAPTERS
def test_sharded_weights_answer_and_score_alike_even_if_a_rank_has_no_row(
    ranks: Ranks, adapter: Any, some_sequences: Any
) -> None:
    """The reference of full weights is sharded, too."""
    alone = opening(adapter, reference=True).policies("cpu")
    sharded = open_spread(opening(adapter, reference=True, sharding="full"), "cpu", ranks)
    how: dict[str, Any] = {"group_size": 1, "max_tokens": 9, "temperature": 1.0, "seed": 3}
    prompts = [prompt for prompt, _ in some_sequences(5, seed=9)]
    for round_ in range(2):
        for rows in (1, 5):
            batch = some_sequences(rows, seed=rows)
            steps = []
            for policy, reference in (alone, sharded):
                assert reference is not None
                drawn = [[answer.tokens for answer in group] for group in policy.sample(prompts[:rows], **how)]
                scores = policy.score(batch), reference.score(batch)
                loss = policy.accumulate(batch, lambda log_probs, rows: log_probs.sum() / 9, microbatch_tokens=16)
                steps.append((drawn, scores, loss, policy.step()["grad_norm"]))
            (drawn, ours, *numbers), (again, theirs, *others) = steps
            assert again == drawn and others == pytest.approx(numbers, abs=1e-5), round_
            for one, two in zip(ours, theirs, strict=True):
                torch.testing.assert_close(two.log_probs, one.log_probs, **SAME)
                torch.testing.assert_close(two.entropy, one.entropy, **SAME)


def test_a_rank_holds_half_of_sharded_weights_gradients_and_moments(ranks: Ranks, some_sequences: Any) -> None:
    numbers: dict[str, list[float]] = {}
    for sharding in ("none", "full"):
        before = held()
        policy = spread(ranks, Full(), sharding=sharding)
        size = policy.base.parameters
        learn(policy, range(1), some_sequences)
        policy.sample([[3, 4]], group_size=2, max_tokens=3, temperature=1.0, seed=0)
        policy.score(some_sequences(2))
        between = held() - before
        policy.accumulate(some_sequences(4), lambda log_probs, _: log_probs.sum())
        numbers[sharding] = [between / size, (held() - before) / size]
        del policy
    # Of 4 + 8 and 4 + 4 + 8; keys, values and the like are the same.
    assert [none - full for none, full in zip(*numbers.values(), strict=True)] == pytest.approx([6, 8], rel=0.01)


@ADAPTERS
def test_a_rank_that_dies_takes_its_part_of_the_weights_along(
    ranks: Ranks, adapter: Any, tmp_path: Path, some_sequences: Any
) -> None:
    """Noticed in the middle of a pass. An adapter is whole on every rank, and is still saved."""
    policy = spread(ranks, adapter, sharding="full")
    learn(policy, range(1), some_sequences)
    asked: list[int] = []

    def loss(log_probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not asked:
            asked.append(ranks.pids[0])
            os.kill(ranks.pids[0], signal.SIGKILL)
        return log_probs.sum()

    with pytest.raises(JobFailed, match="rank 1 ended with status -9") as caught:
        policy.accumulate(some_sequences(8), loss, microbatch_tokens=16)
    assert caught.value.code == "rank_lost" and ranks.ended
    if isinstance(adapter, Full):
        with pytest.raises(JobFailed, match="have ended"):
            policy.save(tmp_path / "off")
    else:
        policy.save(tmp_path / "whole")
        assert (tmp_path / "whole" / FILE).exists()


def test_a_rank_that_does_not_answer_in_a_pass_is_lost(ranks: Ranks) -> None:
    with pytest.raises(JobFailed, match="does not answer") as caught, ranks.sound():
        raise RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 45000ms for recv operation")
    assert caught.value.code == "rank_lost" and ranks.ended


def test_a_model_that_cannot_be_sharded_is_refused(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.join()
    base = Base.load(ModelSpec(source="tiny", tiny=TINY), device="cpu", threads=1)
    base.model.lm_head.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(PolicyFailed, match="not of one dtype") as caught:
        base.shard(trained=True)
    assert caught.value.code == "model_unsupported"
    named = Base.load(ModelSpec(source="tiny", tiny=TINY), device="cpu", threads=1)
    monkeypatch.setattr(named.model, "_no_split_modules", None)
    with pytest.raises(PolicyFailed, match="does not name its layers"):
        named.shard(trained=True)


def test_weights_are_owned_by_all_ranks_alike_and_by_as_many_as_there_are() -> None:
    sizes = [100, 7, 60, 40, 3, 30]
    found = owners(sizes, 3)
    assert found[0] == 0 and sorted(set(found)) == [0, 1, 2]
    assert max(sum(size for size, of in zip(sizes, found, strict=True) if of == rank) for rank in range(3)) == 100
    assert owners([5, 5], 4) == [0, 1] and owners(sizes, 1) == [0] * 6
    weight = torch.nn.Parameter(torch.ones(3))
    idle = Optimizer({"w": weight}, OptimizerSpec(learning_rate=0.1), 4, Part(1, 2))
    taken: list[list[int]] = []
    idle.hand_out = lambda weights, owners: taken.append(owners)
    weight.grad = torch.ones(3)
    assert idle.step()["grad_norm"] == pytest.approx(3**0.5) and taken == [[0]]
    assert idle.state() == {} and torch.equal(weight, torch.ones(3)), "its owner steps it"


def test_what_a_lost_rank_held_of_the_optimizer_is_not_saved_as_if_it_were_there(
    ranks: Ranks, tmp_path: Path, some_sequences: Any
) -> None:
    policy = spread(ranks, Full(), sharding="optimizer")
    learn(policy, range(1), some_sequences)
    os.kill(ranks.pids[0], signal.SIGSTOP)  # or it might have answered before it is killed
    os.kill(ranks.pids[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(JobFailed) as caught:
            policy.save(tmp_path / "off")
        assert caught.value.code == "rank_lost"
    assert not (tmp_path / "off" / FILE).exists()


def test_answers_and_scores_are_those_of_one_rank(ranks: Ranks, some_sequences: Any) -> None:
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    policies = [
        opening(lora, reference=True).policies("cpu"),
        open_spread(opening(lora, reference=True), "cpu", ranks),
    ]
    for policy, _ in policies:
        learn(policy, range(2), some_sequences)
    prompts = [prompt for prompt, _ in some_sequences(5, seed=9)]
    how: dict[str, Any] = {"group_size": 3, "max_tokens": 9, "temperature": 1.0, "seed": 3}
    (one, first), (two, second) = policies
    drawn = [[[answer.tokens for answer in group] for group in policy.sample(prompts, **how)] for policy in (one, two)]
    assert drawn[0] == drawn[1]
    sequences = some_sequences(9, seed=9)
    assert first is not None and second is not None
    for alone_, spread_ in ((one, two), (first, second)):
        ours, theirs = (policy.score(sequences, temperature=0.7) for policy in (alone_, spread_))
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(theirs.log_probs, ours.log_probs, **SAME)
        torch.testing.assert_close(theirs.entropy, ours.entropy, **SAME)
    assert not torch.equal(one.score(sequences).log_probs, first.score(sequences).log_probs)


def test_two_runs_on_two_ranks_are_equal_to_the_bit_even_with_dropout(ranks: Ranks, some_sequences: Any) -> None:
    found = []
    for _ in range(2):
        policy = spread(ranks, Lora(rank=4, alpha=8, dropout=0.5))
        found.append((learn(policy, range(2), some_sequences), policy.digest()))
        ranks.agree(ranks.together([("digest",)], policy.digest))
    assert found[0] == found[1]


def test_a_loss_that_is_not_finite_on_any_rank_is_skipped_on_all(ranks: Ranks, some_sequences: Any) -> None:
    policy = spread(ranks, Full())
    before = policy.digest()
    for bad in range(4):  # the last of them are the other rank's
        batch = some_sequences(4, seed=1)
        total = policy.accumulate(batch, lambda lp, rows, bad=bad: lp.sum() * (math.inf if bad in rows else 1.0))
        assert math.isnan(total) and policy.step()["skipped"]
    learn(policy, range(1), some_sequences)
    assert policy.digest() != before
    ranks.agree(ranks.together([("digest",)], policy.digest))


def test_weights_that_differ_are_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    policy = spread(ranks, Full())
    with torch.no_grad():
        next(policy.base.model.parameters()).view(-1)[0].add_(1e-6)
    with pytest.raises(JobFailed, match="rank 1") as caught:
        policy.save(tmp_path / "off")
    assert caught.value.code == "ranks_disagree" and not (tmp_path / "off").exists()


def test_a_rank_that_dies_is_named_and_what_rank_0_holds_can_be_saved(
    ranks: Ranks, tmp_path: Path, some_sequences: Any
) -> None:
    policy = spread(ranks, Full())
    learn(policy, range(2), some_sequences)
    policy.save(tmp_path / "before")
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(JobFailed, match="rank 1 ended with status -9") as caught:
        policy.sample([[3, 4]], group_size=2, max_tokens=2, temperature=1.0, seed=0)
    assert caught.value.code == "rank_lost" and caught.value.retryable
    policy.save(tmp_path / "after")
    assert_same(tmp_path / "before", tmp_path / "after")
    with pytest.raises(JobFailed, match="have ended"):
        policy.score(some_sequences(3))


def test_an_error_of_another_rank_is_raised_as_it_is(ranks: Ranks) -> None:
    """Not as the death of that rank, which ends with it."""
    spread(ranks, Full())

    def fail() -> None:
        with ranks.sound():
            ranks.start([("accumulate", [Sequence([3], [4, 5])], 1.0, 64)])
            kind, (rows, log_probs) = ranks.hear(1)
            assert (kind, rows, log_probs.shape) == ("part", [0], (1, 2))
            ranks.tell(1, torch.ones(1, 3))
            ranks.hear(1)

    with pytest.raises(RuntimeError, match="size of tensor"):
        fail()
    assert ranks.ended


def test_a_rank_without_memory_in_a_step_fails_the_attempt_with_that(
    new_ranks: Callable[..., Ranks], some_sequences: Any
) -> None:
    """Rank 0 waits for it meanwhile, and sees only that it has gone."""
    ranks = new_ranks(short_of_memory=True)
    with pytest.raises(torch.OutOfMemoryError, match="gradients") as caught:
        learn(spread(ranks, Full()), range(1), some_sequences)
    assert failure_of(caught.value).code == "out_of_memory" and ranks.ended


@pytest.mark.parametrize(("way", "exits"), [("together", set[int]()), ("meet", {77})])
def test_only_where_rank_0_waits_for_all_does_the_end_of_a_rank_end_the_process(
    ranks: Ranks, way: str, exits: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread(ranks, Full())
    seen: set[int] = set()
    monkeypatch.setattr("workers.ranks.ranks.LOOK_EVERY_S", 0.1)
    monkeypatch.setattr("workers.ranks.ranks.NOTICE_S", 0.3)
    monkeypatch.setattr("workers.ranks.ranks.os._exit", seen.add)

    os.kill(ranks.pids[0], signal.SIGSTOP)  # or it might have answered before it is killed

    def busy() -> None:
        os.kill(ranks.pids[0], signal.SIGKILL)
        time.sleep(1.2)

    with pytest.raises(JobFailed, match="rank 1 ended with status -9") as caught:
        ranks.meet(("digest",), busy) if way == "meet" else ranks.together([("digest",)], busy)
    assert caught.value.code == "rank_lost" and seen == exits


def test_rows_of_one_prompt_stay_together_and_costs_are_alike() -> None:
    prompts = [[row % 4] for row in range(32)]
    parts = split(prompts, [5] * 32, 2)
    assert [sorted({prompts[row][0] for row in part}) for part in parts] == [[0, 1], [2, 3]]
    assert sorted(row for part in parts for row in part) == list(range(32))
    assert [len(part) for part in split([[7]] * 9, [1] * 9, 3)] == [3, 3, 3]
    assert [bool(part) for part in split([[1], [2]], [1, 99], 4)] == [True, True, False, False]
