"""The spec of a fork."""

from service.jobs.fork import forked_spec, merged
from service.store.tables import Job

SENT = {"kind": "rl", "model": {"source": "tiny", "dtype": "float32"}, "optimizer": {"learning_rate": 1e-4}}


def parent(checkpoint_id=None):
    return Job(spec_sent=SENT, checkpoint_id=checkpoint_id)


def test_merging_follows_the_standard():
    """The examples of RFC 7396, appendix A."""
    for target, patch, result in (
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "foo"}, None, None),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ):
        assert merged(target, patch) == result


def test_a_fork_starts_from_the_newest_checkpoint_unless_another_is_named():
    assert forked_spec(parent("ckpt_1"), None, {})["model"] == {**SENT["model"], "from_checkpoint": "ckpt_1"}
    assert forked_spec(parent("ckpt_1"), "ckpt_2", {})["model"]["from_checkpoint"] == "ckpt_2"
    overrides = {"model": {"from_checkpoint": "ckpt_3"}}
    assert forked_spec(parent("ckpt_1"), None, overrides)["model"]["from_checkpoint"] == "ckpt_3"
    assert forked_spec(parent("ckpt_1"), None, {"model": {"from_checkpoint": None}})["model"] == SENT["model"]
    assert forked_spec(parent(), None, {}) == SENT


def test_the_parent_s_spec_is_not_touched():
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in SENT.items()}
    forked_spec(parent("ckpt_1"), None, {"optimizer": {"learning_rate": 1}, "model": {"dtype": None}})
    assert before == SENT
