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

from compendium import grid, stages, tasks
from focalcal import train

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

    reached = max(path.name for path in (copy / "scratch/tiny").glob("focal3-0/*/[0-9]*.safetensors"))
    head = subprocess.Popen([*GRID, "run"], cwd=copy, env=environment(copy), stdout=subprocess.DEVNULL)
    while min((p.name for p in (copy / "scratch/tiny").glob("focal3-0/*/[0-9]*.safetensors")), default="") <= reached:
        assert head.poll() is None
        time.sleep(0.05)
    head.kill()
    head.wait()
    assert "is being stopped" in call(copy, *GRID, "cancel"), "also without the process that started it"
    while "does not run any more" not in call(copy, *GRID, "cancel", fails=None):
        time.sleep(0.2)
    assert "focal3-0 done computed" in " ".join(call(copy, *GRID, "run").split())


def test_no_grid_no_cluster_no_commit(copy, tmp_path):
    for arguments, sentence in (
        (["run", "trian@*"], "No stage matches 'trian@*'; `dvc stage list --all` names them."),
        (["run", "train@*", "scale@*"], "scale@tiny depends on train@tiny-cross_entropy-0, so they cannot run at once"),
        (["run", "--jobs", "0"], "--jobs must be 1 or more, got 0."),
        (["run", "--cluster", "slurm.yaml"], "--cluster says what to ask Slurm for; it goes with --executor slurm."),
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
        stages.chosen(["analyse@*"], away=True)
    with pytest.raises(ValueError, match="prepare@tiny reads data that only this folder has"):
        stages.chosen(["prepare@*"], away=True)
    needs, before = stages.chosen(["train@*"], away=True)
    assert needs["train@tiny-focal3-0"] == ("strip", "prepare@tiny") and before == ["strip", "prepare@tiny"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("partitoin: gpu", "slurm.yaml has no setting 'partitoin'; it has: partition, time"),
        ("time: soon", "slurm.yaml.time: input should be a valid integer, got 'soon'"),
        ("time: 12:00:00", "slurm.yaml.time: input should be a valid integer, got '12:00:00'"),  # not in seconds
        ("gpu_type: a100", "slurm.yaml.gpu_type: input needs gpus, how many of them, beside it, got 'a100'"),
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


@pytest.mark.parametrize(
    ("visible", "device", "seen", "gpus"),
    [
        (None, "cuda", 2, ["0", "1"]),
        (None, "cuda:1", 4, ["1"]),
        ("GPU-5a,GPU-7b", "cuda:1", 2, ["GPU-7b"]),
        ("MIG-a,MIG-b,MIG-c", "cuda", 1, ["MIG-a", "MIG-b", "MIG-c"]),
    ],
)
def test_gpus_are_those_that_this_process_may_use(monkeypatch, visible, device, seen, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert grid.visible_gpus(torch.device(device), seen) == gpus


def test_what_slurm_is_asked_for(copy, monkeypatch):
    asked = {}

    class Executor(grid.submitit.SlurmExecutor):
        def __init__(self, folder, max_num_timeout):
            super(grid.submitit.SlurmExecutor, self).__init__(folder, max_num_timeout=max_num_timeout)

        def map_array(self, task, names, needs):
            asked[names[0]] = self._make_submission_file_text("true", "x"), task.variables["FOCALCAL_DEVICE"]
            if len(asked) == 2:
                raise grid.FailedJobError("sbatch: error: AssocMaxSubmitJobLimit")
            return [SimpleNamespace(job_id=f"7_{number}") for number, _ in enumerate(names)]

    monkeypatch.chdir(copy)
    monkeypatch.setattr(grid.submitit, "SlurmExecutor", Executor)
    wanted = grid.Cluster(partition="long", gpus=2, gpu_type="a100", time=90, array=2, setup=["module load cuda"])
    names = ["train@a", "train@b", "train@c"]
    started = grid.Grid(copy / "scratch/grid/asked", "slurm", "HEAD", os.getpid(), dict.fromkeys(names))
    started.save()
    grid.submit_slurm(started, dict.fromkeys(names, ()), wanted, 5)
    text, device = asked["train@a"]
    assert device == "cuda" and "\nmodule load cuda\n" in text
    for line in ("gres=gpu:a100:2", "partition=long", "time=90", "mem=16GB", "requeue"):
        assert f"#SBATCH --{line}\n" in text, line
    assert started.stages == {"train@a": "7_0", "train@b": "7_1", "train@c": None}
    monkeypatch.setattr(grid.Grid, "_slurm_states", lambda self: {})
    assert started.rows()["train@c"]["state"] == "not started"


def test_results_of_other_settings_are_not_entered(copy, monkeypatch):
    """As after a grid on a cluster, while which somebody edits params.yaml."""
    monkeypatch.chdir(copy)
    call(copy, *GRID, "run", "train@tiny-focal3-0")
    lock, parameters = (copy / "dvc.lock").read_bytes(), (copy / "params.yaml").read_text()
    entry = {"train@tiny-focal3-0": tasks.load_yaml("dvc.lock")["stages"]["train@tiny-focal3-0"]}
    assert stages.collect(entry) == ([], [], []), "up to date"
    (copy / "artifacts/tiny/runs/focal3/0/history.csv").unlink()
    assert stages.collect(entry) == (["train@tiny-focal3-0"], [], [])
    assert (copy / "artifacts/tiny/runs/focal3/0/history.csv").exists()
    (copy / "params.yaml").write_text(parameters.replace("clip: 2.0", "clip: 3.0"))
    assert stages.collect(entry) == ([], ["train@tiny-focal3-0"], [])
    (copy / "params.yaml").write_text(parameters)
    assert (copy / "dvc.lock").read_bytes() == lock


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
