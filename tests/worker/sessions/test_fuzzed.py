"""Operations that are nearly right and that the API takes: each ends with a result or an error of the user's, and the session
goes on."""

import random
from typing import Any

import pytest
from mutations import Mutator
from session_operations import forward_backward, optim_step, row, train_step
from sqlalchemy import select

from service.edge.arrays import parse_arrays
from service.errors import RatchetError
from service.sessions.body import OperationBody, asked
from service.sessions.codec import unpack
from service.sessions.tensors import asked_of_tensors
from service.store.operations import Asked
from service.store.tables import Operation
from service.validation import parse

TAKEN = 150
MOST_COST = 2000  # tokens: what is larger is right, and only takes long
PPO = row(5, 6, 7, log_probs=[-1.0, -0.5], advantages=[0.0, 1.0], mask=[0, 1])
RIGHT: list[dict[str, Any]] = [
    forward_backward(row(5, 6, 7), row(8, 9, 10)),
    forward_backward({k: v for k, v in PPO.items() if k != "mask"}, loss="ppo", config={"clip_low_threshold": 0.9}),
    forward_backward(
        {"tokens": [5, 6], "target_tokens": [[6, 7], [7, 8]], "weights": [[0.5, 0.5], [1.0, 0.0]]}, kind="forward"
    ),
    forward_backward(PPO, loss="gspo"),
    forward_backward(PPO, loss="dro", config={"beta": 0.1}),
    {key: value for key, value in train_step().items() if key in ("objective", "groups")} | {"kind": "forward_backward"},
    optim_step(),
    train_step(),
    {"kind": "sample", "prompts": [[5, 6], [7]], "num_samples": 2, "sampling": {"max_tokens": 3, "stop_ids": [3]}, "seed": 3},
    {"kind": "sample", "texts": ["1+1="], "prompt_log_probs": True, "top_log_probs": 2, "sampling": {"max_tokens": 2}},
    {"kind": "save_checkpoint", "name": "v", "overwrite": True, "metadata": {"a": 1}},
    {"kind": "load_checkpoint", "checkpoint": "ckpt_01k0000000000000000000000"},
]


def nearly(draw: random.Random, seq: int) -> Asked:
    """One that the API takes, as it is logged."""
    mutator = Mutator(draw)
    while True:
        body = {**draw.choice(RIGHT), "seq": seq}
        try:
            if draw.random() < 0.5:
                head, tensors = unpack(asked(parse(OperationBody, body)).request)
                head = {key: value for key, value in head.items() if key != "checkpoint" or body["kind"] != "sample"}
                taken = asked_of_tensors(mutator.tensors({**head, "seq": seq}, tensors))
            else:
                taken = asked(parse(OperationBody, parse_arrays(mutator.text(mutator.tree(body, RIGHT)))))
        except RatchetError:
            continue
        if taken.seq == seq and taken.cost <= MOST_COST and taken.kind != "finish":
            return taken


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_whatever_is_taken_ends_with_a_result_or_an_error_of_the_user_s(rig: Any) -> None:
    draw, job = random.Random(1), rig.session()
    rig._append(job, [nearly(draw, seq) for seq in range(1, TAKEN + 1)])
    rig.send(job, forward_backward(row(5, 6, 7)), optim_step())
    rig.work()
    with rig.store.begin(readonly=True) as session:
        rows = list(session.scalars(select(Operation).filter_by(job_id=job)))
    wrong = [(one.kind, one.status, one.error) for one in rows if one.error is not None and one.error["category"] != "user"]
    assert not wrong, wrong[:5]
    assert {one.status for one in rows} == {"done", "failed"} and len(rows) == TAKEN + 2
    assert rig.job(job).status_reason == "idle"
    assert rig.answer(job, TAKEN + 2)["metrics"]["learning_rate"] > 0
