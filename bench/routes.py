"""What single routes cost at saturation: a job read, a job submitted, a small loss; over 16 connections, against a bare FastAPI
application that reads the body, where there is one, and answers the same bytes from memory.

    python bench/routes.py [--rounds 3] [--backend sqlite]

Both run under uvicorn in one process each, on all cores, beside the client (and the loss worker); they take turns and never run
at once. CPU is that of the API's process.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import uvicorn
from fastapi import FastAPI, Request, Response
from loopback import BACKENDS, free_port, machine, started, stop, wait_until_ready
from reads import SPEC, Arm
from wire import ask, get, post

IN_A_ROUND = {"GET /v1/jobs/{id}": 400, "POST /v1/jobs": 160, "POST /v1/losses": 400}
STATUS = {"GET /v1/jobs/{id}": 200, "POST /v1/jobs": 201, "POST /v1/losses": 200}


def loss(rows: int = 2, tokens: int = 16) -> dict[str, object]:
    draw = Random(0)
    old = [[-3 * draw.random() - 0.1 for _ in range(tokens)] for _ in range(rows)]
    batch = {"log_probs": old, "old_log_probs": old, "advantages": [1.0, -1.0]}
    return {"items": [{"objective": "gspo", "return": ["gradients"], "batch": batch}]}


def bare(answers: dict[str, str], port: int) -> None:
    app = FastAPI()

    def route(kind: str) -> None:
        body, status = answers[kind].encode(), STATUS[kind]

        async def read(job_id: str) -> Response:
            return Response(body, status, media_type="application/json")

        async def written(request: Request) -> Response:
            json.loads(await request.body())
            return Response(body, status, media_type="application/json")

        method, _, path = kind.partition(" ")
        app.api_route(path.replace("{id}", "{job_id}"), methods=[method])(read if "{id}" in path else written)

    for kind in STATUS:
        route(kind)
    app.get("/readyz")(lambda: None)
    uvicorn.run(app, port=port, log_config=None, access_log=False, server_header=False)


def measure(backend: str, rounds: int) -> dict[str, tuple[Arm, Arm]]:
    with started(backend, workers=1) as stack:
        [made] = ask(stack.url, [post("/v1/jobs", stack.key, SPEC)], status=201)
        job_id = json.loads(made.body)["id"]

        def request(kind: str, key: str) -> bytes:
            method, _, path = kind.partition(" ")
            if method == "GET":
                return get(path.replace("{id}", job_id), key)
            return post(path, key, SPEC) if path == "/v1/jobs" else post(path, key, loss(), Prefer="wait=30")

        answers = {
            kind: ask(stack.url, [request(kind, stack.key)], status=STATUS[kind])[0].body.decode() for kind in IN_A_ROUND
        }
        file, port = Path(stack.settings.data_dir) / "answers.json", free_port()
        file.write_text(json.dumps(answers))
        process = subprocess.Popen([sys.executable, __file__, "bare", str(file), str(port)])
        url = f"http://127.0.0.1:{port}"
        arms = {kind: (Arm(stack.url, stack.processes["API"], stack.key), Arm(url, process.pid)) for kind in IN_A_ROUND}
        try:
            wait_until_ready(url, [process])
            for turn in range(rounds + 1):
                for kind, count in IN_A_ROUND.items():
                    for arm in arms[kind]:
                        if turn:
                            arm.turn([request(kind, arm.key)] * count, status=STATUS[kind])
                        else:  # warms up
                            ask(arm.url, [request(kind, arm.key)] * 32, 16, status=STATUS[kind])
        finally:
            stop([process])
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; 16 connections, client, server and loss worker share the cores")
    for backend in options.backend or BACKENDS:
        columns = ("requests", "requests/s", "p50 ms", "p99 ms", "CPU ms")
        print(f"\n{backend:16}" + "".join(f"{column:>12}" for column in columns))
        for kind, (ours, yardstick) in measure(backend, options.rounds).items():
            print(f"{kind}: {ours.rate / yardstick.rate:.3f} of the bare one's requests/s")
            print(ours.row("  Ratchet"))
            print(yardstick.row("  bare FastAPI"), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]))
    else:
        main()
