"""Signing in by a reverse proxy's header: believed from the proxy alone, and all else is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from service.settings import Settings
from service.store import keys

PROXY, ELSEWHERE = "127.0.0.2", "127.0.0.1"
SSO = {"sso_header": "X-Forwarded-User", "sso_proxies": "127.0.0.2/32, ::1/128", "sso_project": "team", "sso_scope": "write"}
ALICE = {"X-Forwarded-User": "alice@example.com"}


@pytest.fixture(scope="module")
def served(
    sqlite_template: Path, _redis_database: str, tmp_path_factory: pytest.TempPathFactory, new_api: Any
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("sso")
    (folder / "ratchet.db").write_bytes(sqlite_template.read_bytes())
    options: Any = {"environment": "development", "data_dir": folder, "redis_url": SecretStr(_redis_database), **SSO}
    with new_api(Settings(**options)) as served:
        yield served


@contextmanager
def client(served: Any, address: str = PROXY, **headers: str) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=served.url, transport=transport, headers=headers) as made:
        yield made


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_who_the_proxy_names_works_in_the_project_and_the_audit_log_names_them(served: Any, spec: Any) -> None:
    with client(served, **ALICE) as alice, served.client(project="team") as admin:
        myself = alice.get("/v1/keys/self").json()
        assert (myself["name"], myself["project"], myself["scopes"]) == ("sso:alice@example.com", "team", ["read", "write"])
        job = alice.post("/v1/jobs", json=spec()).json()
        told = admin.get("/v1/audit", params={"object_id": job["id"]}).json()["data"]
        assert [(one["key_name"], one["action"]) for one in told] == [("sso:alice@example.com", "POST /v1/jobs")]
        assert refusal(alice.get("/v1/keys")) == (403, "scope_missing")
        with client(served, **{"X-Forwarded-User": "bob"}) as bob:
            assert bob.get("/v1/keys/self").json()["id"] != myself["id"]
            assert bob.get(f"/v1/jobs/{job['id']}").status_code == 200
        assert b'data-sso="on"' in alice.get("/").content
        assert admin.post("/v1/keys", json={"name": "sso:alice@example.com"}).status_code == 422


@pytest.mark.parametrize("more", [{}, {"X-Forwarded-For": PROXY}, {"Forwarded": f"for={PROXY}"}])
def test_the_header_is_refused_from_elsewhere_whatever_else_is_claimed(served: Any, more: dict[str, str]) -> None:
    with client(served, ELSEWHERE, **ALICE, **more) as spoofer:
        assert refusal(spoofer.get("/v1/jobs")) == (401, "sso_not_trusted")


def test_without_the_header_a_key_is_needed_and_a_key_counts_before_it(served: Any) -> None:
    with client(served) as nobody, client(served, **ALICE, Authorization="Bearer tml-wrong") as wrong:
        assert refusal(nobody.get("/v1/jobs")) == (401, "missing_api_key")
        assert refusal(wrong.get("/v1/jobs")) == (401, "invalid_api_key")
    text = "sso:team:alice@example.com"  # what stands for the text of her key is no key
    with client(served, Authorization=f"Bearer {text}") as guesser:
        assert refusal(guesser.get("/v1/jobs")) == (401, "invalid_api_key")


@pytest.mark.parametrize("names", [["alice", "root"], [""], ["a b"], ["x" * 121], ["alice,root"]])
def test_a_name_that_is_not_clear_is_refused(served: Any, names: list[str]) -> None:
    with client(served) as unclear:
        answer = unclear.get("/v1/jobs", headers=[("X-Forwarded-User", name) for name in names])
        assert refusal(answer) == (401, "sso_bad_user")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({}, 201),
    ],
)
def test_pages_of_other_sites_change_nothing(served: Any, spec: Any, more: dict[str, str], status: int) -> None:
    with client(served, **ALICE, **more) as alice:
        assert alice.post("/v1/jobs", json=spec()).status_code == status


def test_a_user_whose_key_was_revoked_is_shut_out(served: Any) -> None:
    with client(served, **{"X-Forwarded-User": "mallory"}) as mallory, served.client(project="team") as admin:
        admin.delete(f"/v1/keys/{mallory.get('/v1/keys/self').json()['id']}")
        assert refusal(mallory.get("/v1/jobs")) == (401, "invalid_api_key")


def test_a_key_of_the_proxys_is_rotated_by_nobody_and_signs_no_url(served: Any) -> None:
    """Its text can be computed from the user's name, so nothing may hang on its hash."""
    with client(served, **{"X-Forwarded-User": "carl"}) as carl, served.client(project="team") as admin:
        key_id = carl.get("/v1/keys/self").json()["id"]
        assert refusal(admin.post(f"/v1/keys/{key_id}/rotate")) == (409, "sso_key")
        with served.app.state.context.store.begin() as session:
            assert keys.sha256_of(session, key_id) is None
            keys.change_scopes(session, key_id, ["read"])
        served.app.state.context.keyring.forget("sso:team:carl")
        assert carl.get("/v1/keys/self").json()["scopes"] == ["read", "write"]


def test_the_mode_is_off_by_default(api: Any) -> None:
    with client(api, PROXY, **ALICE) as alice:
        assert refusal(alice.get("/v1/jobs")) == (401, "missing_api_key")
        assert b"data-sso" not in alice.get("/").content


@pytest.mark.parametrize(
    "wrong",
    [
        {"sso_proxies": ""},
        {"sso_project": None},
        {"sso_header": None},
        {"sso_header": "Authorization"},
        {"sso_header": "X Forwarded"},
        {"sso_proxies": "10.0.0.0/8, 0.0.0.0/0"},
        {"sso_proxies": "::/0"},
        {"sso_scope": "root"},
    ],
)
def test_settings_that_would_let_in_too_many_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**{**SSO, **wrong})
