"""One undisturbed run of each spec for all tests of a session; a rig of its own for each test."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from chaos.oracle import Standing
from chaos.reference import References
from chaos.rig import Rig, Zygote, new_rig
from chaos.servers import own_redis_server

NewRig = Callable[..., Rig]


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, sqlite_template: Path
) -> Iterator[Callable[[dict[str, Any]], Standing]]:
    """`undisturbed(spec)`: what the job leaves behind when nothing happens to it."""
    with References(zygote, tmp_path_factory.mktemp("undisturbed"), sqlite_template) as references:
        yield references


@pytest.fixture
def rigs(tmp_path: Path, zygote: Zygote, sqlite_template: Path) -> Iterator[NewRig]:
    numbers = count()
    with ExitStack() as stack:

        def make(**options: Any) -> Rig:
            redis = stack.enter_context(own_redis_server())
            folder = tmp_path / f"rig-{next(numbers)}"
            rig: AbstractContextManager[Rig] = new_rig(zygote, folder, redis, template=sqlite_template, **options)
            return stack.enter_context(rig)

        yield make


# ---------------------------------------------------------------- the table of `make chaos`

TABLE = Path("build/chaos.md")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Fault, times tried, recovered in seconds (the slowest), bound, oracle: printed, and written to build/chaos.md."""
    tried: dict[str, list[Any]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            said = dict(report.user_properties)
            if report.when == "call" and "fault" in said:
                tried.setdefault(said["fault"], []).append((said, outcome == "passed"))
    if not tried:
        return
    lines = ["| fault | tried | recovered in s | bound in s | oracle |", "|---|---|---|---|---|"]
    for fault, times in tried.items():
        slowest = max((said.get("recovered_s", float("inf")) for said, _ in times), default=0.0)
        held = sum(passed for _, passed in times)
        oracle = "nothing lost" if held == len(times) else f"{len(times) - held} of {len(times)} FAILED"
        lines.append(f"| {fault} | {len(times)} | {slowest:.1f} | {times[0][0]['bound_s']:.0f} | {oracle} |")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    terminalreporter.section(f"faults ({TABLE})")
    for line in lines:
        terminalreporter.line(line)
