"""The long version of tests/api/test_races.py, over a real API process (make chaos)."""

from collections.abc import Callable, Iterator

import pytest

from chaos.races import race
from chaos.rig import Rig
from chaos.servers import OwnPostgres, own_postgres_server

ROUNDS = 1000


@pytest.fixture(params=["sqlite", "postgresql"])
def postgres(request: pytest.FixtureRequest) -> Iterator[OwnPostgres | None]:
    if request.param == "sqlite":
        yield None
        return
    with own_postgres_server() as server:
        yield server


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_of_all_that_is_made_and_taken_away_at_once_nothing_is_a_500(
    rigs: Callable[..., Rig], postgres: OwnPostgres | None
) -> None:
    rig = rigs(postgres=postgres)
    rig.start_api(RATCHET_KEY_REQUESTS_PER_S="0")
    seen, failed = race(rig.client, rig.store, ROUNDS)
    print(dict(sorted(seen.items())))
    assert failed == []
    assert seen["_fork 201"] and seen["_fork 404"] and seen["_delete_job 204"], seen  # both sides win now and then
