"""TRL's side of demo_trl.py and update.py: run by them, in an interpreter that has TRL and none of our packages.

    TRL_PYTHON trl_peer.py demo FOLDER      TRL_PYTHON trl_peer.py update MODEL DTYPE ADAPTER

It does one turn for each line that it reads, and answers with a line of JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports] - of the other environment
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from turns import quiet, take_turns, tell, turn_asked


def config(folder: str, **more: Any) -> GRPOConfig:
    """What both need to be a fair peer: float32 as given, no recomputation (both are on by default, on a CPU too)."""
    return GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, num_iterations=1, loss_type="grpo",
        importance_sampling_level="sequence", scale_rewards="group", beta=0.0, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="steps", logging_steps=1, num_generations=8, shuffle_dataset=False, **more,
    )  # fmt: skip


class Turns(TrainerCallback):
    """A turn is a rollout with its four updates."""

    def __init__(self) -> None:
        self.began = 0.0

    def wait(self, control: Any) -> None:
        control.should_training_stop = not turn_asked()
        self.began = time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tell("ready")
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 4 == 0:
            tell(time.process_time() - self.began)
            self.wait(control)


def demo(folder: Path) -> None:
    asked = json.loads((folder / "settings.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": f"rev {row['digits']}>", "right": row["reversed"]} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")

    def exact(completions: list[str], right: list[str], **_: Any) -> list[float]:
        return [float(one == wanted) for one, wanted in zip(completions, right, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), **asked["adamw"])
    shares = [*asked["schedule"], 0.0]  # the last is asked for, and of no effect
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares.__getitem__)
    trainer = GRPOTrainer(
        model, exact, config(
            str(folder), per_device_train_batch_size=64, gradient_accumulation_steps=1, steps_per_generation=4,
            max_completion_length=8, epsilon=0.1, temperature=1.0, top_k=0, top_p=1.0, max_steps=len(shares) - 1,
            max_grad_norm=asked["max_grad_norm"], seed=asked["seed"],
        ),
        train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, schedule), callbacks=[Turns()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder / "trl")


def update(source: str, dtype: str, adapter: str, case: str) -> None:
    """A turn is the loss of a batch and its gradients."""
    asked = json.loads(case)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    lora = LoraConfig(task_type="CAUSAL_LM", **asked["lora"]) if adapter == "lora" else None
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), config("unused", epsilon=0.1, max_completion_length=64),
        train_dataset=Dataset.from_list([{"prompt": "a"}]), processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=lora,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    prompts, answers = asked["prompts"], asked["answers"]
    longest = max(map(len, answers))
    inputs = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
        "completion_ids": torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers]),
        "completion_mask": torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers]),
        "advantages": torch.tensor(asked["advantages"]),
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }
    take_turns(lambda: trainer.compute_loss(trainer.model, inputs).backward(), trainer.model)


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    if sys.argv[1] == "demo":
        demo(Path(sys.argv[2]))
    else:
        update(*sys.argv[2:])
