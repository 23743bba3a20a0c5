"""What does an open dashboard cost: Chromium's main thread for a list of 10,000 jobs, and the API's CPU while somebody looks?

    python bench/dashboard.py http://127.0.0.1:8000 .ratchet

on a stack of `ratchet up` with its data directory, whose database (SQLite) gets the 10,000 jobs as copies of the newest one:
use one made for this. The process of `ratchet up` is found by the port; its CPU is that of the API.
"""

import os
import sqlite3
import sys
import time
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

JOBS = 10_000
LOOK_S = 40.0


def copy_newest_job(database: Path) -> None:
    with sqlite3.connect(database, timeout=60) as connection:
        connection.row_factory = sqlite3.Row
        job = dict(connection.execute("SELECT * FROM jobs ORDER BY created_at DESC LIMIT 1").fetchone())
        curve = "SELECT * FROM metrics WHERE job_id = ? AND name = 'reward/mean'"
        metrics = [dict(row) for row in connection.execute(curve, [job["id"]])]
        job |= {"status": "succeeded", "checkpoint_id": None}
        for number in range(JOBS):
            copy = job | {"id": f"job_copy{number:022d}", "name": f"copy {number}"}
            rows = [("jobs", copy), *(("metrics", point | {"job_id": copy["id"]}) for point in metrics)]
            for table, row in rows:
                names, places = ", ".join(row), ", ".join("?" * len(row))
                connection.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})", list(row.values()))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def share(pid: int) -> float:
    """Percent of a core over LOOK_S."""
    before, began = cpu_s(pid), time.monotonic()
    time.sleep(LOOK_S)
    return 100 * (cpu_s(pid) - before) / (time.monotonic() - began)


def listener(port: int) -> int:
    """The process that listens on this port of this machine."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {line[9] for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            return int(link.parts[2])
    raise SystemExit(f"nothing of yours listens on port {port}")


def main(url: str, data_dir: Path) -> None:
    key, pid = (data_dir / "key").read_text().strip(), listener(httpx.URL(url).port or 80)
    copy_newest_job(data_dir / "ratchet.db")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        rows = page.locator(".jobs tbody tr")
        rows.first.wait_for()  # signed in
        for _ in range(3):
            tools = page.context.new_cdp_session(page)
            tools.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.reload()
            rows.first.wait_for()
            page.wait_for_timeout(1000)
            taken = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}
            print(f"a page of {rows.count()} of {JOBS} jobs: {taken['TaskDuration']:.3f} s of the main thread")
            tools.detach()
        page.goto("about:blank")
        alone = share(pid)
        page.goto(url)
        rows.first.wait_for()
        print(f"the API: {alone:.2f} % of a core alone, {share(pid) - alone:.2f} % more with the list open")
        running = httpx.get(f"{url}/v1/jobs?status=running", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        for job in running[:1]:
            page.goto(f"{url}/#/jobs/{job['id']}")
            page.get_by_role("figure").first.wait_for()
            print(f"{share(pid) - alone:.2f} % more with the curves of a running job open")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
