"""Any body at all: refused or computed, never an error of ours."""

import json
import os
from typing import Any

import hypothesis
import orjson
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from chaos.standin import worker
from losses_over_http import ITEM, JSON, TENSORS, in_tensors, post
from service.api.examples import LOSS_REQUEST

EXAMPLES = os.environ.get("RATCHET_TEST_FUZZ_EXAMPLES")  # for long runs, each with other examples
SOUND = in_tensors()


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    raw = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(raw)


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["gspo", "gradients"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ITEM, *ITEM["batch"], "items", "x"]), inner),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn) -> bytes:
    """The example with a scrap put in somewhere."""
    request = json.loads(json.dumps(LOSS_REQUEST))
    place: Any = request
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else None
        below = None if key is None else place[key]
        if isinstance(below, dict | list) and draw(st.booleans()):
            place = below
            continue
        if isinstance(place, dict) and (key is None or draw(st.booleans())):
            place[draw(st.text(max_size=6) | st.sampled_from(["rewards", "group_ids", "kind", "clip_high"]))] = draw(SCRAPS)
        elif key is not None:
            place[key] = draw(SCRAPS)
        return json.dumps(request).encode("utf-8", "surrogatepass")


BODIES = st.one_of(
    st.tuples(st.sampled_from([JSON, TENSORS]), st.binary(max_size=100)),
    st.tuples(st.just(TENSORS), damaged(SOUND)),
    st.tuples(st.just(JSON), damaged(orjson.dumps(LOSS_REQUEST))),
    st.tuples(st.just(JSON), altered()),
    st.tuples(st.just(TENSORS), SCRAPS.map(lambda request: in_tensors(request))),
)


def test_no_body_whatever_is_an_error_of_ours(api):
    """Half-way sound ones reach the queue: the stand-in reads every order that comes there."""
    statuses = dict[int, int]()

    @hypothesis.settings(
        max_examples=int(EXAMPLES or 200),
        derandomize=EXAMPLES is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(BODIES)
    def fuzz(body: tuple[str, bytes]) -> None:
        answer = post(client, body[1], **{"Content-Type": body[0]})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 422), (answer.text, body)

    with api.client() as client, worker(api.settings) as seen:
        fuzz()
    assert statuses[200] == len(seen) > 0
    assert statuses[400] > 0
    assert statuses[422] > 0
