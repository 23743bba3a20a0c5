"""What no sound run measures is told once, with what probably lies behind it."""

from service.cli.headline import Headline
from service.metric_names import is_live
from workers.loops.implausible import BOUNDS, implausible
from workers.loops.progress import Progress


def test_what_is_beyond_belief_is_told_when_it_begins_with_what_stands_beside_it() -> None:
    progress = Progress(step=7)
    metrics = {"policy/approx_kl_k3": 6000.0, "policy/ratio_max": 5.2e4, "policy/loss": -38.0, "optimizer/grad_norm": 2.0}
    (kl, loss) = [data for _, data in implausible(progress, metrics)]
    assert kl["detail"].startswith("policy/approx_kl_k3 is 6e+03 at step 7: within one step the policy moved far")
    assert "(policy/ratio_max 5.2e+04, optimizer/grad_norm 2)" in kl["detail"]
    assert (loss["metric"], loss["step"]) == ("policy/loss", 7)
    assert (
        implausible(progress, metrics) == implausible(progress, {"eval/loss": 1.0}) == implausible(progress, metrics) == []
    ), "once"
    assert implausible(progress, {"policy/loss": 0.1, "policy/approx_kl_k3": 0.1}) == [] and progress.implausible == []
    assert len(implausible(progress, metrics)) == 2, "it began again"


def test_an_evaluations_loss_is_told_once_though_few_steps_measure_it() -> None:
    progress = Progress(step=4)
    [(_, told)] = implausible(progress, {"loss": 8.0, "eval/loss": 22.5})
    assert told["detail"].startswith("eval/loss is 22.5 at step 4: worse than a uniform guess") and "(loss 8)" in told["detail"]
    for metrics in ({"loss": 8.0}, {"loss": 8.0, "eval/loss": 24.0}, {"eval/loss": 12.0}):
        assert implausible(progress, metrics) == []
    assert progress.implausible == [] and len(implausible(progress, {"eval/loss": 21.0})) == 1


def test_a_sampler_that_leaves_tokens_out_is_named_as_a_cause() -> None:
    [(_, told)] = implausible(Progress(step=1), {"rollout/approx_kl_k3": 2.8})
    assert "rollout.top_p and top_k do that" in told["detail"]


def test_what_sound_runs_measure_is_not() -> None:
    sound = {"policy/approx_kl_k3": 0.3, "kl/ref_k3": 4.0, "policy/loss": 0.8, "loss": 11.9, "rollout/approx_kl_k3": 0.01}
    sound["eval/loss"] = 11.9
    assert implausible(Progress(), sound) == []
    assert sound.keys() == BOUNDS.keys() and all(is_live(name) for name in BOUNDS)


def test_the_kl_that_people_follow_is_the_one_that_is_penalised() -> None:
    plain, penalised = Headline(), Headline()
    plain.update({"policy/approx_kl_k3": 0.1})
    assert (plain.kl_of, plain.kl) == ("KL", 0.1)
    penalised.update({"policy/approx_kl_k3": 0.1, "kl/ref_k3": 2.0})
    penalised.update({"policy/approx_kl_k3": 0.2})
    assert (penalised.kl_of, penalised.kl) == ("KL to reference", 2.0)
