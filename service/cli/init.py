"""`ratchet init`: a commented spec for a task, which is valid as it is."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ratchet_client import RatchetError
from service.cli.helps import command
from service.cli.output import complain, say

MODEL = """\
model:
  source: tiny              # built in, for trying out. A folder of RATCHET_MODELS_DIR, or a hub id: Qwen/Qwen3-0.6B
  # adapter: {kind: lora, rank: 16}   # what of a larger model is trained; `full` trains every weight
"""
DATA = """\
data:
  train:
    source: inline          # a few rows, to begin with. Many: ratchet datasets upload rows.jsonl, then
    rows:                   #   train: {source: dataset, id: ds_...}
      - {question: "2+3=", answer: "5"}
      - {question: "4+4=", answer: "8"}
      - {question: "7+2=", answer: "9"}
  # eval: {source: split, rows: 100}   # rows held out of training, to see whether it generalises
  prompt: "{question}"      # a template over the columns. For chat models instead:
  # chat: [{role: user, content: "{question}"}]
"""
SAMPLING = """\
objective:
  preset: gspo              # or grpo, dr_grpo, dapo, ...: docs/objectives.md
rollout:
  prompts_per_step: 2       # prompts in one step; 32 or more for a real run
  group_size: 4             # answers to each prompt, which are compared with each other
  max_completion_tokens: 4  # the longest answer; longer ones are cut off
"""
LIMITS = """\
limits:
  max_steps: {steps}
  # max_runtime_s: 3600     # the job fails after running for so long
  on_no_signal: warn        # pause, fail: what to do when nothing is learnt
"""
REWARDS = {
    "exact": '    - {kind: exact, reference: "{answer}"}   # 1 if the answer is the reference, else 0\n',
    "number": (
        "    - {kind: number, reference: \"{answer}\"}   # 1 if the answer's last number or formula equals the reference's\n"
        "    # - {kind: length, max_tokens: 200, slack: 50, weight: 0.1}   # a second grader; the reward is the weighted sum\n"
    ),
    "judge": (
        "    - kind: http            # your own reward service: gets batches of answers, answers rewards (docs/graders.md)\n"
        "      url: https://rewards.example.com/score\n"
        "      # secret: judge       # name of an operator's secret that signs each batch (RATCHET_GRADER_SECRETS)\n"
        "      timeout_s: 30\n"
    ),
}


class Task(StrEnum):
    exact = "exact"
    number = "number"
    judge = "judge"
    supervised = "supervised"


ABOUT = {
    Task.exact: "Reinforcement learning: an answer is right if it is the reference.",
    Task.number: "Reinforcement learning: an answer is right if its last number or formula equals the reference's.",
    Task.judge: "Reinforcement learning with rewards of your own service.",
    Task.supervised: "Supervised fine-tuning: the model learns given answers.",
}


def spec_of(task: Task) -> str:
    """The spec as YAML, with comments."""
    head = f"# {ABOUT[task]}\n# ratchet validate FILE shows what it means, ratchet submit FILE --follow runs it.\n"
    head += "# docs/spec.md has every field.\n"
    if task is Task.supervised:
        learning = "optimizer: {learning_rate: 1.0e-3}   # of the tiny model; 1e-4 for LoRA, 1e-5 for all weights\n"
        parts = ["kind: supervised\n", MODEL, DATA, '  answer: "{answer}"        # what is learnt\n', learning]
        return head + "name: supervised\n" + "".join(parts) + "update: {batch_size: 2}\n" + LIMITS.format(steps=20)
    answer = "" if task is Task.judge else '  answer: "{answer}"        # shown beside the samples\n'
    optimizer = "# optimizer: {learning_rate: 1.0e-5}\n"
    reward = "reward:\n  graders:                  # what a better answer is: docs/graders.md\n" + REWARDS[task.value]
    named = f"name: {task.value}\nkind: rl\n"
    return "".join([head, named, MODEL, DATA, answer, SAMPLING, reward, optimizer, LIMITS.format(steps=20)])


def register(app: typer.Typer) -> None:
    command(app, init)


def init(
    task: Annotated[Task, typer.Argument(help="exact, number, judge (a reward service) or supervised")],
    to: Annotated[Path | None, typer.Option(help="the new file; default: standard output")] = None,
) -> None:
    """Write a commented job spec to begin with. It is valid as it is.

    $ ratchet init number --to job.yaml
    $ ratchet validate job.yaml
    $ ratchet submit job.yaml --follow
    """
    if to is None:
        say(spec_of(task).rstrip())
        return
    try:
        with to.open("x") as file:
            file.write(spec_of(task))
    except FileExistsError:
        raise RatchetError(f"{to} is there already; name another file") from None
    complain(f"{to} written; ratchet validate {to}")
