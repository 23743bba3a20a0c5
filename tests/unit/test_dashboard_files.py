"""The dashboard's files: served as they should be; nothing in them becomes code or markup, or comes from elsewhere."""

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.dashboard.pages import INDEX, STATIC, files
from service.settings import Settings

OURS = sorted(path for path in STATIC.rglob("*.js") if "uplot" not in path.parts)
SCRIPTS = sorted(STATIC.rglob("*.js"))
# What makes markup or code of a string, or writes a style into the page.
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|\.cssText"
CODE = r"\beval\(|new Function\(|setTimeout\(\s*[\"'`]|setInterval\(\s*[\"'`]|javascript:"
FROM_ELSEWHERE = r"https?://(?!www\.w3\.org/|127\.0\.0\.1|github\.com/leeoniya)"
PAGES = {"jobs", "aliases", "compare", "playground", "workers", "usage", "webhooks", "keys"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(Settings()))  # not started: the files need no store


class Attributes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            self.texts.append((self.tags[-1][0], data))


def test_the_page_has_no_script_no_style_and_no_handler_in_it(client: TestClient) -> None:
    page = Attributes()
    page.feed(client.get("/").text)
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    assert not any(tag in ("script", "style") for tag, _ in page.texts) and "style" not in [tag for tag, _ in page.tags]
    for tag, attributes in page.tags:
        address = attributes.get("href") or attributes.get("src")
        if tag in ("script", "link") and address is not None:
            assert client.get(f"/{address}").status_code == 200, address


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_string_becomes_markup_or_code(script: Path) -> None:
    text = script.read_text()
    assert re.search(f"{MARKUP}|{CODE}", text) is None
    assert re.search(FROM_ELSEWHERE, re.sub(r"^\s*(//|\*).*", "", text, flags=re.MULTILINE)) is None
    for name in re.findall(r"from \"(.+?)\"", text):
        assert (script.parent / name).is_file(), f"{script.name} loads {name}"


def test_the_rules_above_find_what_they_look_for() -> None:
    bad = ["x.innerHTML = y", "eval(x)", "new Function(x)", "setTimeout('x')", "https://cdn.example/x.js"]
    assert all(re.search(f"{MARKUP}|{CODE}|{FROM_ELSEWHERE}", line) for line in bad)


def test_the_key_is_put_into_a_header_and_nowhere_else() -> None:
    uses = {path.name: path.read_text().count("session.key") for path in OURS if "session.key" in path.read_text()}
    assert uses == {"api.js": 1, "app.js": 1}  # the header; whether there is one at all
    assert not any("localStorage" in path.read_text() and "key" in path.name for path in OURS)


def test_the_page_is_asked_for_again_and_its_files_are_kept(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    assert client.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    assert client.head("/").status_code == 200
    answers = [client.get(f"/dashboard/{files().edition}/{name}") for name in files().by_name.keys() - {INDEX}]
    for found in answers:
        assert "immutable" in found.headers["cache-control"] and found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-type"].partition(";")[0] in ("text/javascript", "text/css", "image/svg+xml", "text/plain")
    for answer in (page, *answers):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/v1/nothing").headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize("name", ["nothing.js", "../pages.py", "..%2fpages.py", "%2e%2e/pages.py", "uplot", INDEX])
def test_there_are_no_other_files(client: TestClient, name: str) -> None:
    assert client.get(f"/dashboard/{files().edition}/{name}").status_code == 404
    assert client.get("/dashboard/another/app.js").status_code == 404


def test_every_file_is_in_the_wheel() -> None:
    project = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["service.dashboard"]
    names = [path.relative_to(STATIC.parent).as_posix() for path in STATIC.rglob("*") if path.is_file()]
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    assert "static/uplot/LICENSE" in names


def test_every_page_and_its_shortcut_are_told() -> None:
    guide = (STATIC.parents[2] / "docs" / "dashboard.md").read_text()
    for key in re.findall(r"\n  \[\"(.+?)\", \"", (STATIC / "app.js").read_text()):
        assert f"| `{key}` |" in guide, f"docs/dashboard.md lacks the shortcut {key}"
    assert set(re.findall(r"const PAGES = \{(.+?)\}", (STATIC / "app.js").read_text())[0].split(", ")) == PAGES
