"""Runs docker-compose.yml for real and trains a small job in it: `make stack-test`.

Works with a Docker engine, and with Podman. Where no registry can be reached, the images that are otherwise pulled are
made on the spot (offline.py). At the end containers, networks and volumes are gone; images stay, to make the next run short.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import engines
import offline
import smoke

ROOT = Path(__file__).parents[2]
PROJECT = "ratchet-stack-test"
SERVICES = ("postgres", "redis", "migrate", "api", "worker", "losses")
START_TIMEOUT_S = 240
NO_TORCH = "import importlib.util, os; assert importlib.util.find_spec('torch') is None; assert os.getuid() != 0"


@dataclass(frozen=True)
class Compose:
    """Docker Compose on this project's file, with an override that only this machine needs."""

    command: list[str]
    environment: Mapping[str, str]
    override: Path

    def run(self, *arguments: str, check: bool = True) -> None:
        files = ["--file", str(ROOT / "docker-compose.yml"), "--file", str(self.override)]
        command = [*self.command, "--project-name", PROJECT, "--env-file", os.devnull, *files, *arguments]
        subprocess.run(command, env={**os.environ, **self.environment}, check=check)


def main() -> None:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="ratchet-stack-")))
        engine = stack.enter_context(engines.find(PROJECT, scratch))
        images = pulled_images(engine, scratch)
        for target in ("api", "worker"):
            say(f"building the image {target}")
            image = f"localhost/{PROJECT}/{target}"
            engine.build(ROOT, image, target=target, arguments={"BASE_IMAGE": images["BASE_IMAGE"]})
            images[f"RATCHET_{target.upper()}_IMAGE"] = image
        engine.run(images["RATCHET_API_IMAGE"], "python", "-c", NO_TORCH)

        port, key = free_port(), f"tml-{secrets.token_urlsafe(32)}"
        override = scratch / "override.json"
        override.write_text(json.dumps({"services": dict.fromkeys(SERVICES, engine.service_options)}))
        compose = Compose(engine.compose, {**engine.environment, **images, **settings(port, key)}, override)
        stack.callback(compose.run, "down", "--volumes", "--timeout", "10", check=False)
        try:
            say("starting the stack")
            compose.run("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(START_TIMEOUT_S))
            exercise(compose, f"http://127.0.0.1:{port}", key)
        except BaseException:
            compose.run("ps", "--all", check=False)
            compose.run("logs", "--no-color", "--tail", "100", check=False)
            raise
    say("the stack works")


def exercise(compose: Compose, url: str, key: str) -> None:
    smoke.refuses_strangers(url)
    user = smoke.User(url, key)
    say("asking for a loss")
    smoke.answers_a_loss(user)
    dataset_id = user.upload_rows()
    say("training a small job")
    smoke.trains_a_job(user, dataset_id)
    say("stopping the worker in the middle of another")
    smoke.survives_a_restart(user, dataset_id, lambda: compose.run("stop", "worker"), lambda: compose.run("start", "worker"))


def settings(port: int, key: str) -> dict[str, str]:
    """What a person writes into .env, drawn anew for each run."""
    return {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "REDIS_PASSWORD": secrets.token_hex(24),
        "RATCHET_BOOTSTRAP_KEY": key,
        "RATCHET_PUBLISH": f"127.0.0.1:{port}",
    }


def pulled_images(engine: engines.Engine, scratch: Path) -> dict[str, str]:
    """Variables of the compose file that name images which are not ours. What they leave out has its default there."""
    official = "docker.io/library/python:3.11-slim-bookworm"
    if engine.pull(official):
        return {"BASE_IMAGE": official}
    say("no registry can be reached: making the base image, postgres and redis here")
    return offline.make_images(engine, scratch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (engines.NoEngine, offline.CannotMake, smoke.Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"stack-test: {error}")
