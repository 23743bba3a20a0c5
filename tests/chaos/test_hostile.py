"""A key that does all that it may hurts nobody else (make chaos)."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from chaos.hostile import BOUNDS, play
from chaos.rig import Rig
from chaos.servers import own_postgres_server

SECONDS = 30.0
P99_S = 0.5
GROWN_BYTES = 512 * 2**20


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_hostile_key_is_not_noticed_by_another(backend: str, rigs: Callable[..., Rig]) -> None:
    with ExitStack() as stack:
        options = {"postgres": stack.enter_context(own_postgres_server())} if backend == "postgresql" else {}
        rig = rigs(**options)
        played = play(rig, seconds=SECONDS)
        said = (
            f"{backend}: p99 {played.p99_s:.3f} s, slowest {max(played.seconds):.3f} s of {len(played.seconds)}, "
            f"grown {played.grown_bytes >> 20} MiB, streams {played.streams}, {played.behaved}, {played.statuses}"
        )
        print(said)
        assert played.server_errors == 0, said + rig.tails()
        assert set(played.behaved) == {200, 201}, said
        assert played.p99_s < P99_S, said
        assert played.grown_bytes < GROWN_BYTES, said
        assert played.streams == int(BOUNDS["RATCHET_KEY_OPEN_STREAMS"]), said
        assert all(status == 429 or status < 500 for one in played.statuses.values() for status in one), said
        assert any(one[429] for one in played.statuses.values()), said  # the control: it did meet its bounds
