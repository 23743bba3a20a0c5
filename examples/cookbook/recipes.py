"""Run recipes of the real tinker-cookbook against a running Ratchet, without any hub, and print what they measured.

    python -m venv cookbook && cookbook/bin/pip install tinker==0.38.0 tinker-cookbook==0.6.1
    ratchet up                                     # in another terminal, in the folder WORK
    export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=$(cat .ratchet/key)
    cookbook/bin/python examples/cookbook/recipes.py WORK                     # every recipe, a small model of random weights
    cookbook/bin/python examples/cookbook/recipes.py WORK math_rl sdft        # these
    cookbook/bin/python examples/cookbook/recipes.py WORK --model models/smollm2 math_rl --steps 30 learning_rate=3e-4

The packages are not changed. The recipes name models and data sets of the hub, and the libraries prefer folders of those names
(`Qwen/Qwen3-8B`, `openai/gsm8k`), so WORK gets some: the model is a small one made here, or the one given, and the rows are
sums of two numbers. WORK is a new folder, an empty one, or one that this script made (its file `.ratchet-cookbook` says so):
any other is refused, for files in it could be lost. Ratchet must see the same models, so start it in WORK (or give it
RATCHET_MODELS_DIR=WORK).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT, PLAIN = "Qwen/Qwen3-8B", "Qwen/Qwen3.5-9B-Base"  # the names in the recipes, with their renderers: qwen3 and role_colon
ANSWERER = "Qwen/Qwen3.5-9B"  # of `twenty_questions`, which cannot be told another
ARITHMETIC = ["env=arithmetic", "loss_fn=importance_sampling", "group_size=8", "groups_per_batch=6", "learning_rate=3e-4"]
STREAM = ["stream_minibatch_config.groups_per_batch=6", "stream_minibatch_config.num_minibatches=2"]
LOOP = ("renderer_name", "behavior_if_log_dir_exists")
MARK = ".ratchet-cookbook"  # in the folders that are this script's to write and to delete in
KL, REWARD, NLL = "optim/kl_sample_train_v1", "env/all/reward/total", "train_mean_nll"


@dataclass(frozen=True)
class Recipe:
    """`module` of tinker_cookbook.recipes; `shows`: metrics whose first and last values are printed."""

    module: str
    args: list[str]
    shows: list[str]
    steps: int = 4
    model: str = PLAIN
    resumes: bool = False  # run to half its steps, then again: the second run must go on from the checkpoint
    unnamed: tuple[str, ...] = ()  # of the arguments that most recipes have, those that this one lacks


RECIPES = {
    "math_rl": Recipe("math_rl.train", ARITHMETIC, [REWARD, KL]),
    "math_rl-async": Recipe("math_rl.train", [*ARITHMETIC, "max_steps_off_policy=2"], [REWARD, KL]),
    "math_rl-stream": Recipe("math_rl.train", [*ARITHMETIC, *STREAM], [REWARD, KL]),
    "math_rl-resumed": Recipe("math_rl.train", [*ARITHMETIC, "save_every=2"], [REWARD, KL], resumes=True),
    "math_rl-post_kl": Recipe("math_rl.train", [*ARITHMETIC, "compute_post_kl=true"], [REWARD, KL, "kl_pre_post_v1"]),
    "math_rl-ppo": Recipe("math_rl.train", [*ARITHMETIC[:1], "loss_fn=ppo", "num_substeps=2", *ARITHMETIC[2:]], [REWARD, KL]),
    "math_rl-gsm8k": Recipe(
        "math_rl.train",
        ["env=gsm8k", "loss_fn=importance_sampling", "group_size=4", "groups_per_batch=4", "max_tokens=24", "eval_every=2"],
        [REWARD, KL],
        steps=2,
    ),
    "chat_sl": Recipe("chat_sl.train", ["batch_size=8", "learning_rate=1e-3", "eval_every=2"], [NLL, "test/nll"]),
    "chat_sl-file": Recipe(
        "chat_sl.train", ["dataset=conversations.jsonl", "batch_size=8", "learning_rate=1e-3", "rolling_save_every=1"], [NLL]
    ),
    "rl_basic": Recipe(  # its batch is 128 prompts of 16 answers
        "rl_basic",
        ["max_tokens=8", "kl_penalty_coef=0.1", f"kl_reference_config.base_model={PLAIN}"],
        [REWARD, KL, "kl_policy_base"],
        steps=1,
        unnamed=LOOP,
    ),
    "sl_basic": Recipe("sl_basic", ["learning_rate=1e-3"], [NLL], steps=2, unnamed=LOOP),
    "rl_loop": Recipe(
        "rl_loop",
        ["loss_fn=importance_sampling", "batch_size=4", "group_size=4", "max_tokens=24"],
        ["reward/total", "grad_norm"],
        steps=2,
        unnamed=LOOP,
    ),
    "rl_loop-gspo": Recipe(
        "rl_loop", ["loss_fn=gspo", "batch_size=4", "group_size=4", "max_tokens=24"], ["reward/total"], steps=2, unnamed=LOOP
    ),
    "sl_loop": Recipe("sl_loop", ["batch_size=8", "learning_rate=1e-3"], [NLL], unnamed=LOOP),
    "preference-dpo": Recipe(
        "preference.dpo.train",
        ["batch_size=8", "learning_rate=1e-3"],
        ["dpo_loss", "accuracy", "margin"],
        unnamed=("lora_rank",),
    ),
    "distillation": Recipe(
        "distillation.on_policy_distillation",
        [
            "dataset=deepmath",
            f"teacher_model={CHAT}",
            "group_size=4",
            "groups_per_batch=4",
            "max_tokens=16",
            "learning_rate=1e-3",
        ],
        ["teacher_kl", KL],
    ),
    "sdft": Recipe(
        "sdft.train",
        ["groups_per_batch=4", "max_tokens=16", "learning_rate=1e-3", "topk=8", "eval_every=0"],
        ["sdft/mean_teacher_entropy", "grad_norm"],
        model=CHAT,
    ),
    "sdft-reverse": Recipe(
        "sdft.train",
        ["groups_per_batch=4", "max_tokens=16", "learning_rate=1e-3", "topk=8", "reverse=true", "eval_every=0"],
        ["sdft/reverse_kl_mean", "grad_norm"],
        model=CHAT,
    ),
    "rubric": Recipe(  # another model grades
        "rubric.train",
        [
            "loss_fn=importance_sampling",
            "train_group_size=4",
            "groups_per_batch=4",
            "learning_rate=1e-3",
            f"grader_llm_name={CHAT}",
            "grader_renderer_name=qwen3",
            "train_jsonl_path=rubrics.jsonl",
            "test_jsonl_path=rubrics.jsonl",
            "eval_every=0",
        ],
        [REWARD, KL],
        steps=2,
    ),
    "guess_number": Recipe(  # many turns
        "multiplayer_rl.guess_number.train",
        ["group_size=4", "batch_size=4", "max_tokens=8", "eval_every=0"],
        [REWARD, KL],
        steps=2,
        unnamed=("lora_rank",),
    ),
    "twenty_questions": Recipe(  # many turns, and another model answers
        "multiplayer_rl.twenty_questions.train",
        ["group_size=4", "batch_size=4", "max_tokens=8", "eval_every=0"],
        [REWARD, KL],
        steps=2,
        unnamed=("lora_rank",),
    ),
    "prompt_distillation": Recipe(
        "prompt_distillation.train",
        ["file_path=conversations.jsonl", "batch_size=8", "learning_rate=1e-3", "eval_every=0"],
        [NLL],
    ),
}


# ---------------------------------------------------------------- what the hub would have


def sums(seed: int, count: int) -> Iterator[tuple[str, str]]:
    numbers = random.Random(seed)
    for _ in range(count):
        x, y = numbers.randint(0, 50), numbers.randint(0, 50)
        yield f"What is {x} + {y}?", str(x + y)


def data_sets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by data set and split, in the form that its owner gives them."""

    def chat(seed: int, count: int) -> list[dict[str, Any]]:
        return [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": f"It is {answer}."}]}
            for ask, answer in sums(seed, count)
        ]

    def pairs(seed: int, count: int) -> list[dict[str, Any]]:
        asked = [(f"\n\nHuman: {ask}\n\nAssistant: ", answer) for ask, answer in sums(seed, count)]
        return [{"chosen": ask + answer, "rejected": ask + "I would rather not say."} for ask, answer in asked]

    def chosen(ask: str, answer: str) -> dict[str, Any]:
        text = [answer, str(int(answer) + 1), str(int(answer) + 2), str(int(answer) + 10)]
        about = {"domain": "Chemistry", "details": {"level": "L3"}, "type": "mcq-4-choices", "answerKey": "A"}
        return {"question": ask, "choices": {"label": [*"ABCD"], "text": text}, **about}

    def solved(seed: int, count: int) -> list[dict[str, Any]]:
        return [{"question": ask, "answer": f"#### {answer}"} for ask, answer in sums(seed, count)]

    return {
        "openai/gsm8k": {"train": solved(0, 128), "test": solved(1, 8)},
        "HuggingFaceH4/no_robots": {"train": chat(0, 256), "test": chat(1, 8)},
        "Anthropic/hh-rlhf": {"train": pairs(0, 64), "test": pairs(1, 8)},
        "zwhe99/DeepMath-103K": {"train": [{"question": ask, "final_answer": answer} for ask, answer in sums(0, 64)]},
        "hicai-zju/SciKnowEval": {"test": [chosen(*each) for each in sums(0, 64)]},
    }


def prepare(work: Path, model: Path | None = None) -> None:
    """Make WORK what the recipes take for the hub, with the given model or a small one."""
    claim(work)
    write_data(work)
    for seed, name in enumerate((CHAT, PLAIN, ANSWERER)):
        place_model(work, name, seed, model)


def claim(work: Path) -> None:
    """Make WORK this script's own. Exits if something of somebody else's is in it."""
    if work.is_dir() and not (work / MARK).is_file() and any(each.name != ".ratchet" for each in work.iterdir()):
        sys.exit(f"{work} is not empty, and this script did not make it: files in it could be lost. Name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    (work / MARK).touch()


def place_model(work: Path, name: str, seed: int, given: Path | None) -> None:
    """Let WORK/NAME be a link to the given model, or to a small one that is made once."""
    model = given.absolute() if given else work / "small" / name
    if not given and not model.exists():
        write_model(model, seed)
    link = work / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and not link.is_symlink():
        sys.exit(f"{link} is not a link of this script's. Move it elsewhere, and give it with --model")
    link.unlink(missing_ok=True)
    link.symlink_to(model)


def write_data(work: Path) -> None:
    shutil.rmtree(work / "cache", ignore_errors=True)  # `datasets` would not see that a file has changed
    for name, splits in data_sets().items():
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = "".join(f"\n      - split: {split}\n        path: {split}.jsonl" for split in splits)
        config = "main" if name == "openai/gsm8k" else "default"
        (folder / "README.md").write_text(f"---\nconfigs:\n  - config_name: {config}\n    data_files:{files}\n---\n")
    rows = data_sets()["HuggingFaceH4/no_robots"]["train"]
    (work / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = [
        {
            "convo": [{"role": "user", "content": ask}],
            "rubric_items": [
                {
                    "rubric_str": f"Is the answer {answer}?",
                    "extraction_regex": "([0-9])",  # of the random answer of a small grader
                    "grader_output_format_instruction": "Answer with a digit",
                }
            ],
        }
        for ask, answer in sums(0, 64)
    ]
    (work / "rubrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))


def write_model(folder: Path, seed: int) -> None:
    """A Llama of 2 layers with random weights, over bytes and the marks of Qwen's chats."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    end, nothing = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(letters) + len(marks),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=end,
        pad_token_id=nothing,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# ---------------------------------------------------------------- running


@dataclass
class Ran:
    name: str
    status: int
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def shown(self, metrics: list[str]) -> str:
        """First and last values."""
        parts = []
        for metric in metrics:
            values = [row[metric] for row in self.rows if metric in row]
            if values:
                parts.append(f"{metric} {values[0]:.4g} -> {values[-1]:.4g}")
        return ", ".join(parts)


def arguments(recipe: Recipe, log: Path) -> list[str]:
    """What its command line is given, but for the number of steps."""
    common = {
        "model_name": recipe.model,
        "lora_rank": "16",
        "renderer_name": "role_colon" if recipe.model == PLAIN else "qwen3",
        "behavior_if_log_dir_exists": "resume" if recipe.resumes else "delete",
        "log_path": str(log),
    }
    return [*(f"{key}={value}" for key, value in common.items() if key not in recipe.unnamed), *recipe.args]


def offline(work: Path) -> dict[str, str]:
    """Variables with which nothing asks a hub."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    return {**os.environ, **quiet, "HF_DATASETS_CACHE": str(work / "cache")}


def measured(log: Path) -> list[dict[str, Any]]:
    """The metrics of its steps so far."""
    metrics = log / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []


def run(name: str, recipe: Recipe, work: Path, steps: int, more: list[str]) -> Ran:
    log = work / "runs" / name
    shutil.rmtree(log, ignore_errors=True)
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe.module}", *arguments(recipe, log)]
    began, status = time.monotonic(), 0
    with log.with_suffix(".log").open("wb") as out:
        for most in (steps // 2, steps) if recipe.resumes else (steps,):
            whole = [*command, f"max_steps={most}", *more]
            status = subprocess.run(whole, cwd=work, env=offline(work), stdout=out, stderr=out, check=False).returncode
            if status:
                break
    return Ran(name, status, time.monotonic() - began, measured(log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("which", nargs="*", metavar="recipe or argument=value")
    parser.add_argument("--model", type=Path, help="a folder with a model; without it a small one is made")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only-prepare", action="store_true")
    given = parser.parse_intermixed_args()
    more = [each for each in given.which if "=" in each]
    names = [each for each in given.which if "=" not in each] or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}. There are: {', '.join(RECIPES)}")
    if given.model is not None and not given.model.is_dir():
        parser.error(f"--model {given.model} is not a folder")
    work = given.work.absolute()
    prepare(work, given.model)
    if given.only_prepare:
        return
    failed = False
    for name in names:
        recipe = RECIPES[name]
        steps = given.steps or recipe.steps
        ran = run(name, recipe, work, steps, more)
        failed |= ran.status != 0
        outcome = ran.shown(recipe.shows) if ran.status == 0 else f"exit status {ran.status}, see {work}/runs/{name}.log"
        print(f"{name:18} {steps:3} steps {ran.seconds:6.1f} s  {outcome}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
