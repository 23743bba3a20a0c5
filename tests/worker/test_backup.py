"""A copy of a live system goes on where it was, and ends with the same weights."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from zipfile import ZipFile

import pytest
import torch
from pydantic import SecretStr
from sqlalchemy import func, select, text

from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease
from service.local import backup as backups
from service.local.backup import BackupFailed, backup, restore
from service.settings import Settings
from service.spec.job import CheckpointsSpec
from service.store.session import Store, make_engine, open_store, upgrade
from service.store.tables import Base, Budget, Checkpoint, Event, Metric, Rollout, Worker
from workers import runner
from workers.policy.checkpoint import verify
from workers.tenure.keeper import Keeper


@pytest.fixture
def elsewhere(settings: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Another place of the same kind, with nothing in it."""
    url = None
    if settings.sql_url.startswith("postgresql"):
        new: Callable[[], str] = request.getfixturevalue("new_postgres_database")
        url = SecretStr(new())
    return settings.model_copy(update={"data_dir": tmp_path / "elsewhere", "database_url": url})


def rows(settings: Settings, query: Any, *, scalar: bool = True) -> list[Any]:
    store = open_store(settings)
    with store.begin(readonly=True) as session:
        found = list(session.scalars(query) if scalar else session.execute(query))
    store.close()
    return found


@pytest.mark.timeout(400)
def test_a_live_job_goes_on_from_the_copy_and_ends_with_the_same_weights(
    stack: Any, specs: Any, elsewhere: Settings, tmp_path: Path
) -> None:
    stack.start_worker()
    # Each checkpoint is removed as soon as there is another.
    job_id = stack.submit(specs.rl(limits={"max_steps": 60}, checkpoints={"every_steps": 1, "keep_last": 1})).id
    stack.until(job_id, lambda job: job.step >= 3)
    facts = backup(stack.settings, tmp_path / "copy")
    assert stack.job(job_id).status == "running"
    assert facts["blobs"] >= 1 and facts["lost"] == []
    undisturbed = stack.succeeded(job_id)

    assert restore(elsewhere, tmp_path / "copy")["queued"] == [job_id]
    for row in rows(elsewhere, select(Checkpoint).where(Checkpoint.deleted_at.is_(None))):
        verify(elsewhere.blobs_dir / row.path, row.manifest_sha256)
    here = elsewhere.model_copy(update={"redis_url": stack.settings.redis_url, "device": "cpu"})
    copied = type(stack)(here, tmp_path / "elsewhere")
    try:
        resting = copied.job(job_id)
        assert (resting.status, resting.status_reason, resting.crashes) == ("queued", "restored", 0)
        assert resting.checkpoint_id is not None and 0 < resting.step < 60
        claimed = leases.claim(copied.store, here, "w", {"any"})
        assert claimed is not None
        with Keeper(copied.store, here, copied.doorbell) as keeper:
            runner.run(keeper, *claimed)  # as a worker's training process does
        job = copied.job(job_id)
        assert job.status == "succeeded", job.error
        ours, theirs = copied.weights(job), stack.weights(undisturbed)
        assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        with copied.store.begin(readonly=True) as session:
            seqs = list(session.scalars(select(Event.seq).where(Event.job_id == job_id).order_by(Event.seq)))
        assert seqs == list(range(1, job.last_event + 1))
    finally:
        copied.stop()


# ---------------------------------------------------------------- without a worker


def save(store: Store, lease: Lease, step: int) -> str:
    path = f"checkpoints/{lease.job_id}/{new_id('ckpt')}"
    folder = store.blobs.temporary_dir()
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(str(step))
    store.blobs.commit_dir(folder, path)
    row = CheckpointRow(path.rsplit("/", 1)[1], step, "full", {"source": "tiny"}, path, 2, "0" * 64, {}, True, False)
    leases.commit_checkpoint(store, lease, row)
    return path


@pytest.fixture
def held(stack: Any, specs: Any) -> Lease:
    stack.submit(specs.supervised())
    claimed = leases.claim(stack.store, stack.settings, "w", {"any"})
    assert claimed is not None
    return claimed[0]


def test_what_retention_removes_while_it_is_copied_costs_another_round(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, copy_blobs, removed = stack.store, backups._copy_blobs, []
    save(store, held, 1)

    def step_on(source: Any, copy: Any, paths: set[str]) -> None:
        """Twice, right before blobs are copied, the job saves, and its retention takes away the one before."""
        if len(removed) < 2:
            save(store, held, len(removed) + 2)
            removed.extend(leases.retain(store, held, CheckpointsSpec(keep_last=1)))
            for path in removed:
                store.blobs.delete(path)
        copy_blobs(source, copy, paths)

    monkeypatch.setattr(backups, "_copy_blobs", step_on)
    facts = backup(stack.settings, tmp_path / "copy")
    assert (facts["rounds"], facts["blobs"], facts["lost"], len(removed)) == (2, 1, [], 2)
    restore(elsewhere, tmp_path / "copy")
    [row] = rows(elsewhere, select(Checkpoint).where(Checkpoint.deleted_at.is_(None)))
    assert (elsewhere.blobs_dir / row.path / "model" / "weights").read_text() == "3"
    assert [path.name for path in (tmp_path / "copy" / "blobs" / "checkpoints" / held.job_id).iterdir()] == [row.id]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_blob_that_was_lost_before_is_named_and_the_rest_is_copied(stack: Any, held: Lease, tmp_path: Path) -> None:
    lost, kept = save(stack.store, held, 1), save(stack.store, held, 2)
    stack.store.blobs.delete(lost)
    assert backup(stack.settings, tmp_path / "copy")["lost"] == [lost]
    assert (tmp_path / "copy" / "blobs" / kept / "model" / "weights").read_text() == "2"


ODD = ["", " ", "NULL", "\\N", "\\.", "a\n\\.\nb", 'say "x", y', "\r\n", "ä🙂\u2028", "\\x41"]


def test_every_row_comes_back_as_it_was(stack: Any, specs: Any, elsewhere: Settings, tmp_path: Path) -> None:
    job = stack.submit(specs.supervised(name="n", metadata={odd or "-": [odd, 0.1, None] for odd in ODD}))
    now = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
    numbers = [0.1, 1e-308, -1 / 3, 1.7e308, None, -0.0]
    with stack.store.begin() as session:
        session.add_all(
            Rollout(
                job_id=job.id, split="train", step=step, group_index=0, prompt=odd, reference=odd or None,
                samples=[{"text": odd}], attempt=1, created_at=now,
            )
            for step, odd in enumerate(ODD)
        )  # fmt: skip
        session.add_all(
            Metric(job_id=job.id, name="x", step=step, value=number, attempt=2**40, created_at=now)
            for step, number in enumerate(numbers)
        )
    backup(stack.settings, tmp_path / "copy")
    assert restore(elsewhere, tmp_path / "copy")["queued"] == []
    for table in Base.metadata.sorted_tables:
        before, after = (rows(settings, select(table), scalar=False) for settings in (stack.settings, elsewhere))
        assert sorted(map(repr, after)) == sorted(map(repr, before)), table.name
        assert before or table.name not in ("jobs", "events", "rollouts", "metrics")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_damaged_tables_and_those_of_another_version_are_refused(stack: Any, elsewhere: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    engine = make_engine(stack.settings.sql_url)
    with engine.begin() as connection:
        ours = connection.scalar(text("SELECT version_num FROM alembic_version"))
        connection.execute(text("UPDATE alembic_version SET version_num = 'other'"))
    with pytest.raises(BackupFailed, match="version other"):
        backup(stack.settings, tmp_path / "none")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :ours"), {"ours": ours})
    engine.dispose()
    backup(stack.settings, copy)
    sound = (copy / "ratchet.zip").read_bytes()
    at = sound.index(b"jobs.csv") + 40  # behind the name and the sizes
    (copy / "ratchet.zip").write_bytes(sound[:at] + bytes([sound[at] ^ 255]) + sound[at + 1 :])
    with pytest.raises(BackupFailed, match="damaged"):
        restore(elsewhere, copy)
    with ZipFile(copy / "ratchet.zip", "w") as archive:
        archive.writestr("revision", "from the future")
    with pytest.raises(BackupFailed, match="another version"):
        restore(elsewhere, copy)
    (copy / "ratchet.zip").write_bytes(sound)
    restore(elsewhere, copy)  # what was refused left nothing behind


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_database_of_a_newer_version_is_refused_and_leaves_nothing(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path
) -> None:
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "ratchet.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    with pytest.raises(BackupFailed, match=r"made by another version of ratchet, take that one: .*9999_from_the_future"):
        restore(elsewhere, tmp_path / "copy")
    assert list(elsewhere.data_dir.rglob("*")) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_nothing_is_overwritten_and_half_a_backup_is_none(stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    save(stack.store, held, 1)
    backup(stack.settings, copy)
    for target, folder, why in (
        (stack.settings, copy, "not empty"),  # the data directory
        (stack.settings.model_copy(update={"data_dir": tmp_path / "new"}), copy, "exists"),  # the database
    ):
        with pytest.raises(BackupFailed, match=why):
            restore(target, folder)
    with pytest.raises(BackupFailed, match="not empty"):
        backup(stack.settings, copy)
    assert json.loads((copy / "backup.json").read_text())["blobs"] == 1
    (copy / "backup.json").unlink()
    with pytest.raises(BackupFailed, match="no finished backup"):
        restore(elsewhere, copy)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_folder_in_which_no_system_ran_is_told_and_nothing_is_made(settings: Settings, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"data_dir": tmp_path / "no" / "such", "database_url": None})
    with pytest.raises(BackupFailed, match=r"no system has run in .*such: .*ratchet\.db is not there"):
        backup(nowhere, tmp_path / "copy")
    assert not (tmp_path / "no").exists() and not (tmp_path / "copy").exists()


def test_time_between_backup_and_restore_is_nobody_s(stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path) -> None:
    """An attempt that ran when the copy was made ended then, and not weeks later when somebody needs it."""
    facts = backup(stack.settings, tmp_path / "copy")
    with stack.store.begin(readonly=True) as session:
        claimed_at = backups.jobs.get(session, "default", held.job_id).claimed_at
    assert claimed_at is not None
    made_at = claimed_at + timedelta(seconds=40)  # within its lease: a mark that nothing else could leave
    (tmp_path / "copy" / "backup.json").write_text(json.dumps({**facts, "made_at": made_at.isoformat()}))
    restore(elsewhere, tmp_path / "copy")
    store = open_store(elsewhere)
    with store.begin(readonly=True) as session:
        job = backups.jobs.get(session, "default", held.job_id)
        assert session.scalar(select(func.count()).select_from(Worker)) == 0
    store.close()
    assert job.run_s == pytest.approx(40, abs=0.001)


@pytest.mark.parametrize("breaks", ["upgrade", "_settle", "open_store"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_restore_that_fails_or_is_stopped_leaves_nothing_behind(
    stack: Any,
    held: Lease,
    elsewhere: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: str,
    error: BaseException,
) -> None:
    """Not in its middle, and not at its end; so it can be repeated in the same place."""
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(backups, breaks, Mock(side_effect=error))
        with pytest.raises((BackupFailed, KeyboardInterrupt)) as failed:
            restore(elsewhere, tmp_path / "copy")
    if isinstance(error, OSError):
        assert str(failed.value) == f"{elsewhere.data_dir} cannot be written: No space left on device"
    assert list(elsewhere.data_dir.rglob("*")) == []
    (elsewhere.blobs_dir / ".restoring" / "checkpoints").mkdir(parents=True)  # of one that was killed
    restore(elsewhere, tmp_path / "copy")
    assert len(rows(elsewhere, select(Checkpoint))) == 1 and not (elsewhere.blobs_dir / ".restoring").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_service_that_was_started_while_the_blobs_were_copied_keeps_what_it_has(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    copy_back = backups._copy_back

    def start_meanwhile(*args: Any) -> None:
        copy_back(*args)
        upgrade(elsewhere.sql_url)
        other = open_store(elsewhere)
        with other.begin() as session:
            session.add(Budget(project="mine", since="2026-01-01", updated_at=other.now()))
        other.close()

    monkeypatch.setattr(backups, "_copy_back", start_meanwhile)
    if not links:
        monkeypatch.setattr(backups.os, "link", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    with pytest.raises(BackupFailed, match=r"(exists|is not empty); a restore (makes|takes) a new"):
        restore(elsewhere, tmp_path / "copy")
    assert rows(elsewhere, select(Budget.project)) == ["mine"]
    assert rows(elsewhere, select(Checkpoint)) == []
    assert [path.name for path in elsewhere.data_dir.rglob("*") if not path.name.startswith("ratchet.db")] == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_blobs_may_be_a_link_to_another_disk(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a mount point: the folder itself is never replaced, and never removed if it was there before."""
    kept, disk = save(stack.store, held, 1), tmp_path / "disk"
    backup(stack.settings, tmp_path / "copy")
    disk.mkdir()
    elsewhere.data_dir.mkdir()
    elsewhere.blobs_dir.symlink_to(disk)
    with monkeypatch.context() as patch:
        patch.setattr(backups, "_settle", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(BackupFailed, match="No space left"):
            restore(elsewhere, tmp_path / "copy")
    assert list(disk.iterdir()) == [] and elsewhere.blobs_dir.is_symlink()
    restore(elsewhere, tmp_path / "copy")
    assert (disk / kept / "model" / "weights").read_text() == "1" and elsewhere.blobs_dir.is_symlink()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("step", ["copytree", "_restore_sqlite"])
def test_blobs_of_another_that_come_meanwhile_are_not_mixed_and_not_taken_back(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    module = backups.shutil if step == "copytree" else backups
    real, theirs = getattr(module, step), elsewhere.blobs_dir / ("datasets" if step == "copytree" else "checkpoints") / "theirs"

    def write_first(*args: Any) -> None:
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_text("theirs")
        real(*args)

    monkeypatch.setattr(module, step, write_first)
    monkeypatch.setattr(backups, "_settle", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(BackupFailed, match="blobs is not empty" if step == "copytree" else "No space left"):
        restore(elsewhere, tmp_path / "copy")
    assert [path for path in elsewhere.data_dir.rglob("*") if path.is_file()] == [theirs]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_system_without_links_takes_a_restore(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    monkeypatch.setattr(backups.os, "link", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    restore(elsewhere, tmp_path / "copy")
    assert len(rows(elsewhere, select(Checkpoint))) == 1 and not list(elsewhere.data_dir.glob("*.restoring"))


def test_blobs_that_cannot_be_written_are_told_with_the_reason_of_the_first(
    stack: Any, held: Lease, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(stack.store, held, 1)
    backup(stack.settings, tmp_path / "copy")
    failed = backups.shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "another")])
    monkeypatch.setattr(backups.shutil, "copytree", Mock(side_effect=failed))
    full, reason = tmp_path / "full", r"could not be copied: \[Errno 28\] No space left on device: 'b'$"
    with pytest.raises(BackupFailed, match=f"^there is no backup: .* {reason}"):
        backup(stack.settings, full)
    with pytest.raises(BackupFailed, match=f"^the blobs {reason}"):
        restore(elsewhere, tmp_path / "copy")


@pytest.mark.parametrize(
    ("breaks", "error", "told"),
    [
        ("_copy_blobs", OSError(28, "No space left on device"), "copy cannot be written: No space left on device"),
        (
            "live_paths",
            sqlite3.OperationalError("database or disk is full"),
            "the database could not be copied: database or disk",
        ),
        ("_write", OSError(28, "No space left on device"), "copy cannot be written: No space left on device"),
        ("_write", KeyboardInterrupt(), None),
    ],
)
def test_a_backup_that_fails_or_is_stopped_says_that_it_is_none_and_leaves_nothing(
    stack: Any,
    held: Lease,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: str,
    error: BaseException,
    told: str | None,
) -> None:
    save(stack.store, held, 1)
    copy, real, there = tmp_path / "copy", getattr(backups, breaks), told is None
    if there:
        copy.mkdir()  # empty, and it stays

    def break_off(*args: Any) -> None:
        real(*args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(backups, breaks, break_off)
        with pytest.raises(KeyboardInterrupt if told is None else BackupFailed) as failed:
            backup(stack.settings, copy)
    if told is not None:
        assert str(failed.value).startswith("there is no backup: ") and told in str(failed.value)
    assert copy.exists() == there and not (there and list(copy.iterdir()))
    assert backup(stack.settings, copy)["blobs"] == 1  # it can be repeated in the same place
