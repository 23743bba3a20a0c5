"""The figures of docs/objectives.md, each for a light and a dark page: from our own code and from measured.json.

python docs/figures/draw.py          # writes docs/figures/*.svg; the same input gives the same bytes
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from service.spec.objective import ObjectiveSpec
from workers.objectives import LossOutputs, Objective

FOLDER = Path(__file__).parent
THEMES: dict[str, dict[str, str]] = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "faint": "#d1d9e0", "grey": "#59636e"}
    | {"blue": "#0969da", "orange": "#bc4c00", "green": "#1a7f37", "purple": "#8250df"},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d", "grey": "#9198a1"}
    | {"blue": "#58a6ff", "orange": "#f0883e", "green": "#3fb950", "purple": "#bc8cff"},
}
PROBABILITY = 0.25  # of the sampled token under the old policy, where a rule looks at probabilities
RATIOS = torch.linspace(0.02, 3, 150, dtype=torch.float64)  # matplotlib thins out lines of 128 points and more
SURROGATES: dict[str, dict[str, Any]] = {
    "ppo, clips 0.2": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2},
    "ppo with dual_clip 2": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 2.0},
    "sapo": {"kind": "sapo"},
    "gmpo, clips 0.4": {"kind": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
    "tv 0.2": {"kind": "tv", "low": 0.2, "high": 0.2},
    "cispo, weights 0 to 2": {"kind": "cispo", "weight_min": 0.0, "weight_max": 2.0},
    "vespo": {"kind": "vespo"},
    "dro, beta 0.5": {"kind": "dro", "beta": 0.5},
}
# One answer of eight tokens whose first five earn +1 each and whose last three -1; the mean log ratio is 0.
LOG_RATIOS = torch.tensor([[0.25, -0.10, 0.02, 0.30, -0.05, 0.10, -0.30, -0.22]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)

LABELS = {"product": "product", "token": "token", "segment": "segment of 7", "sequence": "sequence"}

Colours = dict[str, str]


def compute(spec: Any, log_ratios: Tensor, advantages: Tensor, old_log_prob: float) -> tuple[Tensor, LossOutputs]:
    """The gradient with respect to the log-probs, and the outputs, of an objective."""
    objective = Objective(ObjectiveSpec.model_validate(spec).resolve())
    old = torch.full_like(log_ratios, old_log_prob)
    log_probs = (old + log_ratios).requires_grad_()
    step = objective.prepare(response_mask=torch.ones_like(old), advantages=advantages, old_log_probs=old)
    loss, outputs = objective.loss(log_probs, step.rows())
    return torch.autograd.grad(loss, log_probs)[0], outputs


# ---------------------------------------------------------------- the four figures


def plain(*scales: Axis) -> None:
    """Numbers as they are written elsewhere, not powers of ten; no small ticks."""
    for scale in scales:
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_locator(NullLocator())


def spread(figure: Figure, colour: Colours, measured: dict[str, Any]) -> None:
    """How far ratios move from 1, against the length of the answer."""
    axes = figure.subplots()
    rows = measured["spread"]
    tokens = [row["tokens"] for row in rows]
    for name, ink in (("product", "purple"), ("token", "blue"), ("segment", "green"), ("sequence", "orange")):
        values = [row[name] for row in rows]
        axes.plot(tokens, values, color=colour[ink], marker="o", markersize=4)
        place = (tokens[-1], values[-1])
        axes.annotate(LABELS[name], place, (8, 0), textcoords="offset points", color=colour[ink], va="center", weight="bold")
    independent = [row["token"] / row["tokens"] ** 0.5 for row in rows]
    axes.plot(tokens, independent, color=colour["grey"], linewidth=1, linestyle=(0, (1, 2)))
    note = "dotted: token over the root of the length"
    axes.annotate(note, (tokens[0], 1.4e-3), color=colour["grey"], fontsize=8)
    for width, label in ((0.2, "GRPO's clip, 0.2"), (4e-4, "GSPO's upper clip, 4e-4")):
        axes.axhline(width, color=colour["grey"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(label, (tokens[0], width), (0, 3), textcoords="offset points", color=colour["grey"], fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(tokens[0] * 0.85, tokens[-1] * 2.6)
    axes.xaxis.set_major_locator(FixedLocator([round(value) for value in tokens]))
    plain(axes.xaxis, axes.yaxis)
    axes.set_xlabel("tokens in the answer (median of a group of answers)")
    axes.set_ylabel("standard deviation of the log ratio")


def surrogates(figure: Figure, colour: Colours, measured: dict[str, Any]) -> None:
    """Loss and gradient weight of one token, against its ratio."""
    log_ratios = RATIOS.log().unsqueeze(1)
    old = float(torch.tensor(PROBABILITY).log())
    columns = len(SURROGATES) // 2
    halves = figure.add_gridspec(2, 1, hspace=0.22)
    for half in range(2):
        grid: Any = halves[half].subgridspec(2, columns, hspace=0.1, wspace=0.12).subplots(sharex=True, sharey="row")
        for place, (title, surrogate) in enumerate(list(SURROGATES.items())[half * columns :][:columns]):
            above, below = grid[:, place]
            for sign, ink in ((1.0, "blue"), (-1.0, "orange")):
                advantages = torch.full((len(RATIOS),), sign, dtype=torch.float64)
                gradient, outputs = compute({"surrogate": surrogate, "aggregate": "sum"}, log_ratios, advantages, old)
                line = "-" if sign > 0 else (0, (4, 2))  # two lines may lie on each other
                above.plot(RATIOS, outputs.token_loss.detach()[:, 0], color=colour[ink], linestyle=line)
                below.plot(RATIOS, -gradient[:, 0] / sign, color=colour[ink], linestyle=line)
            above.set_title(title, fontsize=9, weight="bold", pad=4)
            above.set(ylim=(-3.8, 3.8), yticks=[-2, 0, 2])
            below.set(ylim=(-0.25, 3.1), yticks=[0, 1, 2, 3], xticks=[0, 1, 2, 3], xlabel="ratio" if half else "")
            for axes in (above, below):
                axes.grid(axis="x", visible=False)
                axes.axvline(1, color=colour["grey"], linewidth=0.6)
        for axes, label in zip(grid[:, 0], ("loss", "gradient weight"), strict=True):
            axes.set_ylabel(label)
    figure.text(0.49, 0.935, "advantage +1", color=colour["blue"], ha="right", weight="bold")
    figure.text(0.51, 0.935, "advantage -1 (dashed)", color=colour["orange"], ha="left", weight="bold")


def clipping(figure: Figure, colour: Colours, measured: dict[str, Any]) -> None:
    """How much a clip of some width takes out, for three ratios on the same answers."""
    axes = figure.subplots()
    places: dict[str, tuple[float, float, str, str]] = {
        "token": (1.2e-4, 19.0, "left", "blue"),
        "segment": (6.5e-3, 22.5, "left", "green"),
        "sequence": (2.3e-3, 22.5, "right", "orange"),
    }
    for name, (x, y, side, ink) in places.items():
        axes.plot(measured["widths"], [100 * share for share in measured["clipped"][name]], color=colour[ink])
        axes.annotate(LABELS[name], (x, y), color=colour[ink], weight="bold", ha=side)
    for width, label in ((3e-4, "GSPO's lower clip,\n3e-4"), (0.2, "GRPO's clip,\n0.2")):
        axes.axvline(width, color=colour["grey"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(label, (width, 57.5), (3, 0), textcoords="offset points", color=colour["grey"], fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(0, 65)
    plain(axes.xaxis)
    axes.set_xlabel("width of the clip: the ratio is held in [1 - width, 1 + width]")
    axes.set_ylabel("% of answer tokens without a gradient")


def gradients(figure: Figure, colour: Colours, measured: dict[str, Any]) -> None:
    """What each token is pushed by when advantages differ inside an answer."""
    grid = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.08})
    objectives: tuple[tuple[str, Any, str], ...] = (
        ("grpo", {"preset": "grpo", "kl": "none"}, "blue"),
        ("gspo", "gspo", "orange"),
        ("gspo_token", "gspo_token", "green"),
    )
    places = range(1, ADVANTAGES.shape[1] + 1)
    for axes, (title, spec, ink) in zip(grid, objectives, strict=True):
        gradient, outputs = compute(spec, LOG_RATIOS, ADVANTAGES, -2.0)
        axes.grid(axis="x", visible=False)
        axes.bar(
            places, ADVANTAGES[0].tolist(), width=0.86, color="none", edgecolor=colour["grey"], linewidth=0.8, linestyle=":"
        )
        axes.bar(places, (-gradient[0] * len(places)).tolist(), width=0.6, color=colour[ink])
        for place in (outputs.clipped_low | outputs.clipped_high)[0].nonzero().flatten().tolist():
            middle = (place + 1, float(ADVANTAGES[0, place]) / 2)
            axes.annotate("clipped", middle, color=colour["grey"], fontsize=8, rotation=90, ha="center", va="center")
        axes.axhline(0, color=colour["ink"], linewidth=0.8)
        axes.set_title(title, weight="bold", color=colour[ink])
        axes.set_xticks(list(places))
        axes.set_xlabel("token")
    grid[0].set_ylabel("push on the token's log-prob\n(minus the gradient, times n)")
    grid[0].annotate("dotted: its advantage", (8.5, 1.1), color=colour["grey"], fontsize=8, ha="right")
    grid[0].set_ylim(-1.35, 1.35)


FIGURES: dict[str, tuple[tuple[float, float], Callable[[Figure, Colours, dict[str, Any]], None]]] = {
    "spread": ((7.6, 4.0), spread),
    "surrogates": ((9.2, 8.4), surrogates),
    "clipping": ((7.6, 3.6), clipping),
    "gradients": ((9.2, 3.0), gradients),
}

# ---------------------------------------------------------------- to SVG


def style(colour: Colours) -> Any:
    return {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "ratchet",  # ids would else be random
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "figure.facecolor": colour["page"],
        "savefig.facecolor": colour["page"],
        "axes.facecolor": colour["page"],
        "axes.edgecolor": colour["grey"],
        "axes.labelcolor": colour["ink"],
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colour["faint"],
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.8,
        "path.simplify_threshold": 0.2,  # in pixels; smaller files
        "axes.unicode_minus": False,
        "text.color": colour["ink"],
        "xtick.color": colour["ink"],
        "ytick.color": colour["ink"],
        "xtick.bottom": False,  # the grid says where they are
        "ytick.left": False,
    }


def draw(name: str, theme: str, measured: dict[str, Any]) -> str:
    """One figure as SVG: of coordinates one digit, since finer ones differ between machines and nobody sees them."""
    size, paint = FIGURES[name]
    colour = THEMES[theme]
    with mpl.rc_context(style(colour)):
        figure = Figure(figsize=size)
        paint(figure, colour, measured)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.12, metadata={"Date": None, "Creator": None})
    return re.sub(r"<[a-z][^>]*>", lambda tag: shorter(tag.group()), buffer.getvalue())


def shorter(tag: str) -> str:
    """Coordinates with one digit, and no line breaks in a path."""
    short = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number.group()):.1f}".removesuffix(".0"), tag)
    return re.sub(r"\s+(?=[CLMQz\"])", "", short) if tag.startswith("<path") else short


def main() -> None:
    measured = json.loads((FOLDER / "measured.json").read_text())
    for name in FIGURES:
        for theme in THEMES:
            (FOLDER / f"{name}-{theme}.svg").write_text(draw(name, theme, measured))


if __name__ == "__main__":
    main()
