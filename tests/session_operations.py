"""The operations that tests of sessions send: small ones, on a tiny model."""

from typing import Any

TINY = {"source": "tiny", "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64, "context": 64}}
LORA = {**TINY, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
FULL = {**TINY, "adapter": {"kind": "full"}}
ADAM = {"learning_rate": 1e-2, "weight_decay": 0.1}


def row(*tokens: int, **tensors: Any) -> dict[str, Any]:
    """A row of cross_entropy: each token's target is the next one."""
    return {"tokens": list(tokens[:-1]), "target_tokens": list(tokens[1:]), **tensors}


def forward_backward(*rows: dict[str, Any], loss: str = "cross_entropy", kind: str = "forward_backward", **more: Any) -> Any:
    return {"kind": kind, "loss": loss, "rows": list(rows), **more}


def optim_step(**settings: Any) -> dict[str, Any]:
    return {"kind": "optim_step", "optimizer": {**ADAM, **settings}}


def train_step(**more: Any) -> dict[str, Any]:
    groups = [
        {
            "prompt_tokens": [5, 6, 7 + group],
            "answers": [
                {"tokens": [8 + answer, 9, 10 + group][: 2 + answer % 2], "reward": float(answer % 2)} for answer in range(4)
            ],
        }
        for group in range(2)
    ]
    return {
        "kind": "train_step",
        "objective": {"preset": "gspo"},
        "groups": groups,
        "optimizer": ADAM,
        "minibatches": 2,
        "epochs": 2,
        **more,
    }


def loop(steps: int, first: int = 0) -> list[dict[str, Any]]:
    """A client's loop: two gradients and a step, again and again, on data that depend on the step only."""
    sent: list[dict[str, Any]] = []
    for step in range(first, first + steps):
        sent.append(forward_backward(row(5, 6 + step, 7, 8), row(9, 10, 11 + step)))
        sent.append(forward_backward(row(12, 13 + step, 14), loss="cross_entropy"))
        sent.append(optim_step())
    return sent
