"""Interrupted trainings. tests/kills.py does the same with many real kills."""

import errno
import subprocess
import sys

import kills
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compendium import checkpoints, paths
from focalcal import feed, losses, networks, train
from focalcal.train import Training

SETTINGS = Training(network="small_resnet", epochs=6, milestones=[3, 5], batch_size=64)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    prepared = {"mean": np.array([0.5]), "std": np.array([0.3])}
    for split, n in (("train", 100), ("val", 40), ("test", 40)):
        prepared[f"{split}_images"] = rng.integers(0, 255, (n, 8, 8, 1)).astype(np.uint8)
        prepared[f"{split}_labels"] = rng.integers(0, 3, n)
    return feed.splits(prepared, torch.device("cpu"))


def new_run(loss="adafocal"):
    return train.Run(networks.make("small_resnet", 3, 1, 0), losses.make(loss), SETTINGS)


def interrupted(images, folder, after):
    """Train until an epoch is saved, then stop as an exception in the notebook would."""
    rows = train.train(new_run(), images, 0, folder)
    for _ in range(after):
        next(rows)
    rows.close()


def finished(images, folder=None):
    run = new_run()
    rows = list(train.train(run, images, 0, folder))
    return rows, {name: tensor.clone() for name, tensor in run.tensors().items()}, run.gradients


def same(a, b):
    rows, tensors, gradients = zip(a, b, strict=True)
    assert repr(rows[0]) == repr(rows[1]) and len(rows[0]) == SETTINGS.epochs
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert all(np.array_equal(gradients[0][epoch], gradients[1][epoch]) for epoch in train.gradient_epochs(6))


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(images, tmp_path, after):
    interrupted(images, tmp_path, after)
    (tmp_path / ".part-7-00009-1234abcd.safetensors").write_bytes(b"killed while writing this")
    assert list(checkpoints.epochs(tmp_path)) == [after - 1, after][after == 1 :]
    same(finished(images), finished(images, tmp_path))


def test_real_kills(capfd):
    kills.main(3, seed=1)
    assert "3 kills; 10 files, all equal; left over: []" in capfd.readouterr().out


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(images, tmp_path, capsys, damage):
    interrupted(images, tmp_path, 4)
    newest = checkpoints.epochs(tmp_path)[4]
    newest.write_bytes(damage(newest.read_bytes()))
    same(finished(images), finished(images, tmp_path))
    assert f"checkpoint {newest.name} is damaged" in capsys.readouterr().err
    assert newest.with_suffix(".damaged").is_file()


def test_two_processes_on_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCAL_SCRATCH", str(tmp_path))
    code = "from focalcal import checkpoints\nwith checkpoints.claim('s', 'brier', 0, 'k'): print('in')"
    with checkpoints.claim("s", "brier", 0, "k"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Another process is training s, brier, seed 0; wait for it or stop it" in second.stderr
    assert second.returncode == 1 and second.stdout == ""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


def test_the_scratch_folder_goes_only_when_all_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCAL_SCRATCH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), checkpoints.claim("s", "brier", 0, "k") as folder:
        checkpoints.write(folder, 1, {"x": torch.ones(2)}, [])
        raise KeyboardInterrupt
    assert list(checkpoints.epochs(folder)) == [1]
    monkeypatch.setenv("FOCALCAL_KEEP_CHECKPOINTS", str(tmp_path / "where"))
    with checkpoints.claim("s", "brier", 0, "k"):
        pass
    assert list(checkpoints.epochs(folder)) == [1] and (tmp_path / "where").read_text() == str(folder.parent)
    monkeypatch.delenv("FOCALCAL_KEEP_CHECKPOINTS")
    with checkpoints.claim("s", "brier", 0, "k"):
        pass
    assert not folder.exists()


def test_a_training_that_had_come_to_its_end_is_not_trained_again(images, tmp_path, monkeypatch):
    whole = finished(images, tmp_path)
    monkeypatch.setattr(train, "take_step", lambda *_: pytest.fail("a step was taken"))
    same(whole, finished(images, tmp_path))


def test_a_full_disk_stops_the_training_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    interrupted(images, tmp_path, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths.os, "replace", full)
    with pytest.raises(OSError, match="Disk full while writing .*; free some space and run again"):
        finished(images, tmp_path)
    monkeypatch.undo()
    assert list(checkpoints.epochs(tmp_path)) == [1, 2] and not list(tmp_path.glob(".part*"))
    same(finished(images), finished(images, tmp_path))


def test_a_checkpoint_holds_tensors_and_text_only(images, tmp_path):
    interrupted(images, tmp_path, 2)
    saved = load_file(checkpoints.epochs(tmp_path)[2])
    assert {"model.0.weight", "momentum.0.weight", "loss.gamma", "gradients.1"} <= set(saved)
