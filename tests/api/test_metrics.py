"""Curves and sampled groups."""

import pytest

from service.ids import utcnow
from service.store import metrics, rollouts
from service.store.rollouts import RolloutRow


@pytest.fixture
def run(each_api, spec):
    """A job of 200 steps with one spike in its reward, and its client."""
    with each_api.client() as client:
        job_id = client.post("/v1/jobs", json=spec(limits={"max_steps": 200})).json()["id"]
        with each_api.store.begin() as session:
            for step in range(1, 201):
                values = {"reward/mean": 99.0 if step == 77 else step / 200, "policy/kl": None if step == 3 else 0.1}
                metrics.write(session, job_id, step, values, attempt=1, now=utcnow())
            for step in (100, 200):
                rollouts.write(session, job_id, groups(step), attempt=1, now=utcnow())
        yield client, job_id


def groups(step):
    return [
        RolloutRow(split, step, group, f"{group}+1=", str(group + 1), [{"completion": "2", "reward": 1.0}])
        for split in ("train", "eval")
        for group in range(3)
    ]


def test_curves_come_by_column(run):
    client, job_id = run

    def read(**query):
        answer = client.get(f"/v1/jobs/{job_id}/metrics", params=query).json()
        assert (answer["object"], answer["job_id"]) == ("metrics", job_id)
        return answer["series"]

    assert set(read()) == {"reward/mean", "policy/kl"}
    kl = read(name="policy/kl", from_step=2, to_step=4)
    assert kl == {"policy/kl": {"step": [2, 3, 4], "value": [0.1, None, 0.1]}}
    assert read(name=["reward/mean", "absent"], from_step=199)["absent"] == {"step": [], "value": []}

    reward = read(name="reward/mean", points=20)["reward/mean"]
    assert len(reward["step"]) == 20
    assert reward["step"][-1] == 200
    spike = reward["max"].index(99.0)
    assert reward["step"][spike] == 80
    assert reward["value"][spike] == pytest.approx((sum(range(71, 81)) / 200 - 77 / 200 + 99) / 10)
    assert reward["min"][spike] == pytest.approx(71 / 200)


def test_the_newest_points_of_each_curve_are_given_as_they_are(run):
    client, job_id = run

    def read(**query):
        return client.get(f"/v1/jobs/{job_id}/metrics", params=query).json()["series"]

    assert read(newest=1) == {
        "policy/kl": {"step": [200], "value": [0.1]},
        "reward/mean": {"step": [200], "value": [1.0]},
    }
    assert read(name="reward/mean", newest=3, to_step=78)["reward/mean"] == {"step": [76, 77, 78], "value": [0.38, 99.0, 0.39]}
    assert read(name="absent", newest=1)["absent"] == {"step": [], "value": []}
    thinned = read(name="reward/mean", newest=100, points=10)["reward/mean"]
    assert len(thinned["step"]) == 10 and thinned["step"][-1] == 200 and min(thinned["min"]) == 101 / 200
    assert client.get(f"/v1/jobs/{job_id}/metrics", params={"newest": 0}).status_code == 422


def test_a_curve_of_few_points_is_given_as_it_is_however_far_apart_they_are(each_api, run):
    client, job_id = run
    with each_api.store.begin() as session:
        for step in (50, 100, 150, 200):
            metrics.write(session, job_id, step, {"eval/reward/mean": step / 100}, attempt=1, now=utcnow())

    def read(points):
        return client.get(f"/v1/jobs/{job_id}/metrics", params={"name": "eval/reward/mean", "points": points}).json()["series"]

    assert read(4) == {"eval/reward/mean": {"step": [50, 100, 150, 200], "value": [0.5, 1.0, 1.5, 2.0]}}
    assert read(3)["eval/reward/mean"]["min"] == [0.5, 1.5, 2.0]


def test_rollouts_are_listed_newest_first(run):
    client, job_id = run
    path = f"/v1/jobs/{job_id}/rollouts"
    everything = client.get(path).json()["data"]
    assert [one["id"] for one in everything] == [
        f"{step}.{split}.{group}" for step in (200, 100) for split in ("eval", "train") for group in (0, 1, 2)
    ]
    assert everything[0]["samples"] == [{"completion": "2", "reward": 1.0}]
    only = client.get(path, params={"split": "train", "step": 100}).json()["data"]
    assert [(one["split"], one["step"], one["group_index"]) for one in only] == [
        ("train", 100, 0),
        ("train", 100, 1),
        ("train", 100, 2),
    ]

    paged, after = [], None
    while True:
        page = client.get(path, params={"limit": 5, **({"after": after} if after else {})}).json()
        paged += [one["id"] for one in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert paged == [one["id"] for one in everything]
