"""Packing finished runs and publishing them."""

import subprocess
import tarfile

import numpy as np
import pytest
import yaml

from compendium import paths, publish, runs
from focalcal import metrics

PARAMETERS = {
    "active": {"studies": [], "published": ["big"], "losses": ["brier"], "seeds": [7]},
    "shared": {"protocol": {}, "losses": {"focal3": {}, "brier": {}}},
    "studies": {"big": {"data": {"dataset": "digits"}, "training": {"network": "small_resnet"}}},
}


@pytest.fixture
def compendium(tmp_path, monkeypatch):
    """A repository with a DVC remote and two finished runs of study 'big'."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMETERS, sort_keys=False))
    for command in (
        "git init -q",
        "dvc init -q",
        "dvc config core.analytics false",
        "dvc remote add -d store .store -q",
    ):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    for loss, seed in (("brier", 0), ("focal3", 1)):
        finished(loss, seed)
    return tmp_path


def finished(loss, seed, nll=0.4):
    folder, rng = paths.run("big", loss, seed), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text(f"epoch,test_nll\n1,0.5\n2,{nll}\n")
    labels = np.arange(3000) % 5
    logits = 50 + 3 * np.eye(5)[labels] + rng.normal(size=(3000, 5))
    paths.write_npz(folder / "logits.npz", val_logits=logits, val_labels=labels, test_logits=logits, test_labels=labels)
    paths.write_npz(folder / "gradients.npz", epochs=np.array([1]), norms=np.ones((1, 4), np.float32))
    paths.write_npz(folder / "shifted.npz", noise5=logits.astype(np.float16))
    record = paths.study("big") / "provenance" / f"{loss}-{seed}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text("{}")


def test_packed_runs_are_published_pinned_and_read(compendium, capsys):
    raw = paths.read_npz(paths.run("big", "brier", 0) / "logits.npz")
    before = raw["test_logits"], raw["test_labels"]
    publish.main(["pack", "big"])
    assert "2 runs in big.tar" in capsys.readouterr().out
    publish.main(["add", "big.tar"])
    assert (compendium / "published/big.dvc").is_file()
    assert [file for file in (compendium / ".store").rglob("*") if file.is_file()]
    assert runs.active("big") == (["focal3", "brier"], [0, 1]) and runs.pairs("big") == [("focal3", 1), ("brier", 0)]
    assert runs.folder("big", "brier", 0) == compendium / "published/big/runs/brier/0"
    assert len(runs.history("big")) == 4
    after = runs.logits("big", "brier", 0)["test"]
    assert paths.read_npz(runs.folder("big", "brier", 0) / "logits.npz")["test_logits"].dtype == np.float16
    for metric in metrics.METRICS.values():
        assert metric(*after) == pytest.approx(metric(*before), abs=1e-4)


def test_logits_that_half_precision_would_change_stay_as_they_are(tmp_path):
    path = tmp_path / "logits.npz"
    logits = np.tile([0.0, 1e-9], (60, 1))  # a lead of the second class that half precision loses
    labels = np.ones(60, np.int64)
    paths.write_npz(path, val_logits=logits, val_labels=labels, test_logits=logits, test_labels=labels)
    before = path.read_bytes()
    assert not publish.halved(path) and path.read_bytes() == before


def test_more_runs_are_added_and_others_results_refused(compendium):
    publish.main(["pack", "big"])
    publish.add(compendium / "big.tar")
    finished("focal3", 2)
    publish.main(["pack", "big", "--out", "more.tar"])
    publish.add(compendium / "more.tar")
    assert runs.pairs("big") == [("focal3", 1), ("focal3", 2), ("brier", 0)]
    finished("focal3", 2, nll=0.3)
    publish.main(["pack", "big"])
    with pytest.raises(ValueError, match="focal3/2 is published already, with other results"):
        publish.add(compendium / "big.tar")


def test_what_is_not_whole_is_named(compendium, capsys):
    (paths.run("big", "focal3", 1) / "history.csv").unlink()
    publish.main(["pack", "big"])
    assert "focal3, seed 1 is left out: history.csv missing." in capsys.readouterr().out
    packed = compendium / "big.tar"
    packed.write_bytes(packed.read_bytes()[:3000])
    with pytest.raises(ValueError, match="big.tar is damaged or no tar file"):
        publish.add(packed)
    with tarfile.open(compendium / "other.tar", "w") as archive:
        archive.add(compendium / "dvc.yaml", "../dvc.yaml")
    with pytest.raises(ValueError, match="other.tar is not what `focalcal.publish pack` writes"):
        publish.add(compendium / "other.tar")
    (paths.run("big", "brier", 0) / "history.csv").write_text("epoch,test_nll\n1,0.5\n3,0.4\n")
    publish.main(["pack", "big"])
    with pytest.raises(ValueError, match="brier, seed 0: history.csv does not hold every epoch once"):
        publish.add(compendium / "big.tar")
    assert not (compendium / "published").exists()
    with pytest.raises(SystemExit, match="focalcal: No finished run in .*; train first"):
        publish.main(["pack", "nothing"])
