"""A published run, trained again."""

import json
import shutil

import numpy as np
import pytest
from helpers import parameters, squares, write_parameters

from compendium import paths, publish, trainings, verify
from compendium.__main__ import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A compendium with two seeds of focal1 of the study 'tiny', published."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("FOCALCAL_DEVICE", "cpu")
        values = parameters()
        values["studies"]["tiny"]["training"]["threads"] = 1
        write_parameters(folder, values)
        paths.write_npz(paths.prepared("tiny"), **squares())
        for seed in (0, 1):
            trainings.train_jobs("tiny", ["focal1"], seed)
            publish.halve_precision(paths.run("tiny", "focal1", seed) / "logits.npz")
        for name in ("runs", "provenance"):
            shutil.copytree(paths.study("tiny") / name, folder / "published/tiny" / name)
        (folder / "published/tiny.dvc").touch()
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    return folder


def test_the_same_run_again_is_equal_and_leaves_nothing(here, capsys, monkeypatch):
    monkeypatch.setenv("FOCALCAL_SCRATCH", str(here / "elsewhere"))
    checkpoint = here / "elsewhere/tiny/focal1-0/key/00001-0.safetensors"  # of a training that was interrupted
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert main(["verify", "tiny", "focal1", "0"]) == 0
    printed = capsys.readouterr().out
    assert "history.csv: equal, byte for byte" in printed and "logits.npz: equal, number for number" in printed
    assert "differs" not in printed and "published with" not in printed
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_what_differs_is_named(here, capsys):
    for seed in ("0", "1"):  # as if other labels had been published
        path = here / "published/tiny/runs/focal1" / seed / "logits.npz"
        file = paths.read_npz(path)
        paths.write_npz(path, **file | {"test_labels": (file["test_labels"] + 1) % 3})
    history = here / "published/tiny/runs/focal1/0/history.csv"
    lines = [f"{line},older" for line in history.read_text().splitlines()]  # a column that is not written any more
    history.write_text("\n".join([*lines[:2], lines[2].replace(",", ",9", 1), *lines[3:]]) + "\n")
    record = here / "published/tiny/provenance/focal1-0.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"cpu": "An older one", "commit": "abc"}))
    assert main(["verify", "tiny", "focal1", "0"]) == 1
    printed = capsys.readouterr().out
    assert "history.csv: not equal from epoch 2 on (learning_rate: 9" in printed and "logits.npz: not equal" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| error, none"))
    assert row.split("|")[5].strip() == "differs"
    assert "cpu: published with An older one, here" in printed and "commit: published with abc" in printed


def test_two_standard_deviations():
    assert [verify.judged(1.0, ours, 0.1) for ours in (1.0, 1.19, 0.81, 1.21)] == [
        *("equal", "within 2 sd", "within 2 sd", "differs")
    ]
    assert verify.judged(1.0, 1.001, np.nan) == "no second seed"  # nothing says how much another one moves


def test_what_is_not_there_is_named(here):
    with pytest.raises(SystemExit, match="Of tiny no 'focal1 7' is here, but: focal1 0 1; `dvc pull"):
        main(["verify", "tiny", "focal1", "7"])
    with pytest.raises(SystemExit, match="'tinny' is no published study; published are: tiny."):
        main(["verify", "tinny", "focal1", "0"])
    shutil.rmtree(here / "artifacts")
    values = parameters()
    values["studies"]["tiny"]["data"]["dataset"] = "fashion_mnist"
    write_parameters(here, values)
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte.gz is missing; `make data` fetches it"):
        main(["verify", "tiny", "focal1", "0"])
    record = here / "published/tiny/provenance/focal1-0.json"
    record.write_text(json.dumps({"commit": "abc"}))
    with pytest.raises(SystemExit, match="does not say with which settings it was trained"):
        main(["verify", "tiny", "focal1", "0"])
    record.write_text(json.dumps({"settings": {"rate": 1}, "threads": 1}))
    with pytest.raises(SystemExit, match="was written by other code and cannot be repeated by this"):
        main(["verify", "tiny", "focal1", "0"])
    shutil.rmtree(here / "published/tiny")
    with pytest.raises(SystemExit, match="provenance/focal1-0.json is not here; `dvc pull published/tiny.dvc` fetches"):
        main(["verify", "tiny", "focal1", "0"])


def test_a_published_or_finished_run_is_not_trained_over(here):
    with pytest.raises(SystemExit, match="focal1/0 is published; `compendium verify` trains it again and leaves"):
        main(["train", "tiny", "focal1"])
    shutil.copytree(here / "published/tiny/runs", here / "artifacts/tiny/runs", dirs_exist_ok=True)
    shutil.rmtree(here / "published")
    (here / "scratch/tiny/focal1-0").mkdir(parents=True)  # without a checkpoint nothing is under way
    with pytest.raises(SystemExit, match="focal1/0 is finished; delete it to train it again"):
        main(["train", "tiny", "focal1"])
