"""The real pipeline, at a tiny size on scikit-learn's digits, in a copy of this repository."""

import json
import re
import shutil
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from tiny import COMPENDIUM, call, parameters, repository, write_parameters

LOSSES = ["cross_entropy", "focal1", "adafocal"]
CHAPTERS = ["04_nll_divergence", "05_weight_norms", "06_gamma_selection", "07_reliability", "08_results"]
CHAPTERS += ["09_out_of_distribution", "10_evidence", "11_calibratability", "15_selective_prediction"]
ELSEWHERE = """
from compendium import prepare, publish, trainings
for study in ("small", "large"):
    prepare.write_prepared(study)
    trainings.train_jobs(study, ["cross_entropy", "focal1"], 0)
    publish.pack(study)
"""
OPENED = """
import sys
from pathlib import Path
from compendium import notebook
for name in sys.argv[1:]:
    notebook.execute(Path("opened", f"{name}.ipynb"), Path("executed", f"{name}.ipynb"), {})
"""

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    copy = repository(tmp_path_factory.mktemp("copy"), LOSSES)
    with open(copy / "papers/published.csv", "a") as file:  # as if they had tried these digits
        file.write("digits,small_resnet,focal1,ece_percent,4.5,1.5,1.2,nobody,copied\n")
    return copy


def stages_that_ran(output: str) -> list[str]:
    return re.findall("Running stage '(.*)'", output)


def test_repro_makes_everything_and_then_nothing(copy):
    ran = stages_that_ran(call(copy, "dvc", "repro"))
    assert ran[6:] == [f"analyse@tiny-{chapter}" for chapter in CHAPTERS]
    study, figures = copy / "artifacts" / "tiny", copy / "figures" / "tiny"
    for loss in LOSSES:
        assert len(pd.read_csv(study / "runs" / loss / "0" / "history.csv")) == 3
        record = json.loads((study / "provenance" / f"{loss}-0.json").read_text())
        assert record["device"].startswith("cpu") and record["threads"] == 1
    assert set(pd.read_csv(study / "temperatures.csv").loss) == set(LOSSES)
    assert {path.stem for path in (figures / "08_results/metrics").iterdir()} == set(LOSSES)
    assert 0 <= json.loads((figures / "08_results/metrics/adafocal.json").read_text())["error_percent"] <= 100
    against = pd.read_csv(figures / "08_results/against-papers.csv", index_col=0)
    assert list(against.columns[:4]) == ["ECE %", "ECE % (papers)", "difference", "verdict"]
    assert against["ECE % (papers)"].dropna().tolist() == [4.5]
    assert len(list(figures.rglob("*.png"))) >= 10
    assert stages_that_ran(call(copy, "dvc", "repro")) == []


def test_the_metrics_have_a_row_for_each_loss(copy):
    lines = call(copy, "dvc", "metrics", "show").splitlines()
    assert lines[0].split()[:2] == ["Path", "ece_percent"]
    shown = {line.split()[0].rsplit("/", 1)[1]: line.split()[1:] for line in lines[1:]}
    assert set(shown) == {f"{loss}.json" for loss in LOSSES} and {len(numbers) for numbers in shown.values()} == {4}


def test_saving_a_notebook_in_jupyterlab_leaves_training_valid(copy):
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


def test_how_a_curve_is_drawn_is_no_reason_to_train(copy):
    plots = copy / "src/focalcal/plots.py"
    before = plots.read_text()
    plots.write_text(before + "\n# wider lines\n")
    stale = re.findall(r"^(\S+):$", call(copy, "dvc", "status"), re.M)
    plots.write_text(before)
    assert stale == [f"analyse@tiny-{chapter}" for chapter in CHAPTERS]


def test_a_forced_run_gives_the_same_bytes(copy):
    def contents():
        study = copy / "artifacts" / "tiny"
        made = [*study.glob("runs/adafocal/0/*"), *study.glob("notebooks/02_train/adafocal-0.ipynb")]
        made += [*study.glob("notebooks/07*"), *(copy / "figures/tiny/07_reliability").iterdir()]
        return {path: path.read_bytes() for path in made}

    before = contents()
    call(copy, "dvc", "repro", "-f", "-s", "train@tiny-adafocal-0", "analyse@tiny-07_reliability")
    assert contents() == before and len(before) > 8


def test_a_reader_chooses_one_loss_at_the_top_of_a_chapter(copy):
    figures = {path: path.read_bytes() for path in (copy / "figures").rglob("*.*")}
    assert sorted(path.name for path in (copy / "figures/tiny").iterdir()) == CHAPTERS
    (copy / "opened").mkdir()
    for chapter in CHAPTERS:
        opened = nbformat.read(copy / "notebooks" / f"{chapter}.ipynb", 4)
        cell = next(cell for cell in opened.cells if "parameters" in cell.metadata.get("tags", []))
        assert cell.source.startswith('study = "fashion-350"\nonly = []')
        cell.source = 'study = "tiny"\nonly = ["adafocal"]'
        nbformat.write(opened, copy / "opened" / f"{chapter}.ipynb")
    call(copy, sys.executable, "-c", OPENED, *CHAPTERS)
    for chapter in CHAPTERS:
        drawn = copy / "scratch/figures/tiny" / chapter
        assert list(drawn.glob("*.png"))
        for table in drawn.glob("*.csv"):
            assert not {"cross_entropy", "Cross-entropy"} & set(re.split(r"[,\n]", table.read_text())), table
    assert figures == {path: path.read_bytes() for path in (copy / "figures").rglob("*.*")}


def test_published_runs_are_analysed_like_ones_own_and_swept_over_sizes(copy):
    before, changed = (copy / "params.yaml").read_text(), parameters(LOSSES)
    sizes = {"small": 100, "far": 300, "large": 500}
    for study, size in sizes.items():
        tiny = changed["studies"]["tiny"]
        changed["studies"][study] = tiny | {"data": tiny["data"] | {"train": size}}
    sweeps = {"sizes": {"small": "small", "middle": "far", "large": "large", "plain": "small", "whole": "large"}}
    changed["active"] |= {"published": list(sizes), "analysed": ["far"], "sweeps": sweeps}
    changed["active"]["comparisons"] = {
        "more": {"notebook": "17_beyond_focal", "study": "small", "beside": "far"},
        "less": {"notebook": "18_augmentation", "study": "small", "beside": "large"},
    }
    write_parameters(copy, changed)
    call(copy, sys.executable, "-c", ELSEWHERE)
    for part in ("runs", "provenance"):
        shutil.copytree(copy / "artifacts/tiny" / part, copy / "artifacts/far" / part)
    call(copy, *COMPENDIUM, "publish", "pack", "far")
    for study in sizes:
        shutil.rmtree(copy / "artifacts" / study)
    said = call(copy, *COMPENDIUM, "publish", "add", *(f"{study}.tar" for study in sizes))
    assert said.count("Published") == 3

    analyses = [f"analyse-published@far-{chapter}" for chapter in ("04_nll_divergence", "08_results")]
    groups = ["choose-gamma@sizes", "compare@more", "compare@less"]
    ran = stages_that_ran(call(copy, "dvc", "repro", *groups, *analyses))
    wanted = [f"{stage}@{study}" for study in sizes for stage in ("take", "scale-published")]
    assert sorted(ran) == sorted([*wanted, *groups, *analyses])
    near, far = (pd.read_csv(copy / "artifacts" / study / "metrics.csv") for study in ("tiny", "far"))
    assert (near.drop(columns="value") == far.drop(columns="value")).all(axis=None)
    assert abs(near.value - far.value).max() < 1e-3
    assert (copy / "figures/far/04_nll_divergence/test-nll.png").is_file()

    figures = copy / "figures/sizes/12_choosing_gamma"
    swept = pd.read_csv(figures / "sweep.csv")
    assert swept.groupby("train").loss.unique().map(list).to_dict() == {100: LOSSES[:2], 300: LOSSES, 500: LOSSES[:2]}
    for study, size in sizes.items():
        known = pd.read_csv(copy / "artifacts" / study / "metrics.csv").query("scaling == 'none' and metric == 'nll'")
        assert swept[swept.train == size].nll.values == pytest.approx(known.value.values, rel=1e-5)
    chosen = pd.read_csv(figures / "chosen.csv").query("chosen == 'in hindsight'").set_index("images")
    least = swept[(swept.split == "test") & swept.gamma.notna()].groupby("train").ece.min()
    assert set(chosen.gamma) <= {0, 1} and chosen.ece.to_dict() == pytest.approx(least.to_dict())
    assert {path.name for path in figures.glob("*.png")} == {
        f"{n}.png" for n in ("sweep", "training-side", "pairs", "schedules", "which-loss")
    }

    change = pd.read_csv(copy / "figures/less/18_augmentation/change.csv", index_col="loss")
    for study, column in (("small", "with"), ("large", "without")):
        known = pd.read_csv(copy / "artifacts" / study / "metrics.csv").query("scaling == 'none' and split == 'test'")
        known = 100 * known.pivot(index="loss", columns="metric", values="value")
        expected = known.confidence - (100 - known.error)
        assert change[column].to_dict() == pytest.approx(expected.to_dict(), abs=1e-3)

    figures = copy / "figures/more/17_beyond_focal"
    assert pd.read_csv(figures / "results.csv").loss.tolist() == ["cross_entropy", "focal1", "adafocal"]
    pairs = pd.read_csv(figures / "verdicts.csv").query("metric == 'ece' and scaling == 'none'")
    known = pd.read_csv(copy / "artifacts/small/metrics.csv").query("scaling == 'none' and split == 'test'")
    known = known[known.metric == "ece"].set_index("loss").value
    assert pairs[["one", "other"]].values.tolist() == [["focal1", "cross_entropy"]]
    assert pairs.difference.item() == pytest.approx(100 * (known.focal1 - known.cross_entropy), rel=1e-3)
    (copy / "params.yaml").write_text(before)


def test_detectors_are_trained_and_measured(copy):
    before, changed = (copy / "params.yaml").read_text(), parameters(LOSSES)
    changed["active"]["detectors"] = ["boxes"]
    write_parameters(copy, changed)
    assert stages_that_ran(call(copy, "dvc", "repro", "detect@boxes"))[-1] == "detect@boxes"
    figures = copy / "figures/boxes/16_generalized_focal"
    runs = pd.read_csv(figures / "detectors.csv")
    assert runs.groupby("detector").seed.apply(list).map(lambda seeds: seeds == [0, 1]).all() and len(runs) == 12
    assert runs[["AP", "gap"]].stack().between(0, 1).all()
    names = {"minimum", "distribution", "scenes", "reliability", "targets"}
    assert {path.stem for path in figures.glob("*.png")} == names
    (copy / "params.yaml").write_text(before)


def test_a_study_is_trained_here_or_taken_not_both(copy):
    before, changed = (copy / "params.yaml").read_text(), parameters(LOSSES)
    changed["active"]["published"] = ["tiny"]
    write_parameters(copy, changed)
    said = call(copy, *COMPENDIUM, "data", fails=True).splitlines()
    assert len(said) == 1 and said[0].startswith(
        "focalcal: 'tiny' stands under active.studies and active.published in params.yaml: its runs are either"
    )
    (copy / "params.yaml").write_text(before)


def test_an_experiment_trains_what_it_changes(copy):
    before = {name: (copy / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    options = ["--set-param", "shared.losses.focal1.gamma=1.5", "train@tiny-focal1-0"]
    assert stages_that_ran(call(copy, "dvc", "exp", "run", *options)) == ["train@tiny-focal1-0"]
    assert yaml.safe_load((copy / "params.yaml").read_text())["shared"]["losses"]["focal1"]["gamma"] == 1.5
    for name, content in before.items():
        (copy / name).write_bytes(content)
    call(copy, "dvc", "checkout", "--force")
    assert stages_that_ran(call(copy, "dvc", "repro")) == []


def test_a_bad_setting_fails_with_one_sentence_and_keeps_the_cache(copy):
    before, changed = (copy / "params.yaml").read_text(), parameters(LOSSES)
    changed["studies"]["tiny"]["training"]["network"] = "resnet9000"
    write_parameters(copy, changed)
    output = call(copy, "dvc", "repro", "train@tiny-cross_entropy-0", fails=True)
    assert "focalcal: Unknown network 'resnet9000'; choose one of: small_resnet" in output
    (copy / "params.yaml").write_text(before)
    call(copy, "dvc", "checkout")
    assert stages_that_ran(call(copy, "dvc", "repro")) == []
