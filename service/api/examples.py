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
