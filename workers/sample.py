"""Samples answers of checkpoints in local folders, for `ratchet sample`: a request a line on stdin, an answer a line on stdout.

{"folder": ..., "model": the model section of a spec, "prompt": text or messages, "count": 2, "max_tokens": 64,
 "temperature": 1.0, "seed": 0, "options": what the chat template gets beside the messages}
-> {"answers": [{"text", "tokens", "finish_reason"}]} or {"error": {"code", "detail", "hint"}}
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from service.errors import JobFailed
from service.spec.model import Lora, ModelSpec
from workers.policy.base import Base
from workers.policy.load import adapter_of, model_folder
from workers.policy.policy import Policy

ADAPTER = "sampled"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. Raises JobFailed if the model cannot be loaded, or cannot take the prompt."""
    policy = _open(Path(request["folder"]), ModelSpec.model_validate({**request["model"], "from_checkpoint": None}))
    [completions] = policy.sample(
        [policy.text.encode(request["prompt"], **request.get("options", {}))],
        group_size=request["count"],
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        seed=request["seed"],
    )
    told = [{"text": one.text, "tokens": len(one.tokens), "finish_reason": one.finish_reason} for one in completions]
    return {"answers": told}


def _open(folder: Path, model: ModelSpec) -> Policy:
    base = Base.load(model, device="auto", threads=len(os.sched_getaffinity(0)), checkpoint=folder)
    adapter = adapter_of(model)
    if not isinstance(adapter, Lora):
        return Policy(base)
    base.adapters.add_saved(ADAPTER, model_folder(folder, adapter))
    return Policy(base, ADAPTER)


def told(request: dict[str, Any]) -> dict[str, Any]:
    """What stdout is told: an answer, or why there is none."""
    try:
        return answer(request)
    except JobFailed as error:
        return {"error": {"code": error.code, "detail": error.detail, "hint": error.hint}}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(told(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
