from pathlib import Path

import pytest

from service.store.blobs import Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "a/./b", "a\\b", "a\0b"])
def test_paths_that_leave_the_store_are_refused(blobs: Blobs, path: str) -> None:
    for act in (blobs.path, blobs.delete):
        with pytest.raises(ValueError):
            act(path)


def test_a_link_that_leads_out_is_refused(blobs: Blobs, tmp_path: Path) -> None:
    blobs.root.mkdir()
    (blobs.root / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        blobs.path("out/secret")


def test_a_folder_becomes_a_blob_whole(blobs: Blobs) -> None:
    folder = blobs.temporary_dir()
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("1")
    blobs.commit_dir(folder, "checkpoints/job_1/ckpt_1")
    assert blobs.path("checkpoints/job_1/ckpt_1/deep/a.txt").read_text() == "1"
    assert not folder.exists()


def test_a_blob_is_never_overwritten(blobs: Blobs) -> None:
    for text in ("first", "second"):
        file = blobs.temporary_dir() / "rows"
        file.write_text(text)
        if text == "first":
            blobs.commit_file(file, "datasets/ds_1.jsonl")
        else:
            with pytest.raises(FileExistsError):
                blobs.commit_file(file, "datasets/ds_1.jsonl")
    assert blobs.path("datasets/ds_1.jsonl").read_text() == "first"


def test_links_do_not_become_blobs(blobs: Blobs) -> None:
    folder = blobs.temporary_dir()
    (folder / "a").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        blobs.commit_dir(folder, "checkpoints/x")
    assert not blobs.path("checkpoints/x").exists()


def test_delete_takes_empty_parents_along_and_may_be_repeated(blobs: Blobs) -> None:
    for name in ("ckpt_1", "ckpt_2"):
        blobs.commit_dir(blobs.temporary_dir(), f"checkpoints/job_1/{name}")
    blobs.delete("checkpoints/job_1/ckpt_1")
    blobs.delete("checkpoints/job_1/ckpt_1")
    assert blobs.path("checkpoints/job_1/ckpt_2").is_dir()
    blobs.delete("checkpoints/job_1/ckpt_2")
    assert not blobs.path("checkpoints/job_1").exists()
    assert list((blobs.root / "tmp").iterdir()) == []


def test_unclaimed_names_the_topmost_blobs_that_no_row_knows(blobs: Blobs) -> None:
    for path in ("checkpoints/job_1/ckpt_1", "checkpoints/job_1/ckpt_2", "checkpoints/job_2/ckpt_3"):
        folder = blobs.temporary_dir()
        (folder / "file").touch()
        blobs.commit_dir(folder, path)
    assert set(blobs.unclaimed({"checkpoints/job_1/ckpt_1"})) == {"checkpoints/job_1/ckpt_2", "checkpoints/job_2"}


def test_only_temporary_things_can_be_discarded(blobs: Blobs) -> None:
    folder = blobs.temporary_dir()
    blobs.discard(folder)
    assert not folder.exists()
    with pytest.raises(ValueError):
        blobs.discard(blobs.commit_dir(blobs.temporary_dir(), "checkpoints/x"))


def test_an_attempt_removes_what_earlier_ones_left_and_nothing_else(blobs: Blobs) -> None:
    earlier = [blobs.temporary_dir(("job_1", attempt)) for attempt in (1, 2, 9)]
    (earlier[0] / "weights").write_bytes(b"half")
    kept = [blobs.temporary_dir(attempt) for attempt in [("job_1", 10), ("job_1", 11), ("job_10", 1), ("job_2", 1), None]]
    blobs.discard_before("job_1", 10)
    assert [path.exists() for path in earlier] == [False] * 3
    assert [path.exists() for path in kept] == [True] * 5
