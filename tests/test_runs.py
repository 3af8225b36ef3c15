"""What is read of a study whose files are written by hand here: two losses, two seeds, three samples."""

import numpy as np
import pandas as pd
import pytest
from helpers import parameters, write_parameters

from compendium import paths, runs

TABLE = [("focal1", 0), ("focal1", 1), ("adafocal", 0)]  # in the order of the tables
LOGITS = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The finished study 'tiny'; the parameters it was written with."""
    monkeypatch.chdir(tmp_path)
    values = parameters()
    write_parameters(tmp_path, values)
    temperatures, measured = ["loss,seed,scaling,temperature"], ["loss,seed,split,scaling,metric,value"]
    for loss, seed in TABLE:
        run = paths.run("tiny", loss, seed)
        run.mkdir(parents=True)
        new = ",test_refinement" if loss == "focal1" else ""  # the other run is older, and lacks it
        rows = [f"{epoch},{1 / epoch + seed}{new and ',0.3'}" for epoch in (1, 2)]
        (run / "history.csv").write_text("\n".join([f"epoch,test_nll{new}", *rows]))
        pair = {"val_logits": LOGITS[:2], "val_labels": np.array([0, 1])}
        paths.write_npz(run / "logits.npz", **pair, test_logits=LOGITS, test_labels=np.array([0, 1, 1]))
        paths.write_npz(run / "gradients.npz", epochs=np.array([1, 2]), norms=np.ones((2, 5), np.float16))
        paths.write_npz(run / "shifted.npz", noise1=LOGITS.astype(np.float16))
        temperatures += [f"{loss},{seed},{scaling},{t + seed}" for scaling, t in (("none", 1), ("nll", 2), ("ece", 3))]
        for split, shift in (("val", 5), ("test", 0)):
            for scaling in ("none", "ece"):
                measured.append(f"{loss},{seed},{split},{scaling},ece,{0.1 * seed + 0.02 + shift}")
                measured.append(f"{loss},{seed},{split},{scaling},confidence,0.9")
    (paths.study("tiny") / "temperatures.csv").write_text("\n".join(temperatures))
    (paths.study("tiny") / "metrics.csv").write_text("\n".join(measured))
    return values


def test_runs_are_those_that_chapter_3_has_scaled_in_its_order(study):
    assert runs.pairs("tiny") == TABLE
    assert runs.pairs("tiny", ["adafocal"]) == [("adafocal", 0)]
    assert runs.losses_and_seeds("tiny") == (["focal1", "adafocal"], [0, 1])
    assert runs.losses_and_seeds("tiny", ["focal1"]) == (["focal1"], [0, 1])
    with pytest.raises(ValueError, match="Study 'tiny' has no run of 'brier'; it has: focal1, adafocal."):
        runs.pairs("tiny", ["focal1", "brier"])
    for name in ("null", "001", "True"):  # a model from elsewhere may have any name
        (paths.study("tiny") / "temperatures.csv").write_text(f"loss,seed,scaling,temperature\n{name},0,none,1\n")
        assert runs.pairs("tiny") == [(name, 0)]
    (paths.study("tiny") / "temperatures.csv").unlink()
    with pytest.raises(FileNotFoundError, match="temperatures.csv is missing; `dvc repro` makes it"):
        runs.pairs("tiny")


def test_what_chapter_3_scales(study):
    assert runs.finished("tiny") == [("focal1", 0)]  # trained here: what params.yaml names, whatever else is there
    for loss in ("zebra", "another"):
        paths.run("tiny", loss, 10).mkdir(parents=True)
        paths.run("tiny", loss, 9).mkdir()
    (paths.study("tiny") / "runs" / "focal1" / "notes").mkdir()
    write_parameters(paths.root(), study | {"active": study["active"] | {"studies": [], "published": ["tiny"]}})
    others = [("another", 9), ("another", 10), ("zebra", 9), ("zebra", 10)]
    assert runs.finished("tiny") == [("focal1", 0), ("focal1", 1), ("adafocal", 0), *others]
    with pytest.raises(FileNotFoundError, match="No runs of study 'huge' in .*; `dvc repro` takes published ones"):
        runs.finished("huge")


def test_histories_old_and_new_one_below_the_other(study):
    table = runs.history("tiny")
    assert list(table.columns) == ["loss", "seed", "epoch", "test_nll", "test_refinement"]
    assert table[["loss", "seed", "epoch", "test_nll"]].values.tolist() == [
        *(["focal1", 0, 1, 1.0], ["focal1", 0, 2, 0.5], ["focal1", 1, 1, 2.0], ["focal1", 1, 2, 1.5]),
        *(["adafocal", 0, 1, 1.0], ["adafocal", 0, 2, 0.5]),
    ]
    assert table.test_refinement.isna().tolist() == [False] * 4 + [True] * 2
    means = runs.curves(table, "test_nll")
    assert list(means) == ["focal1", "adafocal"] and means.loc[2].tolist() == [1.0, 0.5]
    assert runs.history("tiny", ["focal1"], [1]).test_nll.tolist() == [2.0, 1.5]
    with pytest.raises(ValueError, match=r"Study 'tiny' has no run with seeds \[7\]."):
        runs.history("tiny", seeds=[7])
    (paths.run("tiny", "focal1", 1) / "history.csv").unlink()
    with pytest.raises(FileNotFoundError, match="focal1/1/history.csv is missing; `dvc repro` makes it"):
        runs.history("tiny")


def test_milestones_are_where_the_learning_rate_falls():
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    table = pd.DataFrame({"epoch": [*range(1, 6)] * 2, "learning_rate": rates * 2})
    assert runs.milestones(table) == [3, 5] and runs.milestones(table.query("epoch < 3")) == []


def test_temperatures_and_metrics(study):
    found = runs.temperatures("tiny")
    assert len(found) == 9 and found.to_dict()["focal1", 1, "nll"] == 3
    assert set(runs.temperatures("tiny", ["adafocal"]).index.get_level_values("loss")) == {"adafocal"}
    table = runs.metrics("tiny", ["adafocal"])
    assert list(table) == ["loss", "seed", "split", "scaling", "metric", "value"] and len(table) == 8
    assert len(runs.metrics("tiny")) == 24
    mean = runs.results("tiny")
    assert list(mean.index) == ["focal1", "adafocal"]
    assert mean["ece", "none"].tolist() == pytest.approx([0.07, 0.02])  # of test alone
    assert runs.results("tiny", "std")["ece", "none"]["focal1"] == pytest.approx(0.1 / np.sqrt(2))


def test_logits_are_checked(study):
    splits = runs.logits("tiny", "focal1", 0)
    assert list(splits) == ["val", "test"] and splits["test"][0].dtype == np.float64
    assert np.array_equal(splits["test"][0], LOGITS) and splits["test"][1].tolist() == [0, 1, 1]
    path = paths.run("tiny", "focal1", 0) / "logits.npz"
    np.savez(path, val_logits=LOGITS, val_labels=np.array([0, 7, 0]))
    with pytest.raises(ValueError, match=r"logits.npz: labels must lie in 0\.\.1, got 0\.\.7"):
        runs.logits("tiny", "focal1", 0)
    np.savez(path, val_logits=LOGITS)
    with pytest.raises(ValueError, match="logits.npz lacks the array 'val_labels'"):
        runs.logits("tiny", "focal1", 0)


def test_a_masked_class_stays_with_the_logits(study):
    path = paths.run("tiny", "focal1", 0) / "logits.npz"
    paths.write_npz(path, **paths.read_npz(path), masked=np.array([1]))
    assert [split[2] for split in runs.logits("tiny", "focal1", 0).values()] == [(1,), (1,)]
    assert [split[2] for split in runs.logits("tiny", "focal1", 1).values()] == [(), ()]


def test_gradients_and_what_networks_were_not_trained_on(study):
    epochs, norms = runs.gradients("tiny", "focal1", 0)
    assert epochs == [1, 2] and norms.shape == (2, 5) and norms.dtype == np.float32
    assert runs.shifted("tiny", "focal1", 0)["noise1"].tolist() == LOGITS.tolist()


@pytest.mark.parametrize(
    ("ours", "paper", "said"),
    [
        (1.5, 1.0, "match"),  # half a point, on either side
        (0.5, 1.0, "match"),
        (1.5001, 1.0, "partial"),
        (0.4999, 1.0, "no match"),
        (5.0, 4.0, "match"),  # a quarter of the papers' number
        (3.0, 4.0, "match"),
        (5.0001, 4.0, "partial"),
        (8.0, 4.0, "partial"),  # twice, and half of it
        (2.0, 4.0, "partial"),
        (8.0001, 4.0, "no match"),
        (1.9999, 4.0, "no match"),
        (0.5, 0.0, "match"),
        (0.5001, 0.0, "no match"),
        (1.0, np.nan, ""),
    ],
)
def test_verdicts_at_their_edges(ours, paper, said):
    assert runs.verdict(ours, paper) == said


PAPERS = """\
dataset,network,loss,metric,before_scaling,after_scaling,temperature,source,quality
digits,small_resnet,focal1,ece_percent,7.2,2.0,1.1,A,copied
digits,small_resnet,focal1,ece_percent,9.9,9.9,9.9,B,copied
digits,small_resnet,adafocal,ece_percent,3.0,,,A,read off
digits,small_resnet,adafocal,error_percent,3.0,,,A,copied
cifar10,resnet50,adafocal,ece_percent,0.6,0.5,0.9,A,copied
"""


def test_the_papers_numbers_stand_beside_ours(study):
    (paths.root() / "papers").mkdir()
    (paths.root() / "papers" / "published.csv").write_text(PAPERS)
    assert runs.repeats_papers("tiny") and not runs.repeats_papers("from elsewhere")
    assert len(runs.published("digits", "small_resnet")) == 4
    papers = runs.papers("tiny")  # the first source that copies the authors' own number
    assert papers.to_dict("index") == {"focal1": {"before_scaling": 7.2, "after_scaling": 2.0, "temperature": 1.1}}
    assert runs.papers("from elsewhere").empty

    table = pd.DataFrame({"ECE %": [7.0], "ECE % scaled": [2.0], "T": [1.5]}, index=["focal1"])
    columns = ["ECE %", "ECE % (papers)", "ECE % scaled", "ECE % scaled (papers)", "T", "T (papers)"]
    beside = runs.beside_papers(table, "tiny")
    assert list(beside) == columns and beside.loc["focal1"].tolist() == [7.0, 7.2, 2.0, 2.0, 1.5, 1.1]
    assert list(table) == ["ECE %", "ECE % scaled", "T"]

    against = runs.against_papers("tiny")
    focal1, adafocal = against.loc["focal1"], against.loc["adafocal"]
    assert list(against)[:5] == ["ECE %", "sd", "ECE % (papers)", "difference", "verdict"]
    assert focal1["ECE %"] == pytest.approx(7) and focal1["difference"] == pytest.approx(-0.2)
    assert (focal1["verdict"], focal1["verdict scaled"], adafocal["verdict"]) == ("match", "no match", "")


def test_a_study_that_no_paper_has_gets_cifars_numbers(study):
    (paths.root() / "papers").mkdir()
    (paths.root() / "papers" / "published.csv").write_text(PAPERS.replace("digits", "letters"))
    assert not runs.repeats_papers("tiny")
    assert runs.papers("tiny").index.tolist() == ["adafocal"]


def test_the_training_set_s_side_with_and_without_mean_confidences_in_one_study(study):
    new, old = (paths.run("tiny", *run) / "history.csv" for run in (("focal1", 0), ("adafocal", 0)))
    new.write_text(
        "epoch,train_confidence,train_error,train_ece,test_confidence,test_error\n"
        "1,0.5,0.4,0.1,0.5,0.5\n2,0.9,0.04,0.06,0.88,0.15\n3,,,,0.92,0.1\n"  # the training set every other epoch
    )
    old.write_text("epoch,train_error,train_ece\n1,0.04,0.06\n")
    with open(paths.study("tiny") / "metrics.csv", "a") as file:
        file.write("\nadafocal,0,test,none,error,0.15")
    alone = runs.training_side("tiny", ["adafocal"])
    assert alone.loc[("adafocal", 0)].tolist() == pytest.approx([-0.06, 0.9 - 0.85, 0.11])
    (paths.run("tiny", "focal1", 1) / "history.csv").write_text(new.read_text())
    both = runs.training_side("tiny")
    assert both.loc[("adafocal", 0)].tolist() == pytest.approx([-0.06, 0.9 - 0.85, 0.11])
    assert both.loc[("focal1", 0)].tolist() == pytest.approx([0.9 - 0.96, 0.92 - 0.9, 0.08])
    logits = paths.run("tiny", "focal1", 0) / "logits.npz"
    paths.write_npz(logits, **paths.read_npz(logits), epoch=np.array(1))  # the epoch that is kept is not the last
    kept = runs.training_side("tiny")
    assert kept.loc[("focal1", 0)].tolist() == pytest.approx([0.5 - 0.6, 0.5 - 0.5, 0.1])
    assert kept.loc[("focal1", 1)].tolist() == both.loc[("focal1", 1)].tolist()
