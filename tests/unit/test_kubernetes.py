"""deploy/kubernetes: valid by Kubernetes' own schemas, and consistent with each other, the settings and the routes."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.api import health
from service.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OBJECTS = [(path.name, each) for path in sorted(FOLDER.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
PODS = [(name, each["spec"]["template"]) for name, each in OBJECTS if each["kind"] in ("Deployment", "Job")]


def of(kind: str) -> list[dict[str, Any]]:
    return [each for _, each in OBJECTS if each["kind"] == kind]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_each_object_is_one_that_kubernetes_knows(version: str) -> None:
    for _, each in OBJECTS:
        kubernetes_validate.validate(each, version, strict=True)
    broken = {**of("Deployment")[0], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_what_they_name_is_there() -> None:
    there = {(each["kind"], each["metadata"]["name"]) for _, each in OBJECTS}
    labels = [pod["metadata"]["labels"] for _, pod in PODS]
    for each in [*of("Deployment"), *of("PodDisruptionBudget"), *of("Service")]:
        selector = each["spec"]["selector"].get("matchLabels", each["spec"]["selector"])
        assert sum(selector.items() <= pod.items() for pod in labels) == 1, each["metadata"]
    for _, pod in PODS:
        for container in pod["spec"]["containers"]:
            for source in container["envFrom"]:
                ((kind, ref),) = source.items()
                assert ({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], ref["name"]) in there
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                volume["name"] for volume in pod["spec"]["volumes"]
            }
        volumes = pod["spec"]["volumes"]
        assert {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in volumes
        }
        claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= there


def test_settings_and_probes_are_ours() -> None:
    containers = [container for _, pod in PODS for container in pod["spec"]["containers"]]
    given = [name for each in of("ConfigMap") for name in each["data"]]
    given += [name for each in of("Secret") for name in each["stringData"]]
    given += [variable["name"] for container in containers for variable in container.get("env", [])]
    ours = {f"RATCHET_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in given if name.startswith("RATCHET_")} <= ours and len(given) > 8
    (api,) = [pod for name, pod in PODS if name == "api.yaml"]
    probed = {api["spec"]["containers"][0][f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert probed <= {getattr(route, "path", None) for route in health.router.routes}


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[name for name, _ in PODS])
def test_each_pod_fits_the_restricted_standard(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    for container in spec["containers"]:
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert context["capabilities"] == {"drop": ["ALL"]} and container["resources"]["limits"]["memory"]
    if name.startswith(("worker", "losses")):
        assert spec["terminationGracePeriodSeconds"] > Settings().drain_grace_s
