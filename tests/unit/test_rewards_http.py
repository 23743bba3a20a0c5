"""The http grader against a real server on a real socket, with the failures that real services have."""

import hashlib
import hmac
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from service.errors import JobFailed
from service.rewards import http
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, GraderContext, Sample
from service.spec.addresses import Networks
from service.spec.reward import HttpGrader, RewardSpec

HERE = (ip_network("127.0.0.0/8"),)  # the operator allows this machine
Answer = tuple[int, dict[str, str], bytes]
DOCS = Path(__file__).parents[2] / "docs" / "graders.md"


class Service:
    """A reward service that answers what a test tells it to, and keeps what it got."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[int, dict[str, Any]], Answer] = self.lengths
        self.trickle_s = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @staticmethod
    def lengths(number: int, body: dict[str, Any]) -> Answer:
        return rewards([len(sample["completion"]) for sample in body["samples"]])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append(({key.lower(): value for key, value in self.headers.items()}, body))
                status, headers, content = service.answer(len(service.requests), json.loads(body))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    for i in range(len(content)) if service.trickle_s else ():
                        self.wfile.write(content[i : i + 1])
                        time.sleep(service.trickle_s)
                    if not service.trickle_s:
                        self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            def log_request(self, code: Any = "-", size: Any = "-") -> None:
                pass

        return Handler


def rewards(values: list[Any]) -> Answer:
    return 200, {}, json.dumps({"rewards": values}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)


def sample(completion: str, **row: Any) -> Sample:
    return Sample("2+2=", completion, len(completion), False, row)


def grade(
    url: str, of: list[Sample], secrets: dict[str, SecretStr] | None = None, networks: Networks = HERE, **options: Any
) -> list[Graded]:
    spec = RewardSpec.model_validate({"graders": [{"kind": "http", "url": url, **options}]})
    with Rewards(spec, job_id="job_test", secrets=secrets or {}, networks=networks) as graders:
        return graders.grade(of)


def failure(url: str, **options: Any) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        grade(url, [sample("a")], **options)
    assert caught.value.code == "grader_unhealthy"
    assert (caught.value.failure.category, caught.value.failure.pointer) == ("user", "/reward/graders/0")
    assert caught.value.hint
    return caught.value


# ---------------------------------------------------------------- what is sent


def test_batches_carry_everything_and_rewards_come_back_in_order(service: Service) -> None:
    of = [sample("x" * n, answer=n) for n in range(1, 8)]
    assert [graded.total for graded in grade(service.url, of, batch_size=3)] == [1, 2, 3, 4, 5, 6, 7]
    bodies = sorted((json.loads(body) for _, body in service.requests), key=lambda body: body["samples"][0]["tokens"])
    assert [len(body["samples"]) for body in bodies] == [3, 3, 1]
    assert {body["job_id"] for body in bodies} == {"job_test"} and {body["grader"] for body in bodies} == {"http"}
    assert bodies[2]["samples"] == [
        {"index": 0, "prompt": "2+2=", "completion": "xxxxxxx", "tokens": 7, "truncated": False, "row": {"answer": 7}}
    ]


def test_the_same_batch_has_the_same_id_and_another_batch_another(service: Service) -> None:
    for completion in ("a", "a", "b"):
        grade(service.url, [sample(completion)])
    ids = [headers["idempotency-key"] for headers, _ in service.requests]
    assert ids[0] == ids[1] != ids[2]
    assert ids == [json.loads(body)["batch_id"] for _, body in service.requests]


def test_requests_are_signed_over_time_and_body(service: Service) -> None:
    grade(service.url, [sample("a")], {"judge": SecretStr("s3cret")}, secret="judge")
    [(headers, body)] = service.requests
    match = re.fullmatch(r"t=(\d+),v1=([0-9a-f]{64})", headers["ratchet-signature"])
    assert match is not None and abs(time.time() - int(match[1])) < 60
    assert match[2] == hmac.new(b"s3cret", match[1].encode() + b"." + body, hashlib.sha256).hexdigest()


def test_without_a_secret_nothing_is_signed(service: Service) -> None:
    grade(service.url, [sample("a")], {"judge": SecretStr("s3cret")})
    assert "ratchet-signature" not in service.requests[0][0]


def test_a_secret_that_the_operator_has_not_set_is_named(service: Service) -> None:
    assert "no secret 'judge'" in failure(service.url, secret="judge").detail
    assert service.requests == []


def test_connections_are_kept_from_batch_to_batch(service: Service) -> None:
    spec = RewardSpec.model_validate({"graders": [{"kind": "http", "url": service.url}]})
    with Rewards(spec, job_id="j", secrets={}, networks=HERE) as graders:
        graders.grade([sample("a")])
        grader: Any = graders._graders["http"]
        first = grader._client
        graders.grade([sample("b")])
        assert grader._client is first
    assert len(service.requests) == 2


def test_batches_are_posted_side_by_side(service: Service) -> None:
    meeting = threading.Barrier(4, timeout=10)  # breaks unless four requests are in flight at once

    def answer(number: int, body: dict[str, Any]) -> Answer:
        meeting.wait()
        return rewards([1])

    service.answer = answer
    assert [graded.total for graded in grade(service.url, [sample(str(n)) for n in range(4)], batch_size=1)] == [1] * 4


def test_extract_narrows_what_the_service_sees(service: Service) -> None:
    graded = grade(service.url, [sample("so: 42"), sample("none")], extract=r"\d+")
    assert [one.total for one in graded] == [2, 0]
    assert [one["completion"] for one in json.loads(service.requests[0][1])["samples"]] == ["42"]


def test_rows_with_dates_are_sent_as_text(service: Service) -> None:
    from datetime import date

    assert grade(service.url, [sample("a", on=date(2026, 1, 2))])[0].total == 1
    assert json.loads(service.requests[0][1])["samples"][0]["row"] == {"on": "2026-01-02"}


# ---------------------------------------------------------------- what comes back


def test_rewards_may_be_numbers_objects_or_errors(service: Service) -> None:
    service.answer = lambda number, body: rewards(
        [1, {"reward": 0.5}, {"error": "no judge was free"}, {"reward": 2, "note": "x"}]
    )
    graded = grade(service.url, [sample(name) for name in "abcd"])
    assert [one.total for one in graded] == [1, 0.5, None, 2]
    assert graded[2].errors == {"http": "the reward service says: no judge was free"}


@pytest.mark.parametrize(
    "value", ["null", '"1"', "true", "[1]", "{}", '{"reward": null}', "NaN", "Infinity", "1e999", "1" * 400]
)
def test_what_is_no_finite_number_is_an_error_of_its_sample(value: str, service: Service) -> None:
    service.answer = lambda number, body: (200, {}, f'{{"rewards": [1, {value}]}}'.encode())
    first, second = grade(service.url, [sample("a"), sample("b")])
    assert first.total == 1
    assert second.total is None
    assert re.search("must be a number|not a finite number|too large", second.errors["http"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"rewards": [1]}', "answered 1 reward to 2 samples"),
        (b'{"rewards": [1, 2, 3]}', "answered 3 rewards to 2 samples"),
        (b'{"reward": [1, 2]}', 'must answer {"rewards": [...]}'),
        (b"[1, 2]", 'must answer {"rewards": [...]}'),
        (b"<html>welcome</html>", "did not answer JSON: '<html>welcome</html>'"),
        (b"", "with an empty body"),
        (b"\xff\xfe", "did not answer JSON"),
        (b"[" * 100_000, "did not answer JSON"),
    ],
)
def test_an_answer_that_is_wrong_as_a_whole_is_an_error_of_each_sample(content: bytes, says: str, service: Service) -> None:
    service.answer = lambda number, body: (200, {}, content)
    graded = grade(service.url, [sample("a"), sample("b")])
    assert all(one.total is None and says in one.errors["http"] for one in graded)
    assert all(len(one.errors["http"]) < 400 for one in graded)
    assert len(service.requests) == 1  # the service works; asking again brings the same


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(status: int, service: Service) -> None:
    service.answer = lambda number, body: (status, {}, b"busy") if number < 3 else rewards([1])
    assert grade(service.url, [sample("a")])[0].total == 1
    assert len({headers["idempotency-key"] for headers, _ in service.requests}) == 1


def test_retry_after_is_honoured(service: Service) -> None:
    service.answer = lambda number, body: (429, {"Retry-After": "1"}, b"") if number == 1 else rewards([1])
    began = time.monotonic()
    assert grade(service.url, [sample("a")])[0].total == 1
    assert time.monotonic() - began >= 1


def test_pauses_double_with_jitter_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.5)
    for attempt, longest in enumerate([0.5, 1, 2, 4, 8, 16, 30, 30]):
        pauses = {http._pause_s(attempt, None) for _ in range(50)}
        assert len(pauses) > 10 and longest / 2 <= min(pauses) and max(pauses) <= longest
    assert http._pause_s(0, 7.0) == 7.0
    assert http._pause_s(0, 86_400.0) == http.LONGEST_RETRY_AFTER_S


def test_a_service_that_stays_down_fails_the_job(service: Service) -> None:
    service.answer = lambda number, body: (503, {}, b"maintenance until noon")
    error = failure(service.url, max_retries=2)
    assert "status 503: 'maintenance until noon' (after 3 attempts)" in error.detail
    assert len(service.requests) == 3


def test_a_refusal_fails_the_job_at_once(service: Service) -> None:
    service.answer = lambda number, body: (401, {}, b"bad signature")
    assert "status 401: 'bad signature'" in failure(service.url).detail
    assert len(service.requests) == 1


def test_redirects_are_not_followed(service: Service) -> None:
    service.answer = lambda number, body: (307, {"Location": service.url}, b"")
    assert "status 307" in failure(service.url).detail
    assert len(service.requests) == 1


def test_nobody_listening_fails_the_job(service: Service) -> None:
    service.close()
    assert "ConnectError" in failure(service.url, max_retries=1).detail


def test_a_slow_answer_is_late(service: Service) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(1.0 if number == 1 else 0)
        return rewards([1])

    service.answer = answer
    assert grade(service.url, [sample("a")], timeout_s=0.3)[0].total == 1
    assert len(service.requests) == 2


def test_an_answer_that_trickles_in_is_late_as_a_whole(service: Service) -> None:
    service.trickle_s = 0.1
    began = time.monotonic()
    assert "no answer within 0.4 s" in failure(service.url, timeout_s=0.4, max_retries=0).detail
    assert time.monotonic() - began < 5


def test_an_endless_answer_is_not_read_to_its_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1000)
    service.answer = lambda number, body: (200, {}, b" " * 100_000)
    assert "longer than 1000 bytes" in failure(service.url, max_retries=0).detail


def test_secrets_and_query_strings_stay_out_of_errors(service: Service) -> None:
    service.answer = lambda number, body: (500, {}, b"oh no")
    with pytest.raises(JobFailed) as caught:
        grade(f"{service.url}?token=hunter2", [sample("a")], {"judge": SecretStr("s3cret")}, secret="judge", max_retries=0)
    shown = json.dumps(caught.value.failure.as_dict()) + repr(caught.value)
    assert service.url in shown and "hunter2" not in shown and "s3cret" not in shown


# ---------------------------------------------------------------- where it may lead


def refused(url: str, **options: Any) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        grade(url, [sample("a")], **options)
    assert caught.value.code == "grader_address_refused"
    assert caught.value.failure.category == "user" and "RATCHET_GRADER_NETWORKS" in caught.value.detail
    return caught.value


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Names of the tests' own. Each look-up takes the next answer; the last one is repeated."""
    names: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in names:
            return real(host, port, *args, **kwargs)
        answers = names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


FORMS = ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "localhost", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]


@pytest.mark.parametrize("host", FORMS)
def test_this_machine_is_not_reached_in_any_form_of_its_address(service: Service, host: str) -> None:
    url = service.url.replace("127.0.0.1", host)
    refused(url, networks=())
    assert service.requests == []
    assert grade(url, [sample("ab")])[0].total == 2  # the negative control: allowed, each of them leads there


def test_a_name_is_refused_for_any_of_its_addresses(service: Service, resolver: dict[str, list[list[str]]]) -> None:
    for found in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["fe80::1"], ["169.254.169.254"], ["::ffff:10.0.0.1"]):
        resolver["rewards.example.org"] = [found]
        error = refused(service.url.replace("127.0.0.1", "rewards.example.org"), networks=(), max_retries=0)
        assert not any(address in str(vars(error.failure)) for address in found)  # nor is told what stands in an inner DNS
    assert service.requests == []


def test_the_address_that_was_checked_is_reached(service: Service, resolver: dict[str, list[list[str]]]) -> None:
    """Rebinding: a second look-up would bring this machine, which is forbidden; there must be none."""
    public = "127.0.0.2"  # stands for a public address: the server listens there, too
    second = ThreadingHTTPServer((public, int(service.url.split(":")[2].split("/")[0])), service._handler())
    threading.Thread(target=second.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    resolver["rebinds.example.org"] = [[public], ["127.0.0.1"]]
    url = service.url.replace("127.0.0.1", "rebinds.example.org")
    try:
        assert grade(url, [sample("ab")], networks=(ip_network(f"{public}/32"),))[0].total == 2
        assert service.requests[0][0]["host"] == url.split("/")[2]
        refused(url, networks=(ip_network(f"{public}/32"),))  # the second look-up, of the next batch, is refused as a whole
    finally:
        second.shutdown()
        second.server_close()


def test_further_attempts_take_the_next_address(service: Service, resolver: dict[str, list[list[str]]]) -> None:
    resolver["two.example.org"] = [["127.0.0.9", "127.0.0.1"]]  # nobody listens at the first
    assert grade(service.url.replace("127.0.0.1", "two.example.org"), [sample("ab")], max_retries=1)[0].total == 2


def test_nobody_learns_which_names_an_inner_dns_knows(resolver: dict[str, list[list[str]]]) -> None:
    """A name that is not found and one that leads inside are tried as often, and end in the same words."""
    looked_up: list[str] = []
    real = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda host, *args, **more: looked_up.append(host) or real(host, *args, **more))
        resolver["inside.invalid"] = [["10.0.0.7"]]
        said = [refused(f"http://{name}.invalid/score", networks=(), max_retries=2) for name in ("inside", "absent")]
    assert looked_up == ["inside.invalid"] * 3 + ["absent.invalid"] * 3
    inside, absent = (str(one.failure.as_dict()) for one in said)
    assert inside.replace("inside.", "absent.") == absent and "not found, or has an address" in absent


@pytest.mark.parametrize("host", ["127。0。0。1", "１２７．１", "[::1", "a..b", "%31%32%37.0.0.1"])
def test_a_stored_host_that_is_none_is_never_looked_up(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Specs of a version that took it."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: pytest.fail("it was looked up"))
    spec = HttpGrader.model_construct(kind="http", url=f"http://{host}/", max_retries=0, timeout_s=1, batch_size=1, secret=None)
    with pytest.raises(JobFailed) as caught:
        http.HttpRewards(spec, GraderContext("job_test", "http", "/reward/graders/0", {})).grade([sample("a")])
    expected = "grader_address_refused" if "。" in host else "grader_unhealthy"
    assert caught.value.code == expected


def test_a_proxy_of_the_environment_is_not_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look the name up itself, and reach what is forbidden."""
    other = Service()
    try:
        monkeypatch.setenv("HTTP_PROXY", other.url.rsplit("/", 1)[0])
        monkeypatch.setenv("ALL_PROXY", other.url.rsplit("/", 1)[0])
        assert grade(service.url, [sample("ab")])[0].total == 2
        assert other.requests == []
    finally:
        other.close()


def test_a_redirect_to_a_forbidden_address_leads_nowhere(service: Service) -> None:
    inner = Service()
    try:
        for status in (301, 302, 303, 307, 308):
            service.answer = lambda number, body, status=status: (status, {"Location": inner.url}, b"")
            assert f"status {status}" in failure(service.url, max_retries=0).detail
        assert inner.requests == []
    finally:
        inner.close()


# ---------------------------------------------------------------- the example of the docs


def test_the_example_service_of_the_docs_works_and_verifies_signatures(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "reward_service.py").write_text(example)
    argv = [sys.executable, "-m", "uvicorn", "reward_service:app", "--port", "0", "--app-dir", str(tmp_path)]
    with subprocess.Popen(argv, env={"JUDGE_SECRET": "s3cret"}, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(match[1] for line in server.stderr if (match := re.search(r"running on (http://\S+)", line))) + "/score"
            of = [sample("4", answer="4"), sample("5", answer="4")]
            graded = grade(url, of, {"judge": SecretStr("s3cret")}, secret="judge")
            assert [one.total for one in graded] == [1, 0]
            wrongs: tuple[dict[str, Any], ...] = ({"secret": "judge"}, {})
            for wrong in wrongs:
                with pytest.raises(JobFailed, match="status 401"):
                    grade(url, of, {"judge": SecretStr("guessed")}, **wrong)
        finally:
            server.terminate()
