"""The client against a server that fails on purpose."""

import io
import json
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ratchet_client import Ratchet, RatchetApiError, RatchetArchiveError, RatchetConnectionError, RatchetError, RatchetNotFound
from ratchet_client import archive as archive_module
from ratchet_client.discovery import find
from ratchet_client.events import parse

KEY = "tml-test"


@pytest.fixture
def ratchet(script: Any) -> Iterator[Ratchet]:
    with Ratchet(script.url, KEY) as ratchet:
        yield ratchet


# ---------------------------------------------------------------- trying again


def test_a_create_is_repeated_under_one_idempotency_key(script: Any, ratchet: Ratchet, pauses: list[float]) -> None:
    script.drop().refuse(503, "unavailable").refuse(429, "rate_limited").reply({"id": "job_1"}, status=201)
    assert ratchet.create_job({"kind": "rl"})["id"] == "job_1"
    assert len(set(script.sent("idempotency-key"))) == 1 and script.requests[0].headers["idempotency-key"]
    assert [json.loads(request.body) for request in script.requests] == [{"kind": "rl"}] * 4
    assert script.sent("authorization") == [f"Bearer {KEY}"] * 4
    assert len(pauses) == 3


def test_two_creates_have_two_keys_unless_the_caller_names_one(script: Any, ratchet: Ratchet) -> None:
    script.reply({})
    ratchet.create_job({})
    ratchet.create_job({})
    ratchet.create_job({}, idempotency_key="mine")
    first, second, named = script.sent("idempotency-key")
    assert first != second and named == "mine"


def test_back_off_grows_and_retry_after_is_the_least_it_waits(script: Any, ratchet: Ratchet, pauses: list[float]) -> None:
    script.refuse(503, "unavailable").refuse(503, "unavailable").refuse(503, "unavailable").refuse(429, "slow", Retry_After="7")
    script.reply({"data": []})
    ratchet.list_jobs()
    assert [0.25 <= pauses[0] <= 0.5, 0.5 <= pauses[1] <= 1, 1 <= pauses[2] <= 2] == [True] * 3
    assert 7 <= pauses[3] <= 7.5


def test_a_retry_after_beyond_patience_is_raised_at_once(script: Any, ratchet: Ratchet, pauses: list[float]) -> None:
    script.refuse(429, "quota", Retry_After="3600")
    with pytest.raises(RatchetApiError) as caught:
        ratchet.list_jobs()
    assert (caught.value.retry_after_s, pauses) == (3600.0, [])


def test_a_first_request_still_in_flight_is_waited_for(script: Any, ratchet: Ratchet, pauses: list[float]) -> None:
    script.refuse(409, "idempotency_in_flight", Retry_After="1").reply({"id": "job_1"})
    assert ratchet.create_job({})["id"] == "job_1"
    assert len(pauses) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(400, "malformed_body"), (409, "conflict"), (422, "invalid_request"), (500, "internal")]
)
def test_a_refusal_is_raised_once_with_its_problem_document(
    script: Any, ratchet: Ratchet, pauses: list[float], status: int, code: str
) -> None:
    script.refuse(status, code)
    with pytest.raises(RatchetApiError) as caught:
        ratchet.create_job({})
    assert (caught.value.status, caught.value.code, caught.value.detail) == (status, code, f"it is {code}")
    assert caught.value.errors == [{"pointer": "/a", "detail": "no"}]
    assert (len(script.requests), pauses) == (1, [])


def test_a_page_of_a_proxy_is_quoted_not_choked_on(script: Any, ratchet: Ratchet) -> None:
    script.reply(b"<html>Forbidden by the proxy</html>", status=403)
    with pytest.raises(RatchetApiError) as caught:
        ratchet.list_jobs()
    assert caught.value.code == "http_403" and "Forbidden by the proxy" in caught.value.detail


def test_something_that_is_no_ratchet_is_said_to_be_none(script: Any, ratchet: Ratchet) -> None:
    script.reply(b"<html>Welcome</html>")
    with pytest.raises(RatchetError, match="is it a Ratchet"):
        ratchet.list_jobs()


def test_it_gives_up_after_its_retries(script: Any, pauses: list[float]) -> None:
    script.drop()
    with Ratchet(script.url, KEY, max_retries=2) as ratchet, pytest.raises(RatchetConnectionError, match=script.url):
        ratchet.list_jobs()
    assert (len(script.requests), len(pauses)) == (3, 2)


def test_an_upload_is_sent_from_its_beginning_each_time(
    script: Any, ratchet: Ratchet, pauses: list[float], tmp_path: Path
) -> None:
    content = b'{"q": "1"}\n' * 100_000
    (tmp_path / "rows.jsonl").write_bytes(content)
    script.drop().reply({"id": "ds_1"}, status=201)
    assert ratchet.create_dataset(tmp_path / "rows.jsonl", "rows & more")["id"] == "ds_1"
    assert [request.body for request in script.requests] == [content, content]
    assert script.requests[1].path == "/v1/datasets?name=rows+%26+more"
    assert len(set(script.sent("idempotency-key"))) == 1


def test_rows_are_uploaded_as_json_lines_and_nan_is_refused_here(script: Any, ratchet: Ratchet) -> None:
    script.reply({"id": "ds_1"}, status=201)
    ratchet.create_dataset([{"q": "ä\n"}, {"q": 2}], "rows")
    assert script.requests[0].body == '{"q": "ä\\n"}\n{"q": 2}\n'.encode()
    with pytest.raises(ValueError):
        ratchet.create_dataset([{"q": float("nan")}], "rows")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("kind: rl\n", "application/yaml"), ('{"kind": "rl"}', "application/json"), ("{kind: rl}", "application/yaml")],
)
def test_the_text_of_a_spec_is_sent_as_it_is(script: Any, ratchet: Ratchet, text: str, kind: str) -> None:
    script.reply({"id": "job_1"})
    ratchet.create_job(text)
    assert (script.requests[0].body, script.requests[0].headers["content-type"]) == (text.encode(), kind)


def test_an_id_cannot_leave_its_place_in_the_path(script: Any, ratchet: Ratchet) -> None:
    script.reply({})
    ratchet.get_job("../keys?x=1")
    assert script.requests[0].path == "/v1/jobs/..%2Fkeys%3Fx%3D1"
    for none in ("", ".", ".."):
        with pytest.raises(RatchetError, match="is no id"):
            ratchet.cancel_job(none)
    assert len(script.requests) == 1


# ---------------------------------------------------------------- following


def event(seq: int, kind: str = "step", **data: Any) -> str:
    body = {"seq": seq, "type": kind, "data": data, "created_at": "2026-01-01T00:00:00Z"}
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


def job(status: str, last_event: int) -> dict[str, Any]:
    return {"id": "job_1", "status": status, "last_event": last_event}


def test_a_broken_stream_is_taken_up_behind_the_last_event(script: Any, ratchet: Ratchet, pauses: list[float]) -> None:
    script.stream(event(1) + ": keep-alive\n\n" + event(2), torn=True)
    script.drop().refuse(503, "unavailable")
    script.stream(event(3)).reply(job("running", 3))
    script.stream(event(4, "status_changed", to="succeeded")).reply(job("succeeded", 4))
    assert [one["seq"] for one in ratchet.follow("job_1")] == [1, 2, 3, 4]
    streams = [request.headers["last-event-id"] for request in script.requests if request.path.endswith("/events")]
    assert streams == ["0", "2", "2", "2", "3"]


def test_a_stream_ends_with_an_unknown_job_not_with_retries(script: Any, ratchet: Ratchet) -> None:
    script.refuse(404, "not_found")
    with pytest.raises(RatchetApiError, match="not_found"):
        list(ratchet.follow("job_1"))
    assert len(script.requests) == 1


def test_a_service_that_stays_away_ends_the_stream(script: Any, pauses: list[float]) -> None:
    script.drop()
    with Ratchet(script.url, KEY, max_retries=0) as ratchet, pytest.raises(RatchetConnectionError, match="job_1"):
        list(ratchet.follow("job_1", reconnect_for_s=0))


def test_event_stream_lines_end_at_line_feeds_only() -> None:
    text = 'id: 7\r\nevent: step\r\ndata: {"a": "x\u2028y\x85z"}\r\n\r\ndata: torn'
    stream = text.encode()
    chunks = [stream[i : i + 3] for i in range(0, len(stream), 3)]  # cuts through characters, too
    (found,) = parse(chunks)
    assert (found.id, found.type, json.loads(found.data)) == ("7", "step", {"a": "x\u2028y\x85z"})


# ---------------------------------------------------------------- archives


def archive(*members: tuple[str, bytes], manifest: bool = True, kind: bytes = tarfile.REGTYPE) -> bytes:
    files = {name: {"sha256": sha256(content).hexdigest(), "size_bytes": len(content)} for name, content in members}
    if manifest:
        members = (*members, ("manifest.json", json.dumps({"files": files}).encode()))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name if name.startswith(("/", "..")) else f"ckpt_1/{name}")
            info.size, info.linkname = len(content), "/etc/passwd"
            info.type = tarfile.REGTYPE if name == "manifest.json" else kind
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_checkpoint_is_unpacked_into_a_new_folder(script: Any, ratchet: Ratchet, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 5000
    script.reply(archive(("model/model.safetensors", weights), ("trainer.json", b"{}")))
    folder = ratchet.download_checkpoint("ckpt_1", tmp_path / "a" / "b")
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "manifest.json",
        "model.safetensors",
        "trainer.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


BAD_ARCHIVES = {
    "parent": archive(("../evil", b"x")),
    "only-dots": archive(("..", b"x")),
    "absolute": archive(("/tmp/evil", b"x")),
    "inner-parent": archive(("model/../../evil", b"x")),
    "itself": archive(("", b"x")),
    "backslashes": archive(("a\\..\\evil", b"x")),
    "drive": archive(("C:\\evil", b"x")),
    "long": archive(("n" * 300, b"x")),
    "deep": archive(("d/" * 3000 + "f", b"x")),
    "nul": archive(("a\0/../../evil", b"x")),
    "twice": archive(("a", b"x"), ("a", b"y")),
    "file-and-folder": archive(("a", b"x"), ("a/b", b"y")),
    "symlink": archive(("link", b""), kind=tarfile.SYMTYPE),
    "hard-link": archive(("link", b""), kind=tarfile.LNKTYPE),
    "pipe": archive(("pipe", b""), kind=tarfile.FIFOTYPE),
    "device": archive(("tty", b""), kind=tarfile.CHRTYPE),
    "no-manifest": archive(("a", b"x"), manifest=False),
    "cut": archive(("a", b"x" * 5000))[:2000],
    "no-tar": b"no tar at all" * 100,
}


@pytest.mark.parametrize("content", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES.keys())
def test_a_bad_archive_leaves_nothing_behind(script: Any, ratchet: Ratchet, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "here").mkdir()
    script.reply(content)
    with pytest.raises(RatchetArchiveError):
        ratchet.download_checkpoint("ckpt_1", tmp_path / "here" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_checkpoint_is_unpacked_into_the_empty_folder_where_one_is(
    script: Any, ratchet: Ratchet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    script.reply(archive(("a", b"right")))
    script.reply(b"# the card", Content_Type="text/markdown")
    ratchet.download_checkpoint("ckpt_1", ".")
    assert sorted(path.name for path in here.iterdir()) == ["README.md", "a", "manifest.json"]
    assert list(tmp_path.iterdir()) == [here]


@pytest.mark.parametrize("fails", ["_extract", "write_text"])  # in a file of the checkpoint; in its README.md
def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(
    script: Any, ratchet: Ratchet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path if fails == "write_text" else archive_module, fails, full)
    script.reply(archive(("a", b"right")))
    script.reply(b"# the card", Content_Type="text/markdown")
    with pytest.raises(OSError, match="No space left on device") as told:
        ratchet.download_checkpoint("ckpt_1", tmp_path / "out")
    assert told.value.filename == str(tmp_path / "out") and list(tmp_path.iterdir()) == []


def test_names_that_only_look_like_dots_stay_inside(script: Any, ratchet: Ratchet, tmp_path: Path) -> None:
    names = ["\uff0e\uff0e/evil", "\u2025/evil", "%2e%2e/evil", "a\u2215..\u2215evil"]
    script.reply(archive(*((name, b"x") for name in names)))
    folder = ratchet.download_checkpoint("ckpt_1", tmp_path / "out")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*names, "manifest.json"}
    assert list(tmp_path.iterdir()) == [folder]


def test_an_altered_file_is_found_out_by_the_manifest(script: Any, ratchet: Ratchet, tmp_path: Path) -> None:
    script.reply(archive(("a", b"right")).replace(b"right", b"wrong"))
    with pytest.raises(RatchetArchiveError, match="sha256"):
        ratchet.download_checkpoint("ckpt_1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(script: Any, ratchet: Ratchet, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    script.reply(archive(("mine", b"x")))
    with pytest.raises(RatchetArchiveError, match="not empty"):
        ratchet.download_checkpoint("ckpt_1", tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


# ---------------------------------------------------------------- finding the service


def local_stack(folder: Path, url: str = "http://127.0.0.1:4321", key: str = "tml-local") -> Path:
    folder.mkdir(parents=True)
    (folder / "url").write_text(url + "\n")
    (folder / "key").write_text(key + "\n")
    return folder


def test_the_environment_comes_before_a_local_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local_stack(tmp_path / ".ratchet")
    assert find() == ("http://127.0.0.1:4321", "tml-local")
    monkeypatch.setenv("RATCHET_URL", "https://ratchet.example")
    monkeypatch.setenv("RATCHET_API_KEY", "tml-env")
    assert find() == ("https://ratchet.example", "tml-env")
    assert find(data_dir=tmp_path / ".ratchet") == ("http://127.0.0.1:4321", "tml-local")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("RATCHET_URLL", "RATCHET_URL"), ("RATCHET_API_KEYS", "RATCHET_API_KEY"), ("RATCHET_KEY", "RATCHET_API_KEY")],
)
def test_a_misspelt_variable_is_named_before_a_local_stack_is_asked_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    local_stack(tmp_path / ".ratchet")
    monkeypatch.setenv("RATCHET_BLOB_URL", "s3://bucket")  # a setting of the service
    assert find() == ("http://127.0.0.1:4321", "tml-local")
    monkeypatch.setenv(wrong, "https://ratchet.example")
    with pytest.raises(RatchetNotFound, match=f"{wrong} sets nothing; did you mean {meant}?"):
        find()
    for variable in ("RATCHET_URL", "RATCHET_API_KEY"):
        monkeypatch.setenv(variable, f"https://ratchet.example/{variable}")
    assert find()[0] == "https://ratchet.example/RATCHET_URL", "both are there: nothing is missed"


def test_the_data_dir_is_named_or_here_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local_stack(tmp_path / "home" / ".ratchet", key="tml-home")
    assert find()[1] == "tml-home"
    local_stack(tmp_path / ".ratchet", key="tml-here")
    assert find()[1] == "tml-here"
    local_stack(tmp_path / "other", key="tml-named")
    monkeypatch.setenv("RATCHET_DATA_DIR", str(tmp_path / "other"))
    assert find()[1] == "tml-named"


def test_a_local_key_is_never_sent_to_another_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    local_stack(tmp_path / ".ratchet")
    assert find("http://127.0.0.1:4321/") == ("http://127.0.0.1:4321/", "tml-local")
    with pytest.raises(RatchetNotFound, match="RATCHET_API_KEY"):
        find("https://elsewhere.example")


def test_nothing_found_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(RatchetNotFound, match="ratchet up") as caught:
        Ratchet()
    assert str(tmp_path / ".ratchet") in str(caught.value) and str(tmp_path / "home" / ".ratchet") in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://example.org", "127.0.0.1:8000", "http://", "http://host:port"])
def test_an_address_that_is_none_is_said_to_be(url: str) -> None:
    with pytest.raises(RatchetError, match=r"http://|not a URL"):
        Ratchet(url, KEY)


def test_the_example_in_the_readme_runs_as_printed(api: str, hand: Any, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "create_job" in block]

    def work() -> None:
        held = hand.take(within_s=20)
        for step in (1, 2):
            hand.step(held, step, {"reward/mean": step / 4})
        hand.save(held, 2, weights=b"w")
        hand.succeed(held)

    worker = threading.Thread(target=work)
    worker.start()
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    worker.join()
    assert (done.stdout, done.stderr) == ("1 0.25\n2 0.5\n", "")
    assert (tmp_path / "additions" / "weights").read_bytes() == b"w" and (tmp_path / "additions" / "README.md").is_file()
