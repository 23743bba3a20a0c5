"""Examples for the documentation; the tests submit them."""

JOB_SPEC = {
    "kind": "rl",
    "name": "addition",
    "model": {"source": "tiny"},
    "data": {
        "train": {"source": "inline", "rows": [{"question": "2+3=", "answer": "5"}, {"question": "4+4=", "answer": "8"}]},
        "prompt": "{question}",
        "answer": "{answer}",
    },
    "objective": {"preset": "gspo"},
    "rollout": {"prompts_per_step": 2, "group_size": 4, "max_completion_tokens": 4},
    "reward": {"graders": [{"kind": "exact", "reference": "{answer}"}]},
    "limits": {"max_steps": 10},
}

LOSS_REQUEST = {
    "items": [
        {
            "objective": {"preset": "gspo", "surrogate": {"clip_low": 3e-4, "clip_high": 4e-4}},
            "batch": {
                "log_probs": [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]],
                "old_log_probs": [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]],
                "advantages": [1.0, -1.0],
            },
            "return": ["gradients", "log_importance_ratio", "ratio", "clipped", "token_loss", "weights"],
        }
    ],
    "dtype": "float64",
    "all_or_nothing": False,
}

SESSION_SPEC = {
    "name": "my loop",
    "model": {"source": "tiny", "adapter": {"kind": "lora", "rank": 8}},
}

TRAIN_STEP = {
    "seq": 1,
    "kind": "train_step",
    "objective": {"preset": "gspo"},
    "groups": [
        {
            "prompt_tokens": [5, 6, 7],
            "answers": [
                {"tokens": [8, 9], "log_probs": [-0.7, -1.1], "reward": 1.0},
                {"tokens": [9, 9], "log_probs": [-0.9, -1.0], "reward": 0.0},
            ],
        }
    ],
    "optimizer": {"learning_rate": 1e-4},
}
OPERATION = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/OperationRequest"}, "example": TRAIN_STEP},
            "application/vnd.safetensors": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "A safetensors file: what is no number stands as JSON in the header's `__metadata__`, under "
                    "`head`; the tensors are flat, with cu_seqlens beside them.",
                }
            },
        },
    }
}
