"""Interrupted trainings. tests/kills.py does the same with many real kills."""

import errno
import fcntl
import os
import re
import subprocess
import sys

import kills
import numpy as np
import pytest
import torch
from helpers import new_run, protocol, squares

from compendium import checkpoints, paths
from focalcal import feed, train

SETTINGS = protocol(epochs=6, milestones=[3, 5])


@pytest.fixture(scope="module")
def images():
    return feed.splits(squares(100, 40, 40), torch.device("cpu"))


def kept(run, images, folder):
    """The rows of a training that goes on from its checkpoints and writes new ones."""
    checkpoints.resume([run], [folder])
    return checkpoints.keep(train.train_together([run], images, 0), [run], [folder])


def interrupted(images, folder, after):
    """Train until an epoch is saved, then stop as an exception in the notebook would."""
    rows = kept(new_run("adafocal", SETTINGS), images, folder)
    for _ in range(after):
        next(rows)
    rows.close()


def finished(images, folder):
    run = new_run("adafocal", SETTINGS)
    for _ in kept(run, images, folder):
        pass
    return run


@pytest.fixture(scope="module")
def whole(images):
    """The training without checkpoints."""
    run = new_run("adafocal", SETTINGS)
    for _ in train.train(run, images, 0):
        pass
    return run


def same(run, other):
    assert repr(run.history) == repr(other.history) and len(run.history) == SETTINGS.epochs
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in run.tensors().items())
    assert all(np.array_equal(run.gradients[epoch], other.gradients[epoch]) for epoch in train.gradient_epochs(6))


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(images, whole, tmp_path, after):
    interrupted(images, tmp_path, after)
    (tmp_path / ".part-7-00009-1234abcd.safetensors").write_bytes(b"killed while writing this")
    assert list(checkpoints.epochs(tmp_path)) == [after - 1, after][after == 1 :]
    same(whole, finished(images, tmp_path))


@pytest.mark.whole
def test_real_kills(capfd):
    kills.main(2, seed=1)
    assert "2 kills; 10 files, all equal; left over: []" in capfd.readouterr().out


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(images, whole, tmp_path, capsys, damage):
    interrupted(images, tmp_path, 4)
    newest = checkpoints.epochs(tmp_path)[4]
    newest.write_bytes(damage(newest.read_bytes()))
    run = new_run("adafocal", SETTINGS)
    checkpoints.resume([run], [tmp_path])
    assert len(run.history) == 3 and repr(run.history) == repr(whole.history[:3])
    assert f"checkpoint {newest.name} is damaged" in capsys.readouterr().err
    assert newest.with_suffix(".damaged").is_file() and list(checkpoints.epochs(tmp_path)) == [3]
    same(whole, finished(images, tmp_path))


def test_runs_together_resume_where_all_of_them_are(images, tmp_path):
    names = ["focal", "adafocal"]
    folders = [tmp_path / name for name in names]

    def resumed():
        runs = [new_run(name, SETTINGS) for name in names]
        checkpoints.resume(runs, folders)
        return runs

    runs = resumed()
    rows = checkpoints.keep(train.train_together(runs, images, 0), runs, folders)
    for _ in range(3):
        next(rows)
    rows.close()
    assert [len(run.history) for run in resumed()] == [3, 3]
    checkpoints.epochs(folders[1])[3].unlink()  # as if killed between the two files of an epoch
    assert [len(run.history) for run in resumed()] == [2, 2]
    checkpoints.epochs(folders[1])[2].unlink()
    assert [len(run.history) for run in resumed()] == [0, 0]


def test_what_one_of_them_was_ahead_goes_with_the_first_epoch_together(images, tmp_path):
    folders = [tmp_path / "ahead", tmp_path / "behind"]
    ahead, *together = (new_run("focal", SETTINGS) for _ in range(3))
    for _ in checkpoints.keep(train.train(ahead, images, 0), [ahead], folders[:1]):
        pass
    next(checkpoints.keep(train.train_together(together, images, 0), together, folders))
    assert [list(checkpoints.epochs(folder)) for folder in folders] == [[1], [1]]


def test_two_processes_on_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCAL_SCRATCH", str(tmp_path))
    code = "from compendium import checkpoints\nwith checkpoints.claim('s', 'brier', 0, 'k'): print('in')"
    with checkpoints.claim("s", "brier", 0, "k"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with checkpoints.claim("s", "brier", 1, "k") as folder:
            assert folder == tmp_path / "s/brier-1/k"  # another seed is free
    assert "RuntimeError: Another process is training s, brier, seed 0; wait for it or stop it" in second.stderr
    assert second.returncode == 1 and second.stdout == ""
    with checkpoints.claim("s", "brier", 0, "k") as folder:
        assert folder.is_dir()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])  # none at all; NFS whose lock daemon is not there
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def no_lock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setenv("FOCALCAL_SCRATCH", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", no_lock)
    message = re.escape(f"file system of {tmp_path}/s has no locks")
    with pytest.raises(RuntimeError, match=message), checkpoints.claim("s", "brier", 0, "k"):
        pass


def test_the_scratch_folder_goes_only_when_all_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FOCALCAL_SCRATCH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), checkpoints.claim("s", "brier", 0, "k") as folder:
        checkpoints.write(folder, 1, {"x": torch.ones(2)}, [])
        raise KeyboardInterrupt
    assert list(checkpoints.epochs(folder)) == [1]
    monkeypatch.setenv("FOCALCAL_KEEP_CHECKPOINTS", str(tmp_path / "where"))
    with checkpoints.claim("s", "brier", 0, "k"):
        pass
    assert list(checkpoints.epochs(folder)) == [1] and (tmp_path / "where").read_text() == str(folder)
    monkeypatch.delenv("FOCALCAL_KEEP_CHECKPOINTS")
    assert capsys.readouterr().err == ""
    with checkpoints.claim("s", "brier", 0, "other"):  # with other settings, data or code
        assert f"are not used; delete them if you like: {folder}\n" in capsys.readouterr().err
    assert list(checkpoints.epochs(folder)) == [1]
    with checkpoints.claim("s", "brier", 0, "k"):
        pass
    assert not folder.parent.exists()


def test_a_full_disk_stops_the_training_and_keeps_the_last_good_checkpoint(images, whole, tmp_path, monkeypatch):
    interrupted(images, tmp_path, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths.os, "replace", full)
    with pytest.raises(OSError, match="Disk full while writing .*; free some space and run again"):
        finished(images, tmp_path)
    monkeypatch.undo()
    assert list(checkpoints.epochs(tmp_path)) == [1, 2] and not list(tmp_path.glob(".part*"))
    same(whole, finished(images, tmp_path))
