"""What the scorers of reasoning-gym pay: the table in docs/graders.md. `python bench/reasoning_gym_scorers.py`

Each task of the installed package makes 20 rows with its default configuration (composite: one of basic_arithmetic), and its
scorer is asked about the row's own answer, that with a 1 behind it, an empty text, constants, and the answers of other rows
where these differ.
"""

import io
import multiprocessing
import signal
import sys
from importlib.metadata import version
from statistics import fmean
from typing import Any

ROWS = 20
TASK_WITHIN_S, ANSWER_WITHIN_S = 300, 5
CONSTANTS = ("0", "1", "yes", "I do not know")


def main() -> None:
    from reasoning_gym.factory import DATASETS

    print(f"reasoning-gym {version('reasoning-gym')}, {ROWS} rows a task\n")
    print(
        "| task | its own answer | with `1` behind | empty | "
        + " | ".join(f"`{text}`" for text in CONSTANTS)
        + " | another row's |"
    )
    print("|---|---|---|---|" + "---|" * len(CONSTANTS) + "---|")
    for task in sorted(DATASETS):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            try:
                cells = pool.apply_async(measure, (task,)).get(TASK_WITHIN_S)
            except multiprocessing.TimeoutError:
                cells = ["takes too long"]
            except Exception as error:
                cells = [f"{type(error).__name__}: {error}"[:60]]
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


def measure(task: str) -> list[str]:
    """The cells of one line of the table."""
    sys.stdout = io.StringIO()  # some scorers print
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import create_dataset

    config = {"datasets": [DatasetSpec("basic_arithmetic", 1.0, {})]} if task == "composite" else {}
    dataset = create_dataset(task, seed=7, size=ROWS, **config)
    rows = [dataset[i] for i in range(ROWS)]
    others = [rows[(i + 1) % ROWS]["answer"] for i in range(ROWS)]
    return [
        cell([score(dataset, row["answer"], row) for row in rows]),
        cell([score(dataset, f"{row['answer']}1", row) for row in rows if row["answer"] is not None]),
        *[cell([score(dataset, text, row) for row in rows if not same(text, row["answer"])]) for text in ("", *CONSTANTS)],
        cell([score(dataset, other, row) for other, row in zip(others, rows, strict=True) if not same(other, row["answer"])]),
    ]


def same(answer: Any, right: Any) -> bool:
    return str(answer).strip().casefold() == str(right).strip().casefold()


def score(dataset: Any, answer: Any, row: dict[str, Any]) -> float | str:
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(ANSWER_WITHIN_S)
    try:
        return float(dataset.score_answer(answer, row))
    except BaseException as error:
        return type(error).__name__
    finally:
        signal.alarm(0)


def _late(*_: Any) -> None:
    raise TimeoutError


def cell(scores: list[float | str]) -> str:
    """The mean, and the largest where they differ; the first exception where there is one; a dash where nothing was asked."""
    numbers = [score for score in scores if isinstance(score, float)]
    raised = [score for score in scores if isinstance(score, str)]
    text = "-" if not numbers else f"{fmean(numbers):.3g}"
    if numbers and max(numbers) - min(numbers) > 1e-9:
        text += f" (up to {max(numbers):.3g})"
    return text if not raised else f"{text}; {raised[0]} in {len(raised)} of {len(scores)}"


if __name__ == "__main__":
    main()
