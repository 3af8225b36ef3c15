"""The grid on this machine: the real command, on a tiny study in a copy of this repository."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import call, environment, repository

from focalcal import grid, train

LOSSES = ["cross_entropy", "label_smoothing", "focal3"]
GRID = (sys.executable, "-m", "focalcal.grid")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return repository(tmp_path_factory.mktemp("copy"), LOSSES, more_losses={"label_smoothing": {"alpha": 7.0}})


def test_one_stage_fails_the_others_finish_and_dvc_has_nothing_left_to_run(copy):
    output = call(copy, *GRID, "run", "--jobs", "2", fails=True)
    states = dict(re.findall(r"^(train@[^\s:]+) +(\w+)", output, re.M))
    assert [states[f"train@tiny-{loss}-0"] for loss in LOSSES] == ["done", "failed", "done"]
    assert "train@tiny-label_smoothing-0: focalcal: label_smoothing: alpha must lie in [0, 1), got 7.0" in output
    assert "2 of 3 stages are done.\n`grid run` again runs those that are not done." in output
    for loss in ("cross_entropy", "focal3"):
        log = re.search(rf"^train@tiny-{loss}-0 .* (\S+)$", output, re.M)[1]
        assert '"threads": 1,' in (copy / "artifacts/tiny/provenance" / f"{loss}-0.json").read_text()
        assert "epoch" in (copy / log).read_text()
    (copy / "params.yaml").write_text((copy / "params.yaml").read_text().replace("alpha: 7.0", "alpha: 0.1"))
    output = call(copy, *GRID, "run", "--jobs", "2")
    assert "2 of 3 stages are up to date" in output and "1 of 1 stages are done.\n`dvc repro` runs what" in output
    assert "Running stage" not in call(copy, "dvc", "repro", "train")
    assert "3 of 3 stages are up to date" in call(copy, *GRID, "run")


def test_a_stopped_grid_goes_on(copy):
    parameters = yaml.safe_load((copy / "params.yaml").read_text())
    parameters["studies"]["tiny"]["exceptions"]["focal3"] = {"epochs": 400}
    (copy / "params.yaml").write_text(yaml.safe_dump(parameters))
    head = subprocess.Popen([*GRID, "run"], cwd=copy, env=environment(copy), stdout=subprocess.PIPE, text=True)
    saved = []
    while not saved:
        assert head.poll() is None
        saved = list((copy / "scratch/tiny").glob("focal3-0/*/[0-9]*.safetensors"))
        time.sleep(0.05)
    assert "running" in call(copy, *GRID, "status", fails=True)
    assert "is being stopped" in call(copy, *GRID, "cancel")
    assert "Stopped; what is done is kept" in head.communicate(timeout=30)[0] and head.returncode == 130
    assert list((copy / "scratch/tiny").glob("focal3-0/*/[0-9]*.safetensors"))
    assert "does not run any more" in call(copy, *GRID, "cancel", fails=True)
    assert "focal3-0 done computed" in " ".join(call(copy, *GRID, "run").split())


def test_no_grid_no_cluster_no_commit(copy, tmp_path):
    for arguments, sentence in (
        (["run", "trian@*"], "No stage matches 'trian@*'; `dvc stage list --all` names them."),
        (["run", "train@*", "scale@*"], "scale@tiny depends on train@tiny-cross_entropy-0, so they cannot run at once"),
        (["run", "--jobs", "0"], "--jobs must be 1 or more, got 0."),
        (["run", "--executor", "slrum"], "invalid choice: 'slrum' (choose from"),
        (["status", "yesterday"], "There is no such grid; started here: 2"),
    ):
        output = call(copy, *GRID, *arguments, fails=True)
        assert sentence in output and "Traceback" not in output
    for name in ("sbatch", "squeue", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    for path, sentence in (
        (os.environ["PATH"], "There is no sbatch here"),
        (f"{tmp_path}:{os.environ['PATH']}", "Tasks on the cluster work on a commit; commit first what is not: M"),
    ):
        if path.startswith(str(tmp_path)) or grid.shutil.which("sbatch") is None:
            here = environment(copy) | {"PATH": path}
            done = subprocess.run(
                [*GRID, "run", "--executor", "slurm"], cwd=copy, env=here, capture_output=True, text=True
            )
            assert done.returncode == 1 and done.stderr.startswith(f"focalcal: {sentence}")


def test_stages_that_a_clone_cannot_do_are_refused_for_slurm(copy, monkeypatch):
    monkeypatch.chdir(copy)
    with pytest.raises(ValueError, match="analyse@tiny-04_nll_divergence writes files that are not in DVC's cache"):
        grid.chosen(["analyse@*"], away=True)
    with pytest.raises(ValueError, match="prepare@tiny reads data that only this folder has"):
        grid.chosen(["prepare@*"], away=True)
    needs, before = grid.chosen(["train@*"], away=True)
    assert needs["train@tiny-focal3-0"] == ("strip", "prepare@tiny") and before == ["strip", "prepare@tiny"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("partitoin: gpu", "slurm.yaml has no setting 'partitoin'; it has: partition, time"),
        ("time: soon", "slurm.yaml.time: input should be a valid integer, got 'soon'"),
        ("gpus: -1", "slurm.yaml.gpus: input should be greater than or equal to 0, got -1"),
        ("- gpu", "slurm.yaml must consist of 'name: value' settings"),
        ("time: [", "slurm.yaml is not YAML: "),
    ],
)
def test_a_bad_cluster_file_is_refused_in_one_sentence(tmp_path, text, sentence):
    (tmp_path / "slurm.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        grid.cluster(tmp_path / "slurm.yaml")


def test_each_slot_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    seen = []

    class Executor(SimpleNamespace):
        def __init__(self, folder):
            super().__init__(update_parameters=lambda **_: None)

        def submit(self, task, stage):
            seen.append((stage, task.variables["CUDA_VISIBLE_DEVICES"]))
            return SimpleNamespace(job_id="1", done=lambda: True)

    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(grid.submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(grid, "_runs", lambda pid, argument: argument == "focalcal.grid")
    grid.run_local(grid.Grid(tmp_path / "scratch/grid/x", "local", "", 1, dict.fromkeys("abcd")), None)
    assert seen == [("a", "4"), ("b", "7"), ("c", "4"), ("d", "7")]


def test_without_a_shared_disk_the_run_cache_travels_through_a_remote(copy, tmp_path):
    call(copy, "dvc", "remote", "add", "--local", "lab", str(tmp_path / "lab"))
    call(copy, *GRID, "run", "train@tiny-focal3-0")
    call(copy, "dvc", "push", "--run-cache", "-r", "lab")
    head = tmp_path / "head"
    call(tmp_path, "git", "clone", "-q", copy, head)
    for name in ("params.yaml", "data", ".dvc/config.local"):
        call(copy, "cp", "-r", name, head / name)
    call(head, "dvc", "remote", "default", "--local", "lab")
    call(head, "dvc", "repro", "prepare@tiny")
    output = call(head, "dvc", "repro", "--pull", "train@tiny-focal3-0")
    assert "Running stage" not in output and output.count("is cached - skipping run") == 1
