"""The real pipeline, at a tiny size on scikit-learn's digits, in a copy of this repository."""

import json
import re
import shutil
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from tiny import call, repository

LOSSES = ["cross_entropy", "adafocal"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return repository(tmp_path_factory.mktemp("copy"), LOSSES)


def test_repro_makes_everything_and_then_nothing(copy):
    call(copy, "dvc", "repro")
    study = copy / "artifacts" / "tiny"
    for loss in LOSSES:
        assert len(pd.read_csv(study / "runs" / loss / "0" / "history.csv")) == 3
        assert json.loads((study / "provenance" / f"{loss}-0.json").read_text())["device"].startswith("cpu")
    assert set(pd.read_csv(study / "temperatures.csv").loss) == set(LOSSES)
    metrics = json.loads((copy / "figures/tiny/08_results/metrics.json").read_text())
    assert list(metrics) == LOSSES and 0 <= metrics["adafocal"]["error_percent"] <= 100
    assert len(list((copy / "figures" / "tiny").rglob("*.png"))) >= 10
    assert "Running stage" not in call(copy, "dvc", "repro")


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
    output = call(copy, "dvc", "repro")
    assert "Running stage 'strip'" in output and "Running stage 'train" not in output


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
    chapters = sorted((copy / "figures/tiny").iterdir())
    assert [chapter.name[:2] for chapter in chapters] == ["04", "05", "06", "07", "08", "09", "10", "11"]
    for chapter in chapters:
        opened = nbformat.read(copy / "notebooks" / f"{chapter.name}.ipynb", 4)
        cell = next(cell for cell in opened.cells if "parameters" in cell.metadata.get("tags", []))
        assert cell.source.startswith('study = "fashion"\nonly = []')
        cell.source = 'study = "tiny"\nonly = ["adafocal"]'
        nbformat.write(opened, copy / "opened.ipynb")
        call(copy, sys.executable, "-m", "focalcal.notebook", "opened.ipynb", "executed.ipynb")
        drawn = copy / "scratch/figures/tiny" / chapter.name
        assert list(drawn.glob("*.png"))
        for table in drawn.glob("*.csv"):
            assert not {"cross_entropy", "Cross-entropy"} & set(re.split(r"[,\n]", table.read_text())), table
    assert figures == {path: path.read_bytes() for path in (copy / "figures").rglob("*.*")}


def test_published_runs_are_analysed_like_ones_own(copy):
    parameters = (copy / "params.yaml").read_text()
    changed = yaml.safe_load(parameters)
    changed["studies"]["far"] = changed["studies"]["tiny"] | {
        "papers": {"dataset": "digits", "network": "small_resnet"}
    }
    changed["active"]["published"] = ["far"]
    (copy / "params.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    for part in ("runs", "provenance"):
        shutil.copytree(copy / "artifacts/tiny" / part, copy / "artifacts/far" / part)
    call(copy, sys.executable, "-m", "focalcal.publish", "pack", "far")
    shutil.rmtree(copy / "artifacts/far")
    assert "Published" in call(copy, sys.executable, "-m", "focalcal.publish", "add", "far.tar")
    output = call(copy, "dvc", "repro")
    assert "analyse-published@far-08_results" in output and "Running stage 'train" not in output
    near, far = (pd.read_csv(copy / "artifacts" / study / "metrics.csv") for study in ("tiny", "far"))
    near = near[near.loss.isin(LOSSES)].sort_values(["loss", "split", "scaling", "metric"]).value
    assert abs(near.values - far.sort_values(["loss", "split", "scaling", "metric"]).value.values).max() < 1e-3
    against = pd.read_csv(copy / "figures/far/08_results/against-papers.csv", index_col=0)
    assert list(against.columns[:4]) == ["ECE %", "ECE % (papers)", "difference", "verdict"]
    assert (copy / "figures/far/04_nll_divergence/test-nll.png").is_file()
    (copy / "params.yaml").write_text(parameters)


def test_a_bad_setting_fails_with_one_sentence_and_keeps_the_cache(copy):
    parameters = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(parameters.replace("network: small_resnet\n", "network: resnet9000\n"))
    output = call(copy, "dvc", "repro", "train@tiny-cross_entropy-0", fails=True)
    assert "focalcal: Unknown network 'resnet9000'; choose one of: small_resnet" in output
    (copy / "params.yaml").write_text(parameters)
    call(copy, "dvc", "checkout")
    assert "Running stage" not in call(copy, "dvc", "repro")
