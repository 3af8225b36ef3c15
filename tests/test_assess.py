"""Logits from elsewhere."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from compendium import assess, paths
from compendium.__main__ import main

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def compendium(tmp_path, monkeypatch):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("notebooks", "papers"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(seed=0, n=400, sharpness=3.0):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, n)
    logits = sharpness * (np.eye(4)[labels] + np.random.default_rng(seed).normal(size=(n, 4)))
    return {"val_logits": logits, "val_labels": labels, "test_logits": logits[::-1], "test_labels": labels[::-1]}


@pytest.mark.whole
def test_two_models_from_elsewhere_get_every_table_and_figure(compendium):
    paths.write_npz(Path("vit.npz"), **arrays(0))
    paths.write_npz(Path("forest.npz"), **arrays(1, sharpness=1.0))
    main(["assess", "mine", "vit.npz", "forest.npz"])
    figures = compendium / "figures" / "mine"
    intervals = pd.read_csv(figures / "10_evidence/intervals.csv")
    assert set(intervals.loss) == {"vit", "forest"} and (intervals.low <= intervals.high).all()
    assert {"vit", "forest"} == set(pd.read_csv(figures / "08_results/results.csv").loss)
    for name in ("07_reliability/before-scaling", "08_results/bars", "10_evidence/bins", "11_calibratability/methods"):
        assert (figures / f"{name}.png").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"test_logits": np.ones((400, 4)) / 4},
            "bad.npz: test_logits look like probabilities; store log",
        ),
        ({"test_labels": np.full(400, 4)}, r"bad.npz, test: labels must lie in 0\.\.3, got 4\.\.4"),
        ({"val_logits": np.full((400, 4), np.nan)}, "bad.npz, val: logits hold 1600 values that are NaN"),
        ({"val_logits": np.ones(400)}, "bad.npz, val: logits must have shape"),
        ({"val_labels": np.zeros(7, int)}, r"bad.npz, val: labels must have shape \(400,\)"),
        ({"val_logits": np.ones((400, 3)) * 2, "val_labels": np.zeros(400, int)}, "val has 3 classes and test has 4"),
        ({"val_logits": np.eye(4) * 9, "val_labels": np.arange(4)}, "4 samples in val are too few; 200 or more"),
        ({"val_labels": None}, "bad.npz lacks the array 'val_labels'; it has: val_logits, test_logits, test_labels"),
    ],
)
def test_what_cannot_be_logits_is_refused(compendium, change, words):
    content = {name: value for name, value in (arrays() | change).items() if value is not None}
    paths.write_npz(Path("bad.npz"), **content)
    with pytest.raises(ValueError, match=words):
        assess.assess("mine", [Path("bad.npz")])
    assert not (compendium / "artifacts").exists()


def test_studies_are_kept_apart(compendium):
    paths.write_npz(Path("one.npz"), **arrays())
    other = arrays()
    paths.write_npz(Path("two.npz"), **other | {"test_labels": other["test_labels"][::-1].copy()})
    with pytest.raises(ValueError, match="test labels of two and one differ; assess them as two studies"):
        assess.assess("mine", [Path("one.npz"), Path("two.npz")])
    with pytest.raises(ValueError, match="'fashion' is a study of params.yaml"):
        assess.assess("fashion", [Path("one.npz")])
    with pytest.raises(ValueError, match="A study's name consists of letters"):
        assess.assess("../mine", [Path("one.npz")])
    with pytest.raises(ValueError, match="Two files have the same name"):
        assess.assess("mine", [Path("one.npz"), Path("./one.npz")])
    paths.write_npz(Path("artifacts/mine/one.npz"), **arrays())
    with pytest.raises(ValueError, match="lies in the folder that `compendium assess mine` makes anew; move it"):
        assess.assess("mine", [Path("artifacts/mine/one.npz")])
    assert Path("artifacts/mine/one.npz").is_file()
    for place in ("artifacts/stripped", "figures/gamma"):
        kept = compendium / place / "kept.txt"
        kept.parent.mkdir(parents=True)
        kept.touch()
        with pytest.raises(ValueError, match=f"{place} is there, and not from `compendium assess`; choose another"):
            assess.assess(kept.parent.name, [Path("one.npz")])
        assert kept.is_file()


def test_a_file_that_is_missing_or_damaged_is_refused_in_one_sentence_that_does_not_speak_of_dvc(compendium):
    paths.write_npz(Path("vit.npz"), **arrays())
    whole = Path("vit.npz").read_bytes()
    flipped = whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:]
    for content, what in (
        (whole[:5000], "vit.npz is truncated or damaged (no such archive as np.savez writes); make or copy it anew."),
        (flipped, "vit.npz is truncated or damaged (Bad CRC-32 for file 'val_logits.npy'); make or copy it anew."),
        (b"", "vit.npz is truncated or damaged (no such archive as np.savez writes); make or copy it anew."),
        (None, "vit.npz is missing."),
    ):
        Path("vit.npz").unlink() if content is None else Path("vit.npz").write_bytes(content)
        with pytest.raises(SystemExit) as refused:
            main(["assess", "mine", "vit.npz"])
        assert str(refused.value) == f"focalcal: {what}"
    assert not (compendium / "artifacts").exists()
