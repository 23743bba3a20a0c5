"""The parts of docs/objectives.md that are numbers: the worked example, aggregation weights, and what was measured."""

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from rollouts import SUMS
from torch import Tensor

from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Objective
from workers.objectives.aggregate import weights

MEASURED = Path(__file__).with_name("measured.json")

# ---------------------------------------------------------------- the worked example

LOG_PROBS = [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]]
OLD_LOG_PROBS = [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]]
ADVANTAGES = [1.0, -1.0]


def example() -> str:
    rows = [
        "| | answer 1, advantage 1 | answer 2, advantage -1 |",
        "|---|---|---|",
        row("`log_probs`", LOG_PROBS, digits=1),
        row("`old_log_probs`", OLD_LOG_PROBS, digits=1),
    ]
    for name, spec in (("grpo", {"preset": "grpo", "kl": "none"}), ("gspo", "gspo"), ("gspo_token", "gspo_token")):
        loss, gradient, outputs = example_of(spec)
        if name == "grpo":
            d = outputs.log_importance_ratio
            rows += [row("d, the difference", ragged(d), digits=1), row("its mean", [[sum(r) / len(r)] for r in ragged(d)])]
        bounds = {"low": outputs.clipped_low, "high": outputs.clipped_high}
        clipped = [[next((side for side in bounds if bounds[side][b, t]), "no") for t in range(n)] for b, n in lengths()]
        rows += [
            row(f"**{name}** log ratio", ragged(outputs.log_importance_ratio)),
            row("ratio", ragged(outputs.ratio)),
            "| clipped | " + " | ".join(", ".join(flags) for flags in clipped) + " |",
            row("loss a token", ragged(outputs.token_loss.detach())),
            row("gradient", ragged(gradient)),
            f"| **{name}** loss | {loss:.6f} | |",
        ]
    return "\n".join(rows)


def example_of(spec: Any, advantages: Tensor | None = None) -> tuple[float, Tensor, LossOutputs]:
    """Loss, gradient with respect to the log-probs and outputs, in float64."""
    objective = Objective(ObjectiveSpec.model_validate(spec).resolve())
    log_probs, old = padded(LOG_PROBS).requires_grad_(), padded(OLD_LOG_PROBS)
    mask = padded([[1.0] * n for _, n in lengths()])
    given = torch.tensor(ADVANTAGES, dtype=torch.float64) if advantages is None else advantages
    step = objective.prepare(response_mask=mask, advantages=given, old_log_probs=old)
    loss, outputs = objective.loss(log_probs, step.rows())
    return float(loss.detach()), torch.autograd.grad(loss, log_probs)[0], outputs


def lengths() -> list[tuple[int, int]]:
    return [(b, len(values)) for b, values in enumerate(LOG_PROBS)]


def padded(rows: list[list[float]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([values + [0.0] * (longest - len(values)) for values in rows], dtype=torch.float64)


def ragged(values: Tensor) -> list[list[float]]:
    return [values[b, :n].tolist() for b, n in lengths()]


def row(label: str, answers: list[list[float]], digits: int = 6) -> str:
    """Numbers without the zeros at their ends."""
    cells = [", ".join(number(value, digits) for value in values) for values in answers]
    return f"| {label} | " + " | ".join(cells) + " |"


def number(value: float, digits: int = 6) -> str:
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


# ---------------------------------------------------------------- aggregation

AGGREGATES = {
    "token": {"kind": "token"},
    "seq": {"kind": "seq"},
    "seq, length_power 1": {"kind": "seq", "length_power": 1.0},
    "seq_sum": {"kind": "seq_sum"},
    "constant 100": {"kind": "constant", "constant": 100.0},
    "sum": {"kind": "sum"},
}
LENGTHS = (10, 100)


def aggregates() -> str:
    """Weights of a token and of a whole answer, in a step of two answers."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    heads = [f"{what}, {n} tokens" for what in ("a token of the answer of", "the whole answer of") for n in LENGTHS]
    rows = ["| aggregate | " + " | ".join(head.replace(" of,", " of") for head in heads) + " |", "|---|" + "---|" * len(heads)]
    for name, axis in AGGREGATES.items():
        w = weights(mask, dtype=torch.float64, **axis)
        values = [*w[:, 0].tolist(), *w.sum(1).tolist()]
        rows.append(f"| `{name}` | " + " | ".join(f"{value:.4g}" for value in values) + " |")
    return "\n".join(rows)


# ---------------------------------------------------------------- measured


def spread() -> str:
    """The caption of the spread's figure: the run it shows."""
    found = json.loads(MEASURED.read_text())
    run, rewards = found["run"], found["reward"]
    answers = len(SUMS) * run["groups_a_size"] * run["group_size"]
    return paragraph(
        "*Figure 2. Measured in a small, real run: the `tiny` model (0.24 M parameters) learns to write sums, with the preset",
        f"`{run['objective']}`, {run['rollouts']} rollouts of {answers} answers, {run['updates']} updates per rollout,",
        f"learning rate {run['learning_rate']:g}. Its reward goes from {rewards[0]:.2f} to {rewards[-1]:.2f}.",
        f"The figure shows the batch of each rollout's last update: {found['answers']:,} answers, {found['tokens']:,} tokens.*",
    )


def independence() -> str:
    rows = json.loads(MEASURED.read_text())["spread"]
    said = [
        f"{row['sequence']:.4f} at {row['tokens']:g} tokens, where σ/√n is {row['token']:.3f}/√{row['tokens']:g} = "
        f"{row['token'] / row['tokens'] ** 0.5:.4f}"
        for row in (rows[0], rows[-1])
    ]
    return paragraph(
        f"The standard deviation of the log of the sequence ratio was {said[0]}, and {said[1]}: in this run the tokens moved",
        "nearly independently. The token ratio's deviation does not depend on the length, and the product ratio's grows with",
        "it. For the same answers:",
    )


def measured() -> str:
    """The table below figure 1."""
    found = json.loads(MEASURED.read_text())
    names = {"token": "token", "segment": "segment of 7 tokens", "sequence": "sequence", "product": "product"}
    rows = ["| ratio | 5th to 95th percentile | least, greatest | clipped at 3e-4 | clipped at 0.2 |", "|---|---|---|---|---|"]
    for name, label in names.items():
        at = found["ratio"][name]
        shares = [f"{100 * share:.2g} %" for share in found["clipped_at"].get(name, {}).values()] or ["", ""]
        cells = [f"{at['p5']:.3f} to {at['p95']:.3f}", f"{at['min']:.3f}, {at['max']:.3f}", *shares]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def shares() -> str:
    found = json.loads(MEASURED.read_text())["clipped_at"]
    gspo, grpo = 100 * found["sequence"]["0.0003"], 100 * found["token"]["0.2"]
    return paragraph(
        f"*Figure 3. The same answers. A clip of 3e-4 leaves {gspo:.0f} % of the tokens without a gradient under a sequence",
        f"ratio; a clip of 0.2 leaves {grpo:.1f} % without a gradient under a token ratio. A clip acts on one side only, so",
        "even the narrowest clips only about half of the tokens. It clips fewer with the token ratio, because many tokens are",
        "almost certain and do not move.*",
    )


def paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 124, break_on_hyphens=False)
