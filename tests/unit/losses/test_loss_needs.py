"""What an objective needs of a batch, and what is probably not meant."""

from loss_batches import check, item


def missing(objective, **batch):
    entry = check({"objective": objective, "batch": batch}).items[0]
    if "error" not in entry:
        return []
    said = entry.get("errors", [entry["error"]])
    assert {one["code"] for one in said} == {"missing_tensor"}, said
    return [one["pointer"].removeprefix("/items/0/batch/") for one in said]


ROWS = [[-1.0, -2.0], [-1.0]]


def test_missing_tensors_are_named():
    assert missing("gspo", log_probs=ROWS) == ["old_log_probs", "advantages"]
    assert missing("grpo", log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["ref_log_probs"]
    assert missing("dppo", log_probs=ROWS, advantages=[1, 2]) == ["rollout_log_probs"]
    assert missing({"preset": "gspo", "ratio": "segment"}, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == [
        "segment_ids"
    ]
    assert missing(
        {"preset": "gspo", "correct": {"action": "truncate"}}, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]
    ) == ["rollout_log_probs"]
    top = {"preset": "gspo", "select": {"top_entropy": 0.2}}
    assert missing(top, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["entropy"]
    assert missing(top, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2], weights=ROWS) == []


def test_what_a_missing_tensor_is_for_is_said():
    entry = check({"objective": "grpo", "batch": {"log_probs": ROWS, "advantages": [1, 2]}}).items[0]
    assert [one["detail"] for one in entry["errors"]] == [
        "is missing: anchor old: the ratio's denominator",
        "is missing: kl.place loss compares with it (kl: none switches that off)",
    ]


def test_a_key_of_another_surrogate_is_said_to_be_its():
    entry = check({"objective": {"preset": "grpo", "surrogate": {"weight_max": 5}}, "batch": {"log_probs": ROWS}}).items[0]
    assert "belongs to /objective/surrogate/weight_max of kind cispo" in entry["error"]["detail"]


def test_advantages_may_be_made_of_rewards():
    assert missing("gspo", log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0]) == ["group_ids"]
    assert missing("gspo", log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0], group_ids=[0, 0]) == []
    whole = {"preset": "gspo", "advantage": {"centre": "none", "scale": "batch_std"}}
    assert missing(whole, log_probs=ROWS, old_log_probs=ROWS, rewards=[1, 0]) == []
    # A KL in the reward acts where rewards are, and nowhere else.
    assert missing("rloo", log_probs=ROWS, advantages=[1, 2]) == []
    assert missing("rloo", log_probs=ROWS, rewards=[1, 0], group_ids=[0, 0]) == ["old_log_probs", "ref_log_probs"]


def test_plain_cross_entropy_needs_log_probs_alone():
    assert missing("cross_entropy", log_probs=ROWS) == []
    assert missing("rloo", log_probs=ROWS) == ["advantages"]


def test_means_over_groups_need_groups():
    prompt = {"preset": "gspo", "aggregate": "prompt"}
    assert missing(prompt, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2]) == ["group_ids"]
    assert missing(prompt, log_probs=ROWS, old_log_probs=ROWS, advantages=[1, 2], weights=ROWS) == []


def test_a_selection_without_its_facts_is_switched_off_with_a_warning():
    entry = check({**item(), "objective": "dapo"}).items[0]
    assert entry["objective"]["select"] == {"truncated": False, "zero_variance": False, "top_entropy": None}
    assert [text.split()[0] for text in entry["warnings"]] == ["select.truncated", "select.zero_variance"]
    facts = {"truncated": [0, 1], "rewards": [1, 0], "group_ids": [0, 0]}
    entry = check({**item(**facts), "objective": "dapo"}).items[0]
    assert entry["objective"]["select"] == {"truncated": True, "zero_variance": True, "top_entropy": None}
    assert entry["warnings"] == []
    entry = check({**item(**facts, weights=[[1, 1], [1, 1, 1]]), "objective": "dapo"}).items[0]
    assert not any(entry["objective"]["select"].values())  # the weights are those of a step that was selected already


def test_what_is_legal_and_not_meant_is_said_in_the_answer():
    wide = {**item(), "objective": {"preset": "gspo", "surrogate": {"clip_low": 0.2, "clip_high": 0.2}}}
    assert any("hardly ever acts" in text for text in check(wide).items[0]["warnings"])


def test_a_divisor_that_depends_on_the_batch_and_a_kl_without_effect_are_warned_of():
    batch = {"log_probs": ROWS, "old_log_probs": ROWS, "advantages": [1, 2]}
    (text,) = check({"objective": "dr_grpo", "batch": batch}).items[0]["warnings"]
    assert "aggregate.constant" in text
    fixed = {"preset": "dr_grpo", "aggregate": {"constant": 1024}}
    assert check({"objective": fixed, "batch": batch}).items[0]["warnings"] == []
    assert check({"objective": "dr_grpo", "batch": batch | {"weights": ROWS}}).items[0]["warnings"] == []
    (text,) = check({"objective": "ppo", "batch": batch}).items[0]["warnings"]
    assert "kl.place reward changes nothing here" in text
    assert check({"objective": {"preset": "ppo", "kl": "none"}, "batch": batch}).items[0]["warnings"] == []
