"""What a kill during a save leaves behind is mended before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.checkpoints.folder import (
    REFERENCE_FOLDER,
    TRACKER,
    iteration_folders,
    mend_checkpoint_folder,
    needed_references,
    run_id,
)
from megatron_sip.errors import DataError


def checkpoint(save: Path, iteration: int, *, complete: bool = True) -> Path:
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    if complete:
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def test_a_folder_that_was_not_committed_is_removed(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 15, complete=False)
    (tmp_path / TRACKER).write_text("10")
    done = mend_checkpoint_folder(tmp_path)
    assert kept.exists()
    assert not half.exists()
    assert len(done) == 1
    assert str(half) in done[0]


def test_whoever_goes_back_to_an_earlier_checkpoint_loses_nothing(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        checkpoint(tmp_path, iteration)
    half = checkpoint(tmp_path, 20, complete=False)
    for iteration in (0, 5, 12, 18):
        (tmp_path / REFERENCE_FOLDER / f"iter_{iteration:07d}").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("5")
    done = mend_checkpoint_folder(tmp_path)
    aside = tmp_path / "set_aside_after_0000005"
    assert sorted(iteration_folders(tmp_path)) == [5]
    assert sorted(iteration_folders(aside)) == [10, 15]
    assert (aside / "iter_0000015" / "__0_0.distcp").read_bytes() == b"weights"
    assert sorted(iteration_folders(tmp_path / REFERENCE_FOLDER)) == [0, 5, 18]  # 18 goes with no checkpoint
    assert sorted(iteration_folders(aside / REFERENCE_FOLDER)) == [12]
    assert not half.exists()
    for name in ("iter_0000010", "iter_0000015", "reference/iter_0000012"):
        assert any(str(tmp_path / name) in line and str(aside / name) in line for line in done)
    assert mend_checkpoint_folder(tmp_path) == []


def test_a_tracker_that_names_no_checkpoint_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    kept = [checkpoint(tmp_path, iteration) for iteration in (500, 1000)]
    half = checkpoint(tmp_path, 1500, complete=False)
    (tmp_path / TRACKER).write_text("50")
    with pytest.raises(DataError, match=r"names step 50, .* write one of 500, 1000 into it"):
        mend_checkpoint_folder(tmp_path)
    assert all(path.exists() for path in (*kept, half))


def test_going_back_twice_keeps_both_branches(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    (tmp_path / TRACKER).write_text("5")
    for _ in range(2):
        checkpoint(tmp_path, 10)
        mend_checkpoint_folder(tmp_path)
    assert (tmp_path / "set_aside_after_0000005" / "iter_0000010").is_dir()
    assert (tmp_path / "set_aside_after_0000005_2" / "iter_0000010").is_dir()


@pytest.mark.parametrize("content", [b"", b"1x", b"\xff\xfe", b"\0\0", "²".encode()])
def test_an_unreadable_tracker_is_set_to_the_newest_complete_checkpoint(tmp_path: Path, content: bytes) -> None:
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 15, complete=False)
    (tmp_path / TRACKER).write_bytes(content)
    mend_checkpoint_folder(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "10"
    assert not half.exists()


def test_a_tracker_without_any_checkpoint_is_removed(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("")
    mend_checkpoint_folder(tmp_path)
    assert not (tmp_path / TRACKER).exists()


def test_complete_checkpoints_without_a_tracker_are_adopted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    newest = checkpoint(tmp_path, 10)
    mend_checkpoint_folder(tmp_path)
    assert newest.exists()
    assert (tmp_path / TRACKER).read_text() == "10"


def test_a_converted_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / TRACKER).write_text("release")
    assert mend_checkpoint_folder(tmp_path) == []
    assert (tmp_path / TRACKER).read_text() == "release"


def test_a_sound_folder_is_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    (tmp_path / TRACKER).write_text("10")
    assert mend_checkpoint_folder(tmp_path) == []
    assert mend_checkpoint_folder(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("references", "checkpoints", "needed"),
    [
        ([0], [], {0}),
        ([0, 10, 20], [], {0, 10, 20}),  # nothing is committed yet
        ([0, 10, 20, 30], [15, 30], {10, 30}),
        ([0, 10, 20, 30], [15], {10, 20, 30}),  # the checkpoint of 25 may be on its way
        ([0, 3], [2, 4], {0, 3}),
    ],
)
def test_references_that_a_resume_can_ask_for(references: list[int], checkpoints: list[int], needed: set[int]) -> None:
    assert needed_references(references, checkpoints) == needed


iterations = st.sets(st.integers(0, 50), max_size=8)


@given(iterations, iterations, st.integers(0, 60))
def test_removing_the_others_changes_no_resume(references: set[int], checkpoints: set[int], coming: int) -> None:
    """Whichever checkpoint is resumed, of those there are or a later one, it gets the reference it would have got."""
    kept = needed_references(references, checkpoints)
    for checkpoint in [*checkpoints, max([coming, *checkpoints])]:
        before = max((i for i in references if i <= checkpoint), default=None)
        assert max((i for i in kept if i <= checkpoint), default=None) == before


def test_all_starts_of_a_run_have_its_name_and_no_other_run_has_it(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, again, other = (run_id(tmp_path / name) for name in ("one", "one", "other"))
    assert one == again != other
    assert one
