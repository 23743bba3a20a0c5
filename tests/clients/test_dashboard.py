"""The dashboard in a real Chromium, over the whole service with a worker that trains."""

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect, sync_playwright

from job_specs import reversing, rl_spec, supervised_spec
from ratchet_client import Ratchet, RatchetOperationError
from webhook_receiver import Receiver, receiving

CHROMIUM = shutil.which("chromium")
HOSTILE = "<img src=x onerror=alert(1)>"
LONG = "a-name-without-any-space-" * 7
PHONE = {"width": 390, "height": 844}


class Line:
    """A TCP connection to the API that can be cut."""

    def __init__(self, port: int) -> None:
        self._target, self._open = port, list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture(scope="module")
def stack(whole: Any) -> Iterator[Any]:
    here = {"webhook_networks": (ip_network("127.0.0.0/8"),)}
    with whole(here, RATCHET_SERVES="training", RATCHET_WEBHOOK_NETWORKS="127.0.0.0/8") as running:
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium: apt-get install chromium")
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(15_000)
        expect.set_options(timeout=15_000)
        yield page
        browser.close()


def wrongs_of(page: Page) -> list[str]:
    """What the browser complains about from now on: scripts, the policy, the console. A connection that is cut is no wrong."""
    wrongs: list[str] = []
    page.add_init_script("addEventListener('securitypolicyviolation', (e) => console.error('POLICY', e.violatedDirective))")
    page.on("pageerror", lambda error: wrongs.append(str(error)))
    page.on("dialog", lambda dialog: wrongs.append(f"a script asked {dialog.message}"))
    page.on("console", lambda said: wrongs.append(said.text) if said.type == "error" and "net::ERR" not in said.text else None)
    return wrongs


def badge(page: Page) -> Any:
    return page.locator(".head .badge")


def step(page: Page) -> int:
    found = re.search(r"step ([\d,]+) of", page.locator(".facts").inner_text())
    return int(found[1].replace(",", "")) if found else -1


def until(holds: Any, within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(240)
def test_a_job_is_watched_and_steered_in_a_browser(stack: Any, page: Page) -> None:
    url, key = stack.url, stack.key
    line, wrongs, asked = Line(int(url.rsplit(":", 1)[1])), wrongs_of(page), list[Request]()
    page.on("request", lambda request: asked.append(request))
    with Ratchet(url, key) as ratchet:
        try:
            sign_in(page, line.url, key)
            assert [wrong for wrong in wrongs if "401" not in wrong] == []
            wrongs.clear()
            train = {**reversing(eval_rows=0)["train"], "rows": [{"q": f"{n:03d}", "a": HOSTILE} for n in range(100)]}
            job = ratchet.create_job(
                rl_spec(
                    name=HOSTILE,
                    tags=["<b>"],
                    data={"train": train, "prompt": "rev {q}>", "answer": "{a}"},
                    reward={"graders": [{"kind": "length", "max_tokens": 2}]},
                    eval={},
                    log_rollouts={"every_steps": 2, "groups": 2},
                    checkpoints={"every_steps": 200},
                    limits={"max_steps": 100_000, "on_no_signal": "warn"},
                )
            )
            page.reload()  # the key stays in the tab's session
            page.get_by_role("link", name=HOSTILE).click()
            watch_live(page, line, asked)
            look_at_samples(page)
            fork = pause_resume_fork(page)
            promote(page, line.url, job["id"])
            assert key not in page.content()
            visit_every_page(page, line.url, job["id"], fork)
            assert not [one.url for one in asked if key in one.url]
            assert [
                wrong for wrong in wrongs if "422" not in wrong and "404" not in wrong
            ] == []  # the fork and the alias refused
        finally:
            line.close()
            for each in ratchet.list_jobs()["data"]:
                if "cancel" in each["allowed_actions"]:
                    ratchet.cancel_job(each["id"])


@pytest.mark.timeout(240)
def test_a_session_s_operations_are_watched(stack: Any, page: Page) -> None:
    wrongs = wrongs_of(page)
    page.set_viewport_size({"width": 1280, "height": 800})
    tiny = {"source": "tiny", "adapter": {"kind": "lora", "rank": 2}}
    row = {"tokens": [5, 6], "target_tokens": [6, 7]}
    with Ratchet(stack.url, stack.key) as ratchet, ratchet.session(model=tiny) as session:
        try:
            session.forward_backward([row])
            with pytest.raises(RatchetOperationError):
                session.forward_backward([{**row, "tokens": [5, 2**30]}])
            session.sample([HOSTILE[:3]], num_samples=2, max_tokens=3)
            page.goto(stack.url)
            page.evaluate("key => sessionStorage.setItem('ratchet.key', key)", stack.key)
            page.goto(f"{stack.url}/#/jobs/{session.id}/operations")
            page.reload()
            lines = page.locator("#tab tbody tr")
            expect(lines).to_have_count(3)
            expect(lines.nth(0)).to_contain_text("2 answers, ")
            expect(lines.nth(1)).to_contain_text("token")  # what is wrong with the one that failed
            expect(lines.nth(1).locator(".badge")).to_have_text("failed")
            expect(lines.nth(2)).to_contain_text("loss:sum")
            session.optim_step({"learning_rate": 1e-3})
            expect(lines).to_have_count(4)  # by itself
            expect(lines.nth(0)).to_contain_text("grad_norm")
            page.set_viewport_size(PHONE)  # pyright: ignore[reportArgumentType]
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            assert wrongs == []
        finally:
            ratchet.cancel_job(session.id)


def sign_in(page: Page, url: str, key: str) -> None:
    page.goto(url)
    page.get_by_label("API key").fill("tml-wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not known here")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("main")).to_contain_text("ratchet submit")  # there is no job yet


def watch_live(page: Page, line: Line, asked: list[Request]) -> None:
    """Curves come and grow by themselves, and go on when the connection was cut."""
    expect(page.get_by_role("figure").first).to_be_visible(timeout=60_000)  # the worker loads its torch
    for title in ("Reward", "Clipped", "Ratio", "Entropy", "Learning rate", "Speed"):
        expect(page.get_by_role("figure").filter(has=page.get_by_text(title, exact=True))).to_be_visible()
    drawn = page.get_by_role("img", name=re.compile("^Entropy"))
    before = (step(page), drawn.get_attribute("aria-label"))
    until(lambda: step(page) > before[0] and drawn.get_attribute("aria-label") != before[1])
    streams = [one for one in asked if one.headers.get("accept") == "text/event-stream"]
    line.cut()
    at = step(page)
    until(lambda: step(page) > at + 3)
    again = [one for one in asked if one.headers.get("accept") == "text/event-stream"][len(streams) :]
    assert again and int(again[-1].headers["last-event-id"]) > int(streams[-1].headers["last-event-id"])
    expect(page.get_by_role("status").filter(has_text="live")).to_be_visible()


def look_at_samples(page: Page) -> None:
    page.keyboard.press("2")
    token = page.locator(".token.up, .token.down").first
    expect(token).to_have_attribute("title", re.compile(r"ratio .* log p .* → "))
    assert page.locator(".answer").count() == 4 and "advantage" in page.locator(".answer").first.inner_text()
    strengths = page.locator(".answer .token").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(strengths)) > 1, "the tokens are coloured by their ratio"
    expect(page.locator(".prompt")).to_contain_text(HOSTILE)
    shown = page.locator("output").inner_text()
    page.keyboard.press("[")
    expect(page.locator("output")).not_to_have_text(shown)


def confirm(page: Page, action: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def pause_resume_fork(page: Page) -> str:
    """Returns the id of the fork, whose name is long."""
    page.keyboard.press("P")
    confirm(page, "Pause")
    expect(badge(page)).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    confirm(page, "Resume")
    expect(badge(page)).to_have_text("running")
    page.get_by_role("button", name="Fork …").click()
    page.get_by_label("Changes of its spec").fill('{"limits": {"max_stepz": 3}}')
    page.get_by_role("dialog").get_by_role("button", name="Fork").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("max_steps")  # what is wrong, and what is near
    expect(page.get_by_label("Name")).to_have_value(f"{HOSTILE} (fork)")
    page.get_by_label("Name").fill(LONG)
    page.get_by_label("Changes of its spec").fill('{"limits": {"max_steps": 3}}')
    confirm(page, "Fork")
    expect(page.get_by_role("heading", level=1)).to_have_text(LONG)
    return page.url.rpartition("/")[2]


def promote(page: Page, url: str, job_id: str) -> None:
    page.goto(f"{url}#/jobs/{job_id}/checkpoints")
    page.get_by_role("button", name="Promote …").first.click()
    page.get_by_role("combobox", name="Alias").fill("demo@production")
    page.get_by_label("Note").fill(HOSTILE)
    confirm(page, "Promote")
    page.get_by_role("link", name="demo@production").click()
    line = page.locator("tbody tr").filter(has_text="demo@production")
    expect(line).to_contain_text(job_id)
    line.get_by_role("button", name="History").click()
    expect(page.get_by_role("dialog").locator("tbody tr")).to_contain_text(HOSTILE)
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Promote …").click()  # again, of a checkpoint that is not there
    page.get_by_label("Checkpoint").fill("ckpt_absent")
    page.get_by_role("combobox", name="Alias").fill("demo@production")
    expect(page.get_by_role("dialog")).to_contain_text("It points at ckpt_")
    page.get_by_role("dialog").get_by_role("button", name="Promote").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("no checkpoint ckpt_absent")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def visit_every_page(page: Page, url: str, job_id: str, fork: str) -> None:
    """Nothing is broken, nothing hostile comes alive, and on a phone nothing is wider than the screen."""
    page.set_viewport_size(PHONE)  # pyright: ignore[reportArgumentType]
    tabs = ("curves", "samples", "events", "attempts", "checkpoints", "spec", "advice")
    paths = [
        *(f"jobs/{job_id}/{tab}" for tab in tabs),
        "jobs",
        "aliases",
        "playground",
        "workers",
        "usage",
        "keys",
        f"compare/{job_id},{fork}",
        f"jobs/{fork}",
    ]
    for path in paths:
        page.goto(f"{url}#/{path}")
        page.wait_for_load_state("networkidle") if not path.startswith("jobs/") else page.wait_for_timeout(150)
        if path == "playground":
            expect(page.locator(".side > small").first).to_contain_text("step ")  # whole, where the field cuts it
        assert page.locator("img, iframe, object").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
        expect(page.locator("main .wrong:not(article)")).to_have_count(0)  # an article is advice about the job


def test_whole_numbers_that_no_double_holds_stay_as_they_are(stack: Any, page: Page) -> None:
    page.goto(stack.url)
    program = """async (seeds) => {
      const at = (name) => new URL(name, document.querySelector('script').src);
      const [{exactly}, {differs}] = [await import(at('api.js')), await import(at('spec.js'))];
      const [one, other] = seeds.map((seed) => exactly(`{"seed": ${seed}, "rate": 1e-4, "steps": 20}`));
      return [JSON.stringify(one), JSON.stringify([...differs(one, other)])];
    }"""
    kept, different = page.evaluate(program, ["9007199254740993", "9007199254740992"])
    assert kept == '{"seed":9007199254740993,"rate":0.0001,"steps":20}'
    assert different == '[["/seed",9007199254740993,9007199254740992]]'


def test_a_long_curve_is_put_together_in_the_page_as_the_server_does_it(stack: Any, page: Page) -> None:
    page.goto(stack.url)

    def condensed(points: int, **curve: Any) -> Any:
        module = "await import(new URL('curves.js', document.querySelector('script').src))"
        return page.evaluate(f"async ([curve, points]) => ({module}).condensed(curve, points)", [curve, points])

    found = condensed(3, step=list(range(1, 11)), value=list(range(10)))
    assert found == {"step": [4, 7, 10], "value": [1.5, 5, 8], "min": [0, 4, 7], "max": [3, 6, 9]}
    found = condensed(1, step=[10, 20, 21, 22], value=[1, 2, 5, None], min=[0, 1, 5, None], max=[3, 4, 5, None])
    assert found == {"step": [22], "value": [pytest.approx(35 / 21)], "min": [0], "max": [5]}  # of 10, 10 and 1 steps
    found = condensed(2, step=[1, 2, 3, 4], value=[None, None, -1, -3])
    assert found == {"step": [2, 4], "value": [None, -2], "min": [None, -3], "max": [None, -1]}


@pytest.fixture
def fresh(stack: Any, page: Page) -> Iterator[Page]:
    """A page of its own, signed in, at the list of jobs."""
    assert page.context.browser is not None
    context = page.context.browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.goto(stack.url)
    opened.evaluate("key => sessionStorage.setItem('ratchet.key', key)", stack.key)
    opened.goto(f"{stack.url}/#/jobs")
    opened.reload()
    expect(opened.get_by_role("heading", level=1)).to_be_visible()
    yield opened
    context.close()


@pytest.fixture(scope="module")
def job(stack: Any) -> Iterator[dict[str, Any]]:
    """A job that is paused and has a checkpoint. Nobody changes it."""
    with Ratchet(stack.url, stack.key) as ratchet:
        made = ratchet.create_job(rl_spec(name="rests", limits={"max_steps": 100_000}))
        until(lambda: ratchet.get_job(made["id"])["step"] > 0, 60)
        ratchet.pause_job(made["id"])
        until(lambda: ratchet.get_job(made["id"])["status"] == "paused", 60)
        yield {**made}
        ratchet.cancel_job(made["id"])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def test_the_keyboard_alone_opens_a_job_and_does_not_cancel_it_by_accident(fresh: Page, job: dict[str, Any]) -> None:
    fresh.get_by_role("link", name=job["name"], exact=True).focus()
    fresh.keyboard.press("Enter")
    expect(fresh.get_by_role("heading", level=1)).to_have_text(job["name"])
    expect(fresh.locator("main")).to_be_focused()  # the link that was followed is gone
    sent = list[Request]()
    fresh.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    cancel = fresh.get_by_role("button", name="Cancel …")
    cancel.focus()
    fresh.keyboard.press("Enter")
    dialog = fresh.get_by_role("dialog", name="Cancel this job?")
    expect(dialog.get_by_role("button", name="Back")).to_be_focused()
    expect(dialog).to_contain_text(job["name"])
    fresh.get_by_label("save a checkpoint first").focus()
    fresh.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    fresh.keyboard.press("Escape")
    expect(fresh.get_by_role("dialog")).to_have_count(0)
    expect(cancel).to_be_focused()
    assert sent == []
    expect(badge(fresh)).to_have_text("paused")
    fresh.get_by_role("link", name="Checkpoints").focus()
    fresh.keyboard.press("Enter")
    expect(fresh.get_by_role("link", name="Checkpoints")).to_have_attribute("aria-current", "page")
    expect(fresh.get_by_role("link", name="Checkpoints")).to_be_focused()


def test_a_question_that_was_asked_twice_is_done_once(stack: Any, fresh: Page, job: dict[str, Any]) -> None:
    """A second click changes nothing, and a request whose answer was lost is the same one when it is sent again."""
    keys: list[str | None] = []

    def lose_the_first(route: Any) -> None:
        keys.append(route.request.headers.get("idempotency-key"))
        if len(keys) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    fresh.goto(f"{stack.url}/#/aliases")
    fresh.get_by_role("button", name="Promote …").dblclick()
    fresh.get_by_label("Checkpoint").fill("ckpt_absent")
    fresh.keyboard.press("Escape")
    expect(fresh.get_by_role("dialog")).to_have_count(0)  # a second click opened no other
    fresh.route("**/fork", lose_the_first)
    fresh.goto(f"{stack.url}/#/jobs/{job['id']}")
    fresh.get_by_role("button", name="Fork …").dblclick()
    dialog = fresh.get_by_role("dialog")
    expect(dialog).to_have_count(1)
    dialog.get_by_role("button", name="Fork").click()
    expect(dialog.get_by_role("alert")).to_contain_text("does not answer")
    dialog.get_by_role("button", name="Fork").dblclick()
    expect(fresh.get_by_role("heading", level=1)).to_have_text(f"{job['name']} (fork)")
    assert len(keys) == 2 and keys[0] == keys[1]
    with Ratchet(stack.url, stack.key) as ratchet:
        forks = [one["id"] for one in ratchet.list_jobs()["data"] if one["parent_id"] == job["id"]]
        assert len(forks) == 1
        ratchet.cancel_job(forks[0])


def test_a_question_asked_again_later_is_another_one(stack: Any, fresh: Page, job: dict[str, Any]) -> None:
    """A rollback whose answer was lost, and the same one on purpose, after the alias was promoted again."""
    lost = list[Request]()

    def lose_the_first(route: Any) -> None:
        if lost:
            return route.continue_()
        lost.append(route.request)
        route.fetch()
        return route.abort()

    def roll_back() -> None:
        fresh.goto(f"{stack.url}/#/aliases")
        line = fresh.locator("tbody tr").filter(has_text="digits@back")
        expect(line).to_contain_text(bad)
        line.get_by_role("button", name="Roll back …").click()
        fresh.get_by_role("dialog").get_by_role("button", name="Roll back").click()

    with Ratchet(stack.url, stack.key) as ratchet:
        good = ratchet.list_checkpoints(job_id=job["id"])["data"][0]["id"]
        other = ratchet.create_job(supervised_spec(name="other", limits={"max_steps": 1}))
        until(lambda: ratchet.get_job(other["id"])["status"] == "succeeded", 60)
        bad = ratchet.list_checkpoints(job_id=other["id"])["data"][0]["id"]
        ratchet.promote(good, "digits@back")
        ratchet.promote(bad, "digits@back")
        fresh.route("**/rollback", lose_the_first)
        roll_back()
        expect(fresh.get_by_role("dialog").get_by_role("alert")).to_contain_text("does not answer")
        fresh.keyboard.press("Escape")
        assert ratchet.get_alias("digits@back")["checkpoint_id"] == good
        ratchet.promote(bad, "digits@back")
        fresh.goto(f"{stack.url}/#/jobs")
        roll_back()
        expect(fresh.get_by_role("dialog")).to_have_count(0)
        assert ratchet.get_alias("digits@back")["checkpoint_id"] == good


def rotating(page: Page, url: str, where: str, which: str) -> Any:
    """The question whether to rotate a key or webhook; the list has it as `which`."""
    page.goto(f"{url}/#/{where}")
    page.locator("tbody tr").filter(has_text=which).get_by_role("button", name="Rotate …").click()
    return page.get_by_role("dialog")


def test_a_rotation_whose_answer_was_lost_is_not_done_twice(stack: Any, fresh: Page, receiver: Receiver) -> None:
    sent: list[str] = []

    def lose(route: Any) -> None:
        sent.append(route.request.url)
        route.fetch()
        route.abort()

    with Ratchet(stack.url, stack.key) as ratchet:
        hook, key = ratchet.create_webhook(receiver.url), ratchet.create_key("rotates unseen")
        fresh.route("**/rotate", lose)
        for where, one, found in (
            ("webhooks", hook["id"], "the secret before signs, too, until"),
            ("keys", key["id"], "rotates unseen"),
        ):
            dialog = rotating(fresh, stack.url, where, one)
            dialog.get_by_role("button", name="Rotate").click()
            expect(dialog.get_by_role("alert")).to_contain_text("It may have been done all the same.")
            expect(dialog.get_by_role("button", name="Rotate")).to_be_disabled()
            expect(dialog.get_by_role("button", name="Back")).to_be_focused()
            fresh.keyboard.press("Enter")
            expect(dialog).to_have_count(0)
            others = fresh.locator("tbody tr").filter(has_text=found)
            expect(others).to_have_count(1 if where == "webhooks" else 2)  # what it says to look for
        assert len(sent) == 2
        ratchet.delete_webhook(hook["id"])


def test_a_rotation_under_way_is_not_left_and_what_it_made_is_shown(stack: Any, fresh: Page) -> None:
    held: list[Any] = []
    with Ratchet(stack.url, stack.key) as ratchet:
        one = ratchet.create_key("rotates slowly")["id"]
    fresh.route("**/rotate", lambda route: held.append(route))
    dialog = rotating(fresh, stack.url, "keys", one)
    with fresh.expect_request("**/rotate"):
        dialog.get_by_role("button", name="Rotate").click()
    expect(dialog.get_by_role("button", name="Back")).to_be_disabled()
    fresh.keyboard.press("Escape")
    fresh.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    fresh.evaluate("location.hash = '#/usage'")  # the browser's own Back
    expect(dialog).to_have_count(0)
    fresh.keyboard.press("?")
    expect(dialog).to_be_visible()
    held[0].continue_()
    expect(fresh.get_by_label("Copy it now")).to_have_value(re.compile("^tml-"))
    fresh.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_the_page_says_that_the_server_is_away_and_goes_on_when_it_is_back(
    stack: Any, fresh: Page, job: dict[str, Any]
) -> None:
    lost = fresh.locator(".lost")
    fresh.route("**/v1/jobs:overview*", lambda route: route.fulfill(status=503, json={"detail": "the database is away."}))
    expect(lost).to_contain_text("the database is away; trying again")  # a list that looks by itself tells of it, too
    fresh.evaluate("async () => (await import(new URL('api.js', document.querySelector('script').src))).get('/v1/queue')")
    assert "the database is away" in lost.inner_text()  # an answer of something else is none to this
    fresh.unroute("**/v1/jobs:overview*")
    expect(lost).to_be_empty()
    looks: list[str] = []

    def answer_the_first(route: Any) -> None:
        looks.append(route.request.url)
        route.continue_() if len(looks) == 1 else route.fulfill(status=503, json={"detail": "the database is away."})

    fresh.route(f"**/v1/jobs:overview?id={job['id']}*", answer_the_first)
    fresh.goto(f"{stack.url}/#/jobs/{job['id']}")
    expect(lost).to_contain_text("the database is away")  # so does a job's page
    fresh.get_by_role("link", name="Keys").click()
    expect(lost).to_be_empty()  # nobody asks for it any more
    fresh.unroute(f"**/v1/jobs:overview?id={job['id']}*")
    fresh.route("**/v1/**", lambda route: route.abort())
    fresh.get_by_role("link", name="Usage").click()
    expect(lost).to_contain_text("does not answer")
    expect(fresh.locator("main .wrong")).to_contain_text("does not answer")
    fresh.unroute("**/v1/**")
    expect(lost).to_be_empty()
    expect(fresh.locator("main .wrong")).to_have_count(0)
    expect(fresh.locator("main")).to_contain_text("Budget of default")  # what it asked for in vain


def test_a_key_that_is_revoked_ends_at_the_sign_in_page_with_the_reason(stack: Any, fresh: Page, job: dict[str, Any]) -> None:
    with Ratchet(stack.url, stack.key) as ratchet:
        made = ratchet.create_key("to be revoked", scopes=["write"])
        fresh.evaluate("key => sessionStorage.setItem('ratchet.key', key)", made["key"])
        fresh.goto(f"{stack.url}/#/jobs/{job['id']}")
        fresh.reload()
        expect(fresh.locator(".who")).to_contain_text("to be revoked")
        fresh.get_by_role("button", name="Fork …").click()
        ratchet.delete_key(made["id"])
    expect(fresh.get_by_role("alert")).to_contain_text("revoked", timeout=30_000)
    expect(fresh.get_by_label("API key")).to_be_visible()
    expect(fresh.get_by_role("dialog")).to_have_count(0)
    assert fresh.evaluate("sessionStorage.length") == 0


def test_what_is_chosen_on_a_page_stands_in_its_address(stack: Any, fresh: Page, job: dict[str, Any]) -> None:
    fresh.get_by_label("Status").select_option("paused")
    expect(fresh.get_by_role("link", name=job["name"], exact=True)).to_be_visible()
    fresh.get_by_role("link", name=job["name"], exact=True).click()
    expect(fresh.get_by_role("heading", level=1)).to_have_text(job["name"])
    fresh.go_back()
    expect(fresh.get_by_label("Status")).to_have_value("paused")
    fresh.goto(f"{stack.url}/#/usage")
    fresh.get_by_label("By", exact=True).select_option("day")
    fresh.get_by_label("Project").fill("no project")
    fresh.get_by_label("Project").blur()
    expect(fresh.locator("main > .wrong")).to_contain_text("no project")
    fresh.get_by_label("Project").fill("default")
    fresh.get_by_label("Project").blur()
    expect(fresh.locator("main > .wrong")).to_have_count(0)  # what was wrong goes with its cause
    fresh.reload()
    expect(fresh.get_by_label("By", exact=True)).to_have_value("day")


def test_a_list_that_is_drawn_again_keeps_the_keyboard_where_it_was(stack: Any, fresh: Page) -> None:
    program = """async () => {
      const {h, replace} = await import(new URL('dom.js', document.querySelector('script').src));
      const place = document.querySelector('main');
      const draw = (...names) => replace(place, names.map((name) => h('a', {href: `#/${name}`}, name)));
      const at = () => document.activeElement.textContent;
      draw('a', 'b', 'c');
      place.children[1].focus();
      draw('z', 'a', 'b', 'c');
      const same = at();
      draw('z', 'a', 'c');
      const near = at();
      replace(place);
      return [same, near, document.activeElement === place];
    }"""
    fresh.goto(f"{stack.url}/#/keys")
    expect(fresh.get_by_role("heading", level=1)).to_have_text("Keys")
    assert fresh.evaluate(program) == ["b", "c", True]


def test_a_row_that_is_drawn_again_keeps_the_keyboard_and_no_other_row_gets_it(stack: Any, fresh: Page) -> None:
    program = """async () => {
      const {h, replace, rowOf, table} = await import(new URL('dom.js', document.querySelector('script').src));
      const place = document.querySelector('main');
      const buttons = (all) => all.map((one) => h('button', null, one));
      const draw = (...rows) => replace(place, table('Rows', ['what'], rows.map(([id, ...all]) => rowOf(id, buttons(all)))));
      const at = ({activeElement: one} = document) => {
        const row = one.closest('tr');
        return row ? [row.dataset.of, one.textContent] : [one.className];
      };
      draw(['a', 'Disable', 'Delete'], ['b', 'Disable', 'Delete']);
      place.querySelectorAll('button')[0].focus();
      const found = [];
      for (const rows of [
        [['new', 'Disable', 'Delete'], ['a', 'Disable', 'Delete'], ['b', 'Disable', 'Delete']],
        [['new', 'Disable', 'Delete'], ['a', 'Enable', 'Delete']],
        [['new', 'Disable', 'Delete'], ['a', 'Roll back', 'Enable', 'Delete']],
        [['new', 'Disable', 'Delete'], ['b', 'Enable', 'Delete']],
      ]) {
        draw(...rows);
        found.push(at());
      }
      return found;
    }"""
    fresh.goto(f"{stack.url}/#/keys")
    expect(fresh.get_by_role("heading", level=1)).to_have_text("Keys")
    assert fresh.evaluate(program) == [["a", "Disable"], ["a", "Enable"], ["a", "Enable"], ["scrolls"]]


def test_enter_sends_the_delivery_again_at_which_the_keyboard_is(stack: Any, fresh: Page, receiver: Receiver) -> None:
    with Ratchet(stack.url, stack.key) as ratchet:
        hook = ratchet.create_webhook(receiver.url)["id"]
        first = ratchet.test_webhook(hook)["id"]
        receiver.wait_for(1)
        fresh.goto(f"{stack.url}/#/webhooks/{hook}")
        lines = fresh.get_by_role("region", name="Deliveries").locator("tbody tr")
        expect(lines).to_have_count(1)
        expect(lines).to_contain_text("delivered")
        lines.get_by_role("button", name="Redeliver").focus()
        lines.evaluate("line => { line.dataset.marked = '' }")
        with fresh.expect_response("**/deliveries?*"):
            pass
        assert lines.get_attribute("data-marked") is not None  # it is not drawn again where nothing is new
        fresh.locator("tbody tr").filter(has_text=hook).get_by_role("button", name="Test").evaluate("button => button.click()")
        expect(lines).to_have_count(2)  # the newest is above
        with fresh.expect_request("**/redeliver") as sent:
            fresh.keyboard.press("Enter")
        assert f"/{first}/" in sent.value.url
        ratchet.delete_webhook(hook)


def test_the_job_that_is_marked_in_the_list_stays_marked_when_another_comes(
    stack: Any, fresh: Page, job: dict[str, Any]
) -> None:
    marked = fresh.locator("tbody tr.at")
    expect(fresh.get_by_role("link", name=job["name"], exact=True)).to_be_visible()
    fresh.keyboard.press("j")
    name = marked.locator("td.name a").inner_text()
    with Ratchet(stack.url, stack.key) as ratchet:
        new = ratchet.create_job(supervised_spec(name="comes above", limits={"max_steps": 1}))["id"]
        fresh.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks at once
        expect(fresh.locator("tbody tr").first).to_contain_text("comes above")
        expect(marked.locator("td.name a")).to_have_text(name)
        fresh.keyboard.press("Enter")
        expect(fresh.get_by_role("heading", level=1)).to_have_text(name)
        until(lambda: ratchet.get_job(new)["status"] == "succeeded", 60)


LISTS = ["jobs/{job}/checkpoints", "aliases", "keys", "webhooks/{hook}", "workers"]


@pytest.mark.parametrize("where", LISTS)
def test_every_list_knows_its_rows(stack: Any, fresh: Page, job: dict[str, Any], where: str) -> None:
    """By what they are of: that is how the keyboard stays at one of them."""
    with Ratchet(stack.url, stack.key) as ratchet:
        hook = ratchet.create_webhook("http://127.0.0.1:9/")["id"]
        ratchet.test_webhook(hook)
        ratchet.promote(ratchet.list_checkpoints(job_id=job["id"])["data"][0]["id"], "digits@listed")
        fresh.goto(f"{stack.url}/#/{where.format(job=job['id'], hook=hook)}")
        expect(fresh.locator("tbody tr").first).to_be_visible()
        ids = fresh.locator("tbody tr").evaluate_all("all => all.map(one => one.dataset.of)")
        assert ids and None not in ids and len(set(ids)) == len(ids)
        ratchet.delete_webhook(hook)
        ratchet.delete_alias("digits@listed")


def test_a_job_is_submitted_from_the_page(stack: Any, fresh: Page) -> None:
    spec = json.dumps(supervised_spec(name="from the page", limits={"max_steps": 1}))
    fresh.keyboard.press("N")
    dialog = fresh.get_by_role("dialog", name="A new job")
    dialog.get_by_label("Spec, in YAML or JSON").fill("kind: supervised\nmodle: {source: tiny}")
    dialog.get_by_role("button", name="Submit").click()
    expect(dialog.get_by_role("alert")).to_contain_text("did you mean 'model'")
    dialog.get_by_label("or from a file").set_input_files({"name": "job.json", "mimeType": "", "buffer": spec.encode()})
    expect(dialog.get_by_label("Spec, in YAML or JSON")).to_have_value(spec)
    dialog.get_by_role("button", name="Check it").click()
    expect(dialog.get_by_role("status")).to_contain_text("nothing was made")
    dialog.get_by_role("button", name="Submit").dblclick()
    expect(fresh.get_by_role("heading", level=1)).to_have_text("from the page")
    with Ratchet(stack.url, stack.key) as ratchet:
        assert [one["name"] for one in ratchet.list_jobs()["data"]].count("from the page") == 1


def test_a_webhook_is_made_tried_and_deleted(stack: Any, fresh: Page, receiver: Receiver) -> None:
    fresh.keyboard.press("g")
    fresh.keyboard.press("h")
    fresh.get_by_role("button", name="New webhook …").dblclick()
    dialog = fresh.get_by_role("dialog")
    dialog.get_by_label("Address").fill(receiver.url)
    dialog.get_by_label("Events").fill("job.failed, job.nothing")
    dialog.get_by_role("button", name="Make it").click()
    expect(dialog.get_by_role("alert")).to_contain_text("job.nothing")
    dialog.get_by_label("What it is for").fill(HOSTILE)
    dialog.get_by_label("Events").fill("job.failed")
    dialog.get_by_role("button", name="Make it").click()
    expect(fresh.get_by_label("Copy it now")).to_have_value(re.compile("^whsec_"))
    fresh.keyboard.press("Escape")
    expect(fresh.get_by_role("button", name="New webhook …")).to_be_focused()
    line = fresh.locator("tbody tr").filter(has_text=HOSTILE)
    line.get_by_role("button", name="Test").click()
    line.get_by_role("link", name="Deliveries").click()
    sent = fresh.get_by_role("region", name="Deliveries").locator("tbody tr")
    expect(sent).to_contain_text("delivered")
    sent.get_by_role("button", name="Redeliver").click()
    receiver.wait_for(2)
    assert len(set(receiver.ids())) == 1
    line.get_by_role("button", name="Disable").click()
    expect(line).to_contain_text("its owner disabled it")
    line.get_by_role("button", name="Test").click()
    expect(fresh.locator("main > .wrong")).to_contain_text("is disabled")
    line.get_by_role("button", name="Delete …").click()
    confirm(fresh, "Delete the webhook")
    expect(fresh.locator("main")).to_contain_text("There are none yet")


def test_a_key_is_rotated_and_a_checkpoint_in_use_stays(stack: Any, fresh: Page, job: dict[str, Any]) -> None:
    with Ratchet(stack.url, stack.key) as ratchet:
        old = ratchet.create_key("rotates itself")["key"]
        checkpoint = ratchet.list_checkpoints(job_id=job["id"])["data"][0]["id"]
        ratchet.promote(checkpoint, "digits@kept")
    fresh.evaluate("key => sessionStorage.setItem('ratchet.key', key)", old)
    fresh.goto(f"{stack.url}/#/keys")
    fresh.reload()
    fresh.locator("tbody tr").filter(has_text="yours").get_by_role("button", name="Rotate …").click()
    hours, act = (
        fresh.get_by_label("Hours for which the old one works, too"),
        fresh.get_by_role("dialog").get_by_role("button", name="Rotate"),
    )
    hours.fill("0")  # if the answer were lost, so would be the way in
    act.click()
    assert hours.evaluate("field => field.validity.rangeUnderflow")
    hours.fill("1")
    act.click()
    new = fresh.get_by_label("Copy it now").input_value()
    assert new != old and fresh.evaluate("sessionStorage.getItem('ratchet.key')") == new
    fresh.keyboard.press("Escape")
    fresh.goto(f"{stack.url}/#/jobs/{job['id']}/checkpoints")  # with the new key
    line = fresh.locator("tbody tr").filter(has_text=checkpoint)
    line.get_by_role("button", name="Delete …").click()
    dialog = fresh.get_by_role("dialog", name="Delete this checkpoint?")
    dialog.get_by_role("button", name="Delete the checkpoint").click()
    expect(dialog.get_by_role("alert")).to_contain_text("digits@kept")
    fresh.keyboard.press("Escape")
    expect(line.get_by_role("button", name="Delete …")).to_be_focused()
