"""The objective itself, forward and backward, against what two libraries compute: 64 x 4096 tokens, float32, on the CPU.

    python bench/objectives.py [--seconds 60] [--best]

TRL's and verl's formulas (arXiv 2402.03300, 2503.14476, 2507.18071 as those libraries have them) stand below in plain torch:
with no metrics, with those that ours measures, and with the few that each of them computes along with its loss (TRL's are of
its ratio alone, which for gspo is one number a sequence; ours hold the KL to the old policy, an exponential a token). All get
the same tensors, the mask in the type that each is fastest with, and values and gradients must agree before anything is timed.
With metrics, they are read. What ours computes once an optimizer step (`prepare`: the aggregation weights) is a column of its
own. As in a loss worker, freed memory stays in the process, for all of them.

Time: every formula has its turn in every round, in an order that is drawn anew (who comes after a big one finds cold caches),
and medians are compared, for other work on the machine disturbs all of them (on a machine that is never idle, --best compares
the shortest times).
Memory: the peak of what the allocator had handed out beyond what was there before, as torch.profiler records it.
"""

import argparse
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from service.memory import keep_freed_memory
from service.spec.objective import ObjectiveSpec
from workers.objectives import Objective

ROWS, TOKENS = 64, 4096
Loss = Callable[[Tensor], Tensor]  # of log_probs [B, T]
TURNS = 5  # of every formula in a case, at least


# ---------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Batch:
    """Answers of TOKENS / 2 to TOKENS tokens whose policy moved by 0.1 a token; one advantage a sequence, in two shapes."""

    log_probs: Tensor
    old: Tensor
    ref: Tensor
    mask: Tensor
    ones: Tensor  # the mask in the dtype of the log-probs, which is what the libraries' formulas are fastest with
    advantages_B: Tensor
    advantages_B_T: Tensor


def batch_of(dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -normal(ROWS, TOKENS).abs() - 0.1
    lengths_B = torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(TOKENS) < lengths_B
    advantages_B = normal(ROWS).to(dtype)
    return Batch(
        log_probs=log_probs.to(dtype),
        old=(log_probs + 0.1 * normal(ROWS, TOKENS)).to(dtype),
        ref=(log_probs + 0.3 * normal(ROWS, TOKENS)).to(dtype),
        mask=mask,
        ones=mask.to(dtype),
        advantages_B=advantages_B,
        advantages_B_T=advantages_B.unsqueeze(1).repeat(1, TOKENS),
    )


@dataclass(frozen=True)
class Case:
    """An objective as the three write it down."""

    spec: Mapping[str, Any]
    sequence: bool = False
    token_mean: bool = False
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0


CASES = {
    "grpo": Case({"preset": "grpo", "kl": "none"}),
    "grpo, KL k3": Case({"preset": "grpo"}, beta=0.04),
    "dapo": Case({"preset": "dapo"}, token_mean=True, high=0.28),
    "gspo": Case({"preset": "gspo"}, sequence=True, low=3e-4, high=4e-4),
}


# ---------------------------------------------------------------- the formulas


def ours(case: Case, b: Batch) -> tuple[Loss, Loss, Callable[[], object]]:
    """The loss with its metrics read, without them, and what precedes both once an optimizer step."""
    objective = Objective(ObjectiveSpec.model_validate(case.spec).resolve())
    given = {"old_log_probs": b.old, "ref_log_probs": b.ref if case.beta else None}

    def prepare() -> Any:
        return objective.prepare(response_mask=b.mask, advantages=b.advantages_B, **given)

    step = prepare()

    def bare(log_probs: Tensor) -> Tensor:
        return objective.loss(log_probs, step.rows())[0]

    def measured(log_probs: Tensor) -> Tensor:
        value, outputs = objective.loss(log_probs, step.rows())
        outputs.metrics.finish()
        return value

    return measured, bare, prepare


def measured_by_us(ratio: Tensor, moved: Tensor, b: Batch, case: Case, log_probs: Tensor) -> list[Tensor]:
    """What our metrics hold beside shares of clipped tokens, as one would write it: the ratio's mean and extremes, the KL of
    the old policy to the trained one by k1 and k3, and that to the reference where it is known."""
    tokens = b.ones.sum().clamp(min=1)
    inside = b.mask if ratio.shape == b.mask.shape else torch.ones_like(ratio, dtype=torch.bool)
    found = [
        (ratio * b.ones).sum() / tokens,
        ratio.masked_fill(~inside, torch.inf).min(),
        ratio.masked_fill(~inside, -torch.inf).max(),
        (-moved * b.ones).sum() / tokens,
        ((torch.exp(moved) - moved - 1) * b.ones).sum() / tokens,
    ]
    if case.beta:
        away = log_probs - b.ref
        found += [(away * b.ones).sum() / tokens, ((torch.exp(-away) + away - 1) * b.ones).sum() / tokens]
    return found


def trl(case: Case, b: Batch, metrics: str) -> Loss:
    """A ratio a token or [B, 1] a sequence; metrics: the shares clipped low, high and at all, and the KL where it is used."""
    a, ones = b.advantages_B.unsqueeze(1), b.ones

    def mean(values: Tensor) -> Tensor:
        return values.mean() if values.shape[1] == 1 else (values * ones).sum() / ones.sum().clamp(min=1)

    def loss(log_probs: Tensor) -> Tensor:
        away = torch.exp(b.ref - log_probs) - (b.ref - log_probs) - 1 if case.beta else None
        moved = log_ratio = log_probs - b.old
        if case.sequence:
            log_ratio = ((log_ratio * ones).sum(-1) / ones.sum(-1).clamp(min=1)).unsqueeze(-1)
        ratio = torch.exp(log_ratio)
        per_token = -torch.min(ratio * a, torch.clamp(ratio, 1 - case.low, 1 + case.high) * a)
        if away is not None:
            per_token = per_token + case.beta * away
        if case.token_mean:
            value = (per_token * ones).sum() / ones.sum().clamp(min=1)
        else:
            value = ((per_token * ones).sum(-1) / ones.sum(-1).clamp(min=1)).mean()
        if metrics != "none":
            with torch.no_grad():
                low, high = (ratio < 1 - case.low) & (a < 0), (ratio > 1 + case.high) & (a > 0)
                found = [mean(flags.float()) for flags in (low, high, low | high)] + ([] if away is None else [mean(away)])
                found += measured_by_us(ratio, moved, b, case, log_probs) if metrics == "ours" else []
                [number.item() for number in found]
        return value

    return loss


def verl(case: Case, b: Batch, metrics: str) -> Loss:
    """Advantages a token; a dual clip with c = 3 unless the ratio is a sequence's; metrics: shares clipped, and mean -d."""
    a, ones = b.advantages_B_T, b.ones

    def total(values: Tensor) -> Tensor:
        return (torch.where(ones.bool(), values, 0.0) * ones).sum()

    def mean(values: Tensor) -> Tensor:
        return total(values) / (ones.sum() + 1e-8)

    def aggregated(values: Tensor) -> Tensor:
        if case.token_mean:
            return total(values) / ones.sum()
        lengths = ones.sum(-1)
        counted = (lengths > 0).to(values.dtype)
        return ((values * ones).sum(-1) / (lengths + 1e-8) * counted).sum() / counted.sum()

    def loss(log_probs: Tensor) -> Tensor:
        moved = log_probs - b.old
        if case.sequence:
            pooled = (moved * ones).sum(-1) / ones.sum(-1).clamp(min=1)
            log_ratio = torch.clamp(log_probs - log_probs.detach() + pooled.detach().unsqueeze(-1), max=10.0)
        else:
            log_ratio = moved = torch.clamp(moved, min=-20.0, max=20.0)
        ratio = torch.exp(log_ratio)
        plain, bounded = -a * ratio, -a * torch.clamp(ratio, 1 - case.low, 1 + case.high)
        per_token = larger = torch.maximum(plain, bounded)
        found = [mean(-moved), mean(torch.gt(bounded, plain).float())] if metrics != "none" else []
        if not case.sequence:
            cap = -a * 3.0
            if metrics != "none":
                found.append(mean(torch.gt(larger, cap) * (a < 0).float()))
            per_token = torch.where(a < 0, torch.min(cap, larger), larger)
        value = aggregated(per_token)
        if case.beta:
            away = torch.clamp(b.ref - log_probs, min=-20, max=20)
            penalty = aggregated(torch.clamp(torch.exp(away) - away - 1, min=-10, max=10))
            value = value + case.beta * penalty
            found += [penalty] if metrics != "none" else []
        if metrics == "ours":
            with torch.no_grad():
                found += measured_by_us(ratio, moved, b, case, log_probs)
        [number.detach().item() for number in found]
        return value

    return loss


BARE, MEASURED, OWN = ", no metrics", ", our metrics", ", their metrics"
# What is compared with which of ours.
AGAINST = {BARE: f"ours{BARE}", MEASURED: f"ours{MEASURED}", OWN: f"ours{MEASURED}"}


def formulas(case: Case, b: Batch) -> dict[str, Loss]:
    measured, bare, _ = ours(case, b)
    found: dict[str, Loss] = {}
    for suffix, metrics in ((BARE, "none"), (MEASURED, "ours"), (OWN, "own")):
        if suffix != OWN:
            found[AGAINST[suffix]] = bare if suffix == BARE else measured
        found |= {f"TRL{suffix}": trl(case, b, metrics), f"verl{suffix}": verl(case, b, metrics)}
    return found


# ---------------------------------------------------------------- measuring


def check(case: Case) -> None:
    """Loss and gradient of all formulas agree: in float64 to 1e-9 (verl adds 1e-8 to its divisors), in float32 to 1e-5."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        b = batch_of(dtype)
        found = {}
        for name, loss in formulas(case, b).items():
            log_probs = b.log_probs.clone().requires_grad_()
            value = loss(log_probs)
            (gradient,) = torch.autograd.grad(value, log_probs)
            found[name] = value.detach(), gradient
        value, gradient = found.pop(f"ours{MEASURED}")
        for name, (their_value, their_gradient) in found.items():
            off = max(abs(float(value - their_value)), float((gradient - their_gradient).abs().max() / gradient.abs().max()))
            if not off <= tolerance:
                raise SystemExit(f"{name} computes something else than ours in {dtype}: off by {off:.1e}")


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(case: Case, b: Batch, budget_s: float, typical: Callable[[list[float]], float]) -> dict[str, float]:
    """Seconds of each formula, forward and backward, and of `prepare`."""
    log_probs = b.log_probs.clone().requires_grad_()

    def step(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            log_probs.grad = None
            loss(log_probs).backward()

        return run

    work: dict[str, Callable[[], object]] = {name: step(loss) for name, loss in formulas(case, b).items()}
    work["prepare"] = ours(case, b)[2]
    taken: dict[str, list[float]] = {name: [] for name in work}
    order, end = random.Random(0), time.perf_counter() + budget_s
    while len(taken["prepare"]) < TURNS or time.perf_counter() < end:
        for name, run in order.sample(list(work.items()), len(work)):
            taken[name].append(seconds_of(run))
    return {name: typical(each[1:]) for name, each in taken.items()}  # the first turn warms up


def peak_bytes(loss: Loss, b: Batch) -> int:
    """Most bytes in use beyond the inputs, gradient included, in one forward and backward."""
    log_probs = b.log_probs.clone().requires_grad_()
    loss(log_probs).backward()
    log_probs.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss(log_probs).backward()
    recorded: Any = profiled.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure")
    parser.add_argument("--best", action="store_true", help="compare the shortest times instead of the medians")
    options = parser.parse_args()
    typical = min if options.best else median
    keep_freed_memory()
    b = batch_of(torch.float32)
    print(f"{ROWS} x {TOKENS} tokens, float32; torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print(
        f"ms: {'shortest' if options.best else 'median'} of forward and backward; in brackets how many times ours.\n"
        "MiB: peak beyond the inputs, with our metrics.\n"
    )
    names = list(formulas(CASES["gspo"], b))
    print(f"| threads | objective | {' | '.join(names)} | prepare | MiB ours | MiB TRL | MiB verl |")
    print("|---" * (len(names) + 6) + "|")
    for case in CASES.values():
        check(case)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for name, case in CASES.items():
            took = times(case, b, options.seconds / 2 / len(CASES), typical)
            all_formulas = formulas(case, b)
            peaks = [peak_bytes(all_formulas[f"{whose}{MEASURED}"], b) / 2**20 for whose in ("ours", "TRL", "verl")]
            cells = [cell(took, key) for key in names]
            cells += [f"{took['prepare'] * 1e3:.2f}", *(f"{peak:.1f}" for peak in peaks)]
            print(f"| {threads} | {name} | " + " | ".join(cells) + " |", flush=True)


def cell(took: Mapping[str, float], name: str) -> str:
    """Milliseconds; of theirs also how many times ours."""
    shown = f"{took[name] * 1e3:.2f}"
    if name.startswith("ours"):
        return shown
    return f"{shown} ({took[name] / took[AGAINST[name[name.index(',') :]]]:.2f})"


if __name__ == "__main__":
    main()
