"""The real pipeline, at a tiny size on scikit-learn's digits, in a copy of this repository."""

import json
import re
import shutil
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import COMPENDIUM, call, changed, real_parameters, repository

from focalcal import calibrate, metrics

LOSSES = ["cross_entropy", "focal1", "adafocal"]
CHAPTERS = ["04_nll_divergence", "05_weight_norms", "06_gamma_selection", "07_reliability", "08_results"]
CHAPTERS += ["09_out_of_distribution", "10_evidence", "11_calibratability", "15_selective_prediction"]
ANALYSES = [f"analyse@tiny-{chapter}" for chapter in CHAPTERS]
ELSEWHERE = """
from compendium import prepare, publish, trainings
for study in ("small", "large"):
    prepare.write_prepared(study)
    trainings.train_jobs(study, ["cross_entropy", "focal1"], 0)
    publish.pack(study)
"""
OPENED = """
import sys
import matplotlib
import nbformat
matplotlib.use("agg")
for name in sys.argv[1:]:
    scope = {"__name__": "__main__", "display": print}
    for cell in nbformat.read(f"notebooks/{name}.ipynb", 4).cells:
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            assert source.startswith('study = "fashion-350"\\nonly = []')
            source = 'study = "tiny"\\nonly = ["adafocal"]'
        if cell.cell_type == "code":
            exec(compile(source, name, "exec"), scope)
    matplotlib.pyplot.close("all")
"""

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """All that `dvc repro` makes, its trainings by a grid, as `make results` has them."""
    copy = repository(tmp_path_factory.mktemp("copy"), LOSSES)
    with open(copy / "papers/published.csv", "a") as file:  # as if they had tried these digits
        file.write("digits,small_resnet,focal1,ece_percent,4.5,1.5,1.2,nobody,copied\n")
    call(copy, *COMPENDIUM, "grid", "run", "train@*", "--jobs", "2")
    assert stages_that_ran(call(copy, "dvc", "repro")) == ["scale@tiny", *ANALYSES]
    return copy


def stages_that_ran(output: str) -> list[str]:
    return re.findall("Running stage '(.*)'", output)


def table(copy, name, **wanted):
    return pd.read_csv(copy / f"figures/tiny/{name}.csv", **wanted)


def test_repro_makes_everything(copy):
    study, figures = copy / "artifacts" / "tiny", copy / "figures" / "tiny"
    for loss in LOSSES:
        assert len(pd.read_csv(study / "runs" / loss / "0" / "history.csv")) == 3
        record = json.loads((study / "provenance" / f"{loss}-0.json").read_text())
        assert record["device"].startswith("cpu") and record["threads"] == 1
    assert {path.stem for path in (figures / "08_results/metrics").iterdir()} == set(LOSSES)
    against = table(copy, "08_results/against-papers", index_col=0)
    assert list(against.columns[:4]) == ["ECE %", "ECE % (papers)", "difference", "verdict"]
    assert against["ECE % (papers)"].dropna().tolist() == [4.5]
    for chapter in CHAPTERS:
        assert list((figures / chapter).glob("*.png")), chapter
    for plot in yaml.safe_load((copy / "dvc.yaml").read_text())["plots"]:
        for axes in plot.values():
            (file,) = axes["y"]
            columns = pd.read_csv(copy / file.replace("${active.headline}", "tiny")).columns
            assert {axes["x"], *LOSSES} <= set(columns), file


def test_the_chapters_numbers_are_those_of_the_logits(copy):
    """Each number, computed here from what the training left, where a chapter wrote it down."""
    temperatures = pd.read_csv(copy / "artifacts/tiny/temperatures.csv").set_index(["loss", "scaling"]).temperature
    bins = table(copy, "07_reliability/before-scaling")
    bins = bins.assign(gap=(bins.confidence - bins.right).abs()).groupby("loss")[["gap", "samples"]].sum()
    noise = table(copy, "09_out_of_distribution/noise", index_col=["loss", "severity", "scaling"])
    methods = table(copy, "11_calibratability/methods", index_col=0, header=[0, 1])
    covered = table(copy, "15_selective_prediction/risk-coverage", index_col="coverage")
    norms = table(copy, "05_weight_norms/weight-norm-curves", index_col="epoch")
    nll = table(copy, "04_nll_divergence/test-nll", index_col="epoch")
    for loss in LOSSES:
        run = copy / "artifacts/tiny/runs" / loss / "0"
        with np.load(run / "logits.npz") as file:
            val, test = ((file[f"{split}_logits"], file[f"{split}_labels"]) for split in ("val", "test"))
        chosen = calibrate.temperatures(*val)
        assert temperatures[loss].to_dict() == pytest.approx(chosen, rel=1e-5)
        error, ece = (test[0].argmax(axis=1) != test[1]).mean(), metrics.ece(*test)
        shown = json.loads((copy / f"figures/tiny/08_results/metrics/{loss}.json").read_text())
        assert shown["error_percent"] == pytest.approx(100 * error) and 0 < error < 1
        assert shown["ece_percent"] == pytest.approx(100 * ece, abs=1e-3)
        assert shown["ece_percent_scaled"] == pytest.approx(
            100 * metrics.ece(test[0] / chosen["ece"], test[1]), abs=1e-3
        )
        assert bins.gap[loss] / bins.samples[loss] == pytest.approx(ece, abs=1e-5)
        assert noise.error[loss, 0, "none"] == pytest.approx(error, abs=1e-5)
        scaled = metrics.nll(test[0] / chosen["nll"], test[1])
        assert methods["nll", "temperature_nll"][loss] == pytest.approx(scaled, rel=1e-3)
        assert covered[loss].iloc[-1] == pytest.approx(100 * error, abs=1e-3)
        history = pd.read_csv(run / "history.csv").set_index("epoch")
        assert norms[loss].to_dict() == pytest.approx(history.weight_norm.to_dict(), rel=1e-5)
        assert nll[loss].iloc[-1] == pytest.approx(metrics.nll(*test), rel=1e-5)


def test_the_metrics_have_a_row_for_each_loss(copy):
    lines = call(copy, "dvc", "metrics", "show").splitlines()
    assert lines[0].split()[:2] == ["Path", "ece_percent"]
    shown = {line.split()[0].rsplit("/", 1)[1]: line.split()[1:] for line in lines[1:]}
    assert set(shown) == {f"{loss}.json" for loss in LOSSES} and {len(numbers) for numbers in shown.values()} == {4}


def test_saving_a_notebook_in_jupyterlab_leaves_everything_valid(copy):
    path = copy / "notebooks" / "02_train.ipynb"
    touched = nbformat.read(path, 4)
    touched.metadata["language_info"] = {"name": "python", "version": "3.99"}
    for cell in touched.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.metadata["scrolled"] = 3, True
            cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(touched, path)
    (copy / "notebooks" / ".ipynb_checkpoints").mkdir()
    assert stages_that_ran(call(copy, "dvc", "repro")) == ["strip"]


def test_a_change_makes_stale_what_it_changes(copy):
    def stale():
        return set(re.findall(r"^(\S+):$", call(copy, "dvc", "status"), re.M))

    plots = copy / "src/focalcal/plots.py"
    before = plots.read_text()
    plots.write_text(before + "\n# wider lines\n")
    assert stale() == set(ANALYSES), "how a curve is drawn is no reason to train"
    plots.write_text(before)
    trainings = {f"train@tiny-{loss}-0" for loss in LOSSES}
    values = real_parameters(LOSSES)
    values["shared"]["losses"]["focal1"]["gamma"] = 1.5
    with changed(copy, values):
        assert stale() == {"train@tiny-focal1-0", *ANALYSES}
    values = real_parameters(LOSSES)
    values["studies"]["tiny"]["data"]["val"] = 90
    with changed(copy, values):
        assert stale() == {"prepare@tiny", *trainings, *ANALYSES}


def test_a_forced_run_gives_the_bytes_of_the_grid_whatever_threads_there_are(copy):
    def contents():
        study = copy / "artifacts" / "tiny"
        made = [*study.glob("runs/adafocal/0/*"), *study.glob("notebooks/02_train/adafocal-0.ipynb")]
        made += [*study.glob("models/adafocal-0*"), *study.glob("notebooks/07*")]
        return {path: path.read_bytes() for path in [*made, *(copy / "figures/tiny/07_reliability").iterdir()]}

    before = contents()
    forced = ["train@tiny-adafocal-0", "analyse@tiny-07_reliability"]
    call(copy, "dvc", "repro", "-f", "-s", *forced, OMP_NUM_THREADS="3")
    assert contents() == before and len(before) > 9


def test_a_reader_chooses_one_loss_at_the_top_of_a_chapter(copy):
    figures = {path: path.read_bytes() for path in (copy / "figures").rglob("*.*")}
    assert sorted(path.name for path in (copy / "figures/tiny").iterdir()) == CHAPTERS
    call(copy, sys.executable, "-c", OPENED, *CHAPTERS)
    others = {"cross_entropy", "Cross-entropy", "focal1", "Focal, γ = 1"}
    for chapter in CHAPTERS:
        drawn = copy / "scratch/figures/tiny" / chapter
        assert list(drawn.glob("*.png"))
        for file in drawn.glob("*.csv"):
            assert not others & set(re.split(r'[,\n"]+', file.read_text())), file
    assert figures == {path: path.read_bytes() for path in (copy / "figures").rglob("*.*")}


SIZES = {"small": 100, "far": 300, "large": 500}


@pytest.fixture(scope="module")
def swept(copy):
    """The copy with three published studies that differ in their size, and all chapters about several studies."""
    values = real_parameters(LOSSES)
    for study, size in SIZES.items():
        tiny = values["studies"]["tiny"]
        values["studies"][study] = tiny | {"data": tiny["data"] | {"train": size}}
    sweeps = {"sizes": {"small": "small", "middle": "far", "large": "large", "plain": "small", "whole": "large"}}
    values["active"] |= {"published": list(SIZES), "analysed": ["far"], "sweeps": sweeps}
    values["active"]["comparisons"] = {
        "more": {"notebook": "17_beyond_focal", "study": "small", "beside": "far"},
        "less": {"notebook": "18_augmentation", "study": "small", "beside": "large"},
        "again": {"notebook": "19_adafocal", "study": "far", "beside": "small"},
    }
    with changed(copy, values):
        call(copy, sys.executable, "-c", ELSEWHERE)
        for part in ("runs", "provenance"):
            shutil.copytree(copy / "artifacts/tiny" / part, copy / "artifacts/far" / part)
        call(copy, *COMPENDIUM, "publish", "pack", "far")
        for study in SIZES:
            shutil.rmtree(copy / "artifacts" / study)
        said = call(copy, *COMPENDIUM, "publish", "add", *(f"{study}.tar" for study in SIZES))
        assert said.count("Published") == 3
        groups = ["choose-gamma@sizes", *(f"compare@{group}" for group in values["active"]["comparisons"])]
        groups += ["analyse-published@far-08_results"]
        ran = stages_that_ran(call(copy, "dvc", "repro", *groups))
        wanted = [f"{stage}@{study}" for study in SIZES for stage in ("take", "scale-published")]
        assert sorted(ran) == sorted([*wanted, *groups])
    return copy


def measured(copy, study):
    return pd.read_csv(copy / "artifacts" / study / "metrics.csv").query("scaling == 'none' and split == 'test'")


def test_published_runs_are_analysed_like_ones_own(swept):
    near, far = (pd.read_csv(swept / "artifacts" / study / "metrics.csv") for study in ("tiny", "far"))
    assert (near.drop(columns="value") == far.drop(columns="value")).all(axis=None)
    assert abs(near.value - far.value).max() < 1e-3
    assert (swept / "figures/far/08_results/bars.png").is_file()


def test_gamma_is_swept_over_sizes(swept):
    figures = swept / "figures/sizes/12_choosing_gamma"
    rows = pd.read_csv(figures / "sweep.csv")
    assert rows.groupby("train").loss.unique().map(list).to_dict() == {100: LOSSES[:2], 300: LOSSES, 500: LOSSES[:2]}
    for study, size in SIZES.items():
        known = pd.read_csv(swept / "artifacts" / study / "metrics.csv").query("scaling == 'none' and metric == 'nll'")
        assert rows[rows.train == size].nll.values == pytest.approx(known.value.values, rel=1e-5)
    chosen = pd.read_csv(figures / "chosen.csv").query("chosen == 'in hindsight'").set_index("images")
    least = rows[(rows.split == "test") & rows.gamma.notna()].groupby("train").ece.min()
    assert set(chosen.gamma) <= {0, 1} and chosen.ece.to_dict() == pytest.approx(least.to_dict())
    drawn = {"sweep", "training-side", "pairs", "schedules", "which-loss"}
    assert {path.stem for path in figures.glob("*.png")} == drawn


def test_augmentation_is_what_changes_overconfidence(swept):
    change = pd.read_csv(swept / "figures/less/18_augmentation/change.csv", index_col="loss")
    for study, column in (("small", "with"), ("large", "without")):
        known = 100 * measured(swept, study).pivot(index="loss", columns="metric", values="value")
        expected = known.confidence - (100 - known.error)
        assert change[column].to_dict() == pytest.approx(expected.to_dict(), abs=1e-3)


def test_adafocals_trainings_are_followed_to_their_end(swept):
    ends = pd.read_csv(swept / "figures/again/19_adafocal/ends.csv").set_index("training")
    known = measured(swept, "far").query("loss == 'adafocal'").set_index("metric").value
    assert ends.index.tolist() == ["seed 0"]  # of small there is none
    assert ends.loc["seed 0", "ECE %"] == pytest.approx(100 * known.ece, abs=1e-3)
    assert ends.loc["seed 0", "over, test"] == pytest.approx(100 * (known.confidence - 1 + known.error), abs=1e-3)
    gaps = pd.read_csv(swept / "figures/again/19_adafocal/gaps.csv", index_col=["training", "split"])
    assert gaps.shape == (2, 15)


def test_two_published_studies_are_compared(swept):
    figures = swept / "figures/more/17_beyond_focal"
    assert pd.read_csv(figures / "results.csv").loss.tolist() == ["cross_entropy", "focal1", "adafocal"]
    pairs = pd.read_csv(figures / "verdicts.csv").query("metric == 'ece' and scaling == 'none'")
    known = measured(swept, "small").query("metric == 'ece'").set_index("loss").value
    assert pairs[["one", "other"]].values.tolist() == [["focal1", "cross_entropy"]]
    assert pairs.difference.item() == pytest.approx(100 * (known.focal1 - known.cross_entropy), rel=1e-3)


def test_detectors_are_trained_and_measured(copy):
    values = real_parameters(LOSSES)
    values["active"]["detectors"] = ["boxes"]
    with changed(copy, values):
        assert stages_that_ran(call(copy, "dvc", "repro", "detect@boxes"))[-1] == "detect@boxes"
    figures = copy / "figures/boxes/16_generalized_focal"
    detectors = pd.read_csv(figures / "detectors.csv").set_index("detector")
    assert detectors["box IoU"].focal2 == detectors["box IoU"].focal_quality, "the same networks"
    assert len(detectors) == 6 and detectors["box IoU"].nunique() == 5
    names = {"minimum", "distribution", "scenes", "reliability", "targets"}
    assert {path.stem for path in figures.glob("*.png")} == names
