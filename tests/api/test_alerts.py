"""The alert rules and the Grafana dashboard name metrics and labels that /metrics really has, and pages that are there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
PANELS: list[dict[str, Any]] = json.loads((ROOT / "deploy/grafana/ratchet.json").read_text())["panels"]
QUERIES = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]
OF_PROMETHEUS = {"instance", "job", "le"}  # labels that scraping or the format adds


@pytest.fixture(scope="module")
def found(api) -> dict[str, set[str]]:
    """The labels of each sample that /metrics has, by its name."""
    with api.client() as client:
        client.get("/v1/jobs")  # so that requests are counted
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        names = {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
        for name in names:
            found.setdefault(name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # Those that have no sample before something happens: their labels stand in the code.
    found["ratchet_rings_total"] |= {"heard"}
    found["ratchet_reconciled_total"] |= {"move"}
    for memory in ("memory", "gpu_memory_used", "gpu_memory_total"):
        found[f"ratchet_worker_{memory}_bytes"] |= {"worker"}
    return found


def unknown(query: str, found: dict[str, set[str]]) -> list[str]:
    """The metrics of a query that are not there, and the labels that none of its metrics has."""
    names = set(re.findall(r"ratchet_\w+", query))
    labels = {label for part in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*=", part)}
    labels |= {label.strip() for part in re.findall(r"(?:by|without|on) \(([^)]*)\)", query) for label in part.split(",")}
    there = OF_PROMETHEUS.union(*(found.get(name, set()) for name in names))
    return sorted((names - set(found)) | (labels - there - {""}))


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_and_label_of_a_query_is_there(query, found):
    assert re.search(r"ratchet_\w+", query)
    assert unknown(query, found) == []
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)


def test_a_metric_that_is_gone_is_found(found):
    assert unknown('max(ratchet_jobz{status="queued"})', found) == ["ratchet_jobz", "status"]
    assert unknown("max by (colour) (ratchet_jobs)", found) == ["colour"]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_every_alert_has_a_section_of_the_runbook(rule):
    page, _, section = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert section == rule["alert"].lower() and rule["alert"] in headings
    assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_the_runbook_has_no_section_without_an_alert():
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]


def test_codes_and_statuses_that_alerts_name_exist():
    from service.failures import CODES
    from service.states import Status

    codes = {code for query in QUERIES for part in re.findall(r'code=~?"([^"]+)"', query) for code in part.split("|")}
    statuses = {status for query in QUERIES for status in re.findall(r'ratchet_jobs\{status="(\w+)"', query)}
    assert codes <= set(CODES) and statuses <= {status.value for status in Status}
