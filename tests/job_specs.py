"""The job specs that tests begin with: one for what is checked and never run, one for what workers run in a second or two."""

from typing import Any

# ---------------------------------------------------------------- to be checked

RL: dict[str, Any] = {  # the smallest that is complete
    "kind": "rl",
    "model": {"source": "tiny"},
    "data": {
        "train": {"source": "inline", "rows": [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "4"}]},
        "prompt": "{q}",
        "answer": "{a}",
    },
    "objective": {"preset": "gspo"},
    "reward": {"graders": [{"kind": "exact", "reference": "{a}"}]},
}
SUPERVISED: dict[str, Any] = {key: RL[key] for key in ("model", "data")} | {"kind": "supervised"}


# ---------------------------------------------------------------- to be run: three digits, to be reversed

TINY: dict[str, Any] = {"source": "tiny", "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64}}
DIGITS = [{"q": f"{n:03d}", "a": f"{n:03d}"[::-1]} for n in range(0, 1000, 7)]


def reversing(eval_rows: int) -> dict[str, Any]:
    """The data; as many of its rows as are asked for are kept for evaluations."""
    held_out = {"eval": {"source": "split", "rows": eval_rows}} if eval_rows else {}
    return {"train": {"source": "inline", "rows": DIGITS}, **held_out, "prompt": "rev {q}>", "answer": "{a}"}


def rl_spec(**sections: Any) -> dict[str, Any]:
    """Rewarded by the share of places that are right. `sections` replace those of the spec."""
    return {
        "kind": "rl",
        "model": TINY,
        "data": reversing(eval_rows=16),
        "objective": {"preset": "gspo", "surrogate": {"clip_low": 0.1, "clip_high": 0.1}},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 4},
        "reward": {"graders": [{"kind": "similarity", "metric": "position", "reference": "{a}"}]},
        "optimizer": {"learning_rate": 1e-3},
        "eval": {"every_steps": 4, "temperature": 1.0},
        "checkpoints": {"every_steps": 2},
        "limits": {"max_steps": 6},
        **sections,
    }


def supervised_spec(**sections: Any) -> dict[str, Any]:
    return {
        "kind": "supervised",
        "model": TINY,
        "data": reversing(eval_rows=0),
        "update": {"batch_size": 8},
        "optimizer": {"learning_rate": 2e-3},
        "limits": {"max_steps": 6},
        **sections,
    }
