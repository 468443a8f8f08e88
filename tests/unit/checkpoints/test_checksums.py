"""What the disk gives back of a checkpoint is what was saved, or the damaged file is named."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.checkpoints import checksums
from megatron_sip.checkpoints.checksums import ChecksumWriter, damages, write_checksums
from megatron_sip.checkpoints.folder import TRACKER, iteration_folders, mend_checkpoint_folder
from megatron_sip.errors import DataError
from megatron_sip.training.checkpoints import require_whole_checkpoint, require_whole_weights

SHARD = "__0_0.distcp"


def save_checkpoint(folder: Path) -> Path:
    """A small one in Megatron's format, of two ranks by the names of its shards, without checksums."""
    dcp.save({"weight": torch.arange(600.0), "step": 3}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    shutil.copy(folder / SHARD, folder / "__1_0.distcp")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 5, 10 and 15 with checksums, a reference, and a tracker at 15."""
    for folder in [tmp_path / f"iter_{step:07d}" for step in (5, 10, 15)] + [tmp_path / "reference/iter_0000000"]:
        folder.mkdir(parents=True)
        save_checkpoint(folder)
        for rank in (0, 1):
            write_checksums(folder, rank)
    (tmp_path / TRACKER).write_text("15")
    return tmp_path


def shard(run: Path, step: int) -> Path:
    return run / f"iter_{step:07d}" / SHARD


def flip(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


class Alone:
    """The only rank."""

    def all_gather_from_leaders(self, mine: object) -> list[object]:
        return [mine]

    all_gather = all_gather_from_leaders


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(Path(name))
        for rank in (0, 1):
            write_checksums(folder, rank)
        yield folder


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([SHARD, "__1_0.distcp", ".metadata", "metadata.json"]), st.floats(0, 0.999), st.integers(0, 7))
def test_every_flipped_bit_and_every_cut_is_found_by_one_of_the_ranks_and_named(
    sound: Path, name: str, place: float, bit: int
) -> None:
    path = sound / name
    content = path.read_bytes()
    at = int(place * len(content))
    try:
        for damaged in (content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :], content[:at]):
            path.write_bytes(damaged)
            for parts in (1, 3):
                found = [line for part in range(parts) for line in damages(sound, part, parts)]
                assert any(line.startswith(f"{path} ") for line in found)
    finally:
        path.write_bytes(content)
    assert damages(sound) == []


def test_checkpoints_without_checksums_load_and_their_cuts_are_found(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    assert damages(folder) == []
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])
    assert damages(folder) == [f"{folder / SHARD} has {len(content) - 1:,} bytes instead of {len(content):,}"]
    (folder / SHARD).unlink()
    assert damages(folder) == [f"{folder / SHARD} is missing"]


def test_a_damaged_checkpoint_is_refused_with_its_file_and_the_one_before_it(run: Path) -> None:
    require_whole_checkpoint(run, Alone(), 0, last_whole=False)
    flip(shard(run, 15))
    with pytest.raises(
        DataError, match=rf"step 15 is damaged: {shard(run, 15)} has another .* step 10: .*--load-last-whole"
    ):
        require_whole_checkpoint(run, Alone(), 0, last_whole=False)
    assert sorted(iteration_folders(run)) == [5, 10, 15]


def test_load_last_whole_goes_back_to_the_newest_whole_one_and_loses_nothing(run: Path) -> None:
    flip(shard(run, 15))
    shard(run, 10).write_bytes(shard(run, 10).read_bytes()[:-3])
    require_whole_checkpoint(run, Alone(), 0, last_whole=True)
    assert (run / TRACKER).read_text() == "5"
    assert sorted(iteration_folders(run)) == [5]
    assert (run / "set_aside_after_0000010" / "iter_0000015" / SHARD).exists()
    assert (run / "set_aside_after_0000005" / "iter_0000010" / SHARD).exists()
    flip(shard(run, 5))
    with pytest.raises(DataError, match=rf"step 5 is damaged, and there is none before it: {shard(run, 5)}"):
        require_whole_checkpoint(run, Alone(), 0, last_whole=True)


def test_a_damaged_reference_is_found_with_the_checkpoint_that_goes_with_it(run: Path) -> None:
    path = run / "reference/iter_0000000" / SHARD
    flip(path)
    for last_whole in (False, True):  # which would move one checkpoint after the other aside, for nothing
        with pytest.raises(
            DataError, match=f"reference of step 15 is damaged, and those before it have the same: {path}"
        ):
            require_whole_checkpoint(run, Alone(), 0, last_whole=last_whole)
    assert (run / TRACKER).read_text() == "15"
    assert not list(run.glob("set_aside*"))


def test_a_damaged_reference_that_earlier_steps_do_without_goes_aside_with_its_checkpoints(run: Path) -> None:
    shutil.copytree(run / "reference/iter_0000000", run / "reference/iter_0000012")
    flip(run / "reference/iter_0000012" / SHARD)
    with pytest.raises(DataError, match=r"step 15 is damaged: .*reference/iter_0000012.*--load-last-whole"):
        require_whole_checkpoint(run, Alone(), 0, last_whole=False)
    require_whole_checkpoint(run, Alone(), 0, last_whole=True)
    assert (run / TRACKER).read_text() == "10"


@pytest.mark.parametrize("name", ["metadata.json", ".metadata"])
def test_a_checkpoint_with_empty_metadata_is_not_complete(run: Path, name: str) -> None:
    (run / "iter_0000015" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"names step 15, of which there is no complete .* 5, 10 .*--load-last-whole"):
        mend_checkpoint_folder(run)
    mend_checkpoint_folder(run, last_whole=True)
    require_whole_checkpoint(run, Alone(), 0, last_whole=True)
    assert (run / TRACKER).read_text() == "10"
    assert (run / "set_aside_after_0000010" / "iter_0000015").is_dir()


@pytest.mark.parametrize("lost", ["metadata.json", ".metadata", "folder"])
@pytest.mark.parametrize("last_whole", [True, False])
def test_an_only_checkpoint_that_is_not_complete_is_named_before_it_is_loaded(
    tmp_path: Path, lost: str, last_whole: bool
) -> None:
    folder = tmp_path / "iter_0000005"
    folder.mkdir()
    save_checkpoint(folder)
    (tmp_path / TRACKER).write_text("5")
    if lost == "folder":
        shutil.rmtree(folder)
    else:
        (folder / lost).write_bytes(b"")
    assert mend_checkpoint_folder(tmp_path, last_whole=last_whole) == []
    with pytest.raises(DataError, match=f"step 5 is damaged, and there is none before it: {folder} is missing, or its"):
        require_whole_checkpoint(tmp_path, Alone(), 0, last_whole=last_whole)


def test_pretrained_weights_are_looked_at_as_well(run: Path) -> None:
    require_whole_weights(run, Alone(), 0)
    flip(shard(run, 15))
    with pytest.raises(DataError, match=f"--pretrained-checkpoint {run} is damaged: {shard(run, 15)}"):
        require_whole_weights(run, Alone(), 0)
    release = save_checkpoint(run / "converted" / "release")
    (run / "converted" / TRACKER).write_text("release")
    (release / SHARD).write_bytes(b"")
    with pytest.raises(DataError, match=str(release / SHARD)):
        require_whole_weights(run / "converted", Alone(), 0)


def test_checksums_are_written_in_the_background_and_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [save_checkpoint(tmp_path / f"iter_000000{step}") for step in (5, 6)]
    writer = ChecksumWriter(1)
    for folder in folders:
        writer.begin(folder)
    writer.finish()
    for folder in folders:
        assert [path.name for path in folder.glob("checksums_*")] == ["checksums_00001.json"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write_atomically", full)
    writer.begin(folders[0])
    writer.finish()
    assert f"no checksums of {folders[0]}" in caplog.text
