"""The queries of the Tinker wire on both databases."""

from typing import Any

import httpx

from scripted_sessions import ScriptedWorker
from service.store import keys


def test_a_run_from_beginning_to_end(each_api: Any, new_wire: Any) -> None:
    with each_api.store.begin() as session:
        _, text = keys.create(session, project="tinker", name="test")
    http = httpx.Client(base_url=each_api.url, headers={"X-API-Key": text}, timeout=60)
    with ScriptedWorker(each_api.store, each_api.settings, each_api.doorbell), http:
        wire = new_wire(http)
        model_id = wire.model()
        assert wire.done(wire.forward_backward(model_id, [5, 6])).metrics["loss:sum"]
        path = wire.done(wire.ordered("save_weights", model_id, path="one", user_metadata={"k": "v"}))["path"]
        sampling = wire.done(wire.ordered("save_weights_for_sampler", model_id, sampling_session_seq_id=0))
        assert len(wire.done(wire.sample(sampling["sampling_session_id"], [5], 999_999_999 * 10**9)).sequences) == 1
        found = http.get("/api/v1/checkpoints").json()
        assert [one["tinker_path"] for one in found["checkpoints"]] == [path] and found["cursor"]["total_count"] == 1
        assert http.get("/api/v1/training_runs").json()["training_runs"][0]["last_checkpoint"]["user_metadata"] == {"k": "v"}
        (summary,) = wire.ok("sessions/search", statuses=[{"type": "active"}])["sessions"]
        assert (summary["checkpoints_count"], summary["session_id"]) == (1, wire.session_id)
        copied = wire.ok("copy_weights", source_path=path, destination_project_id="tinker")["tinker_path"]
        assert wire.ok("weights_info", tinker_path=copied)["lora_rank"] == 4
        url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"
        assert http.post(f"{url}/publish").status_code == 204 and http.delete(url).status_code == 204
        wire.ok("session_heartbeat", session_id=wire.session_id)
        assert wire.post(f"sessions/{wire.session_id}/finish", reason={"type": "success"}).status_code == 204
        assert wire.post("session_heartbeat", session_id=wire.session_id).status_code == 410
