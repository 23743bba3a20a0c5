"""Nothing of ours reads a pickle, or runs text as code. What stands here as allowed is read from our own process alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("service", "workers", "ratchet_client", "migrations")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load"}
BUILTINS = {"eval", "exec"}
# The grading sandbox: a child reads what its own parent writes to it, over a pipe that nobody else has. The answers, which
# come from evaluated text, are JSON. The ranks of a job, and the child that makes its procedural rows, are processes of one
# program, over sockets and pipes that nobody else has.
ALLOWED = {
    ("service/rewards/sandbox.py", "pickle"),
    ("service/rewards/child.py", "pickle"),
    ("service/jobs/gym_rows.py", "pickle"),
    ("workers/ranks/line.py", "pickle"),
}


def dangerous(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS | BUILTINS or (name == "yaml.load" and "Loader" not in {one.arg for one in node.keywords}):
                yield name
            yield from (f"{name}({word.arg}=True)" for word in node.keywords if _unsafe(word))


def _unsafe(word: ast.keyword) -> bool:
    return word.arg in ("allow_pickle", "trust_remote_code") and not (
        isinstance(word.value, ast.Constant) and word.value.value is False
    )


def test_nothing_of_ours_reads_a_pickle_or_runs_text() -> None:
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    assert len(files) > 100
    found = {(path.relative_to(REPOSITORY).as_posix(), name) for path in files for name in dangerous(path.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "import yaml\nyaml.load('x')",
        "f(allow_pickle=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert list(dangerous(source))


def test_what_is_safe_is_not() -> None:
    safe = "import yaml\nyaml.load('x', Loader=Ours)\nf(trust_remote_code=False)\njson.load(f)"
    assert list(dangerous(safe)) == []


def test_celery_takes_json_only() -> None:
    from service.doorbell import celery_app
    from service.settings import Settings

    conf = celery_app(Settings()).conf
    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
