"""The grid on this machine: what it refuses and asks for, and the real command on a tiny study in a copy."""

import os
import pickle
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dvc.repo import Repo
from helpers import write_parameters
from tiny import (
    COMPENDIUM,
    DEADLINE,
    REPOSITORY,
    call,
    changed,
    commit,
    environment,
    real_parameters,
    repository,
    stub,
    until,
)

from compendium import __main__ as command_line
from compendium import grid, stages, tasks
from focalcal import devices

LOSSES = ["cross_entropy", "label_smoothing", "focal3"]
GRID = (*COMPENDIUM, "grid")
MILD = {"label_smoothing": {"alpha": 0.1}}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A repository with three trainings that are none; what a training does has its own tests."""
    alpha = {"label_smoothing": {"alpha": 7.0}}
    copy = repository(tmp_path_factory.mktemp("copy"), LOSSES, more_losses=alpha)
    stub(copy)
    return copy


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """The working directory: the pipeline of this repository without anything to run it on or with."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("dvc.yaml", "data.dvc"):
        shutil.copy(REPOSITORY / name, folder)
    write_parameters(folder, real_parameters(LOSSES))
    (folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (folder / "published").mkdir()
    subprocess.run(["git", "init", "-q", folder], check=True)
    monkeypatch.chdir(folder)
    Repo.init(str(folder)).close()
    return folder


@pytest.fixture
def handlers_kept():
    """Signals do afterwards what they did before; a grid's command changes that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def started(copy):
    """`grid run` of the long training, stopped at the end if it still runs; what it prints can be read as text."""
    command = [*GRID, "run", "train@*focal3*"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=copy, env=environment(copy), text=True, start_new_session=True, **both) as head:
        try:
            yield head
        finally:
            if head.poll() is None:
                head.terminate()
                head.communicate(timeout=DEADLINE)


def at_work(copy) -> set[str]:
    """Names of the long training's starts."""
    return {path.name for path in (copy / "scratch/tiny/focal3-0/key").glob("at-work-*")}


@pytest.mark.whole
def test_one_stage_fails_the_others_finish_and_dvc_has_nothing_left_to_run(copy):
    output = call(copy, *GRID, "run", "--jobs", "2", fails=True)
    states = dict(re.findall(r"^(train@[^\s:]+) +(\w+)", output, re.M))
    assert [states[f"train@tiny-{loss}-0"] for loss in LOSSES] == ["done", "failed", "done"]
    assert "train@tiny-label_smoothing-0: focalcal: label_smoothing: alpha must lie in [0, 1), got 7.0" in output
    assert "2 of 3 stages are done.\n`grid run` again runs those that are not done." in output
    for loss in ("cross_entropy", "focal3"):
        log = re.search(rf"^train@tiny-{loss}-0 .* (\S+)$", output, re.M)[1]
        assert "epoch" in (copy / log).read_text()
        assert not (copy / f"scratch/tiny/{loss}-0").exists(), "checkpoints go once the results are in the cache"
    (copy / "params.yaml").write_text((copy / "params.yaml").read_text().replace("alpha: 7.0", "alpha: 0.1"))
    output = call(copy, *GRID, "run", "--jobs", "2")
    assert "2 of 3 stages are up to date" in output and "1 of 1 stages are done.\n`dvc repro` runs what" in output
    assert "Running stage" not in call(copy, "dvc", "repro", "train")


@pytest.mark.whole
def test_what_a_grid_depends_on_runs_first_however_far_above(copy):
    call(copy, *GRID, "run", "train@*cross_entropy*")
    notebook = copy / "notebooks/01_prepare.ipynb"
    notebook.write_text(notebook.read_text().replace('"config = ', '"anew = config = ', 1))
    output = call(copy, *GRID, "run", "train@*cross_entropy*")  # strip first, and only then is prepare outdated
    assert "Running stage 'prepare@tiny'" in output and "1 of 1 stages are up to date" in output


@pytest.mark.whole
def test_a_stopped_grid_goes_on(copy):
    with changed(copy, real_parameters(LOSSES, exceptions={"focal3": {"epochs": 2}}, more_losses=MILD)):
        with started(copy) as head:
            until(lambda: at_work(copy) or head.poll() is not None)
            assert "running" in call(copy, *GRID, "status", fails=True)
            assert "is being stopped" in call(copy, *GRID, "cancel")
            output = head.communicate(timeout=DEADLINE)[0]
            assert "Stopped; what is done is kept" in output and "Traceback" not in output and head.returncode == 130
        assert "does not run any more" in call(copy, *GRID, "cancel", fails=True)

        before = at_work(copy)
        assert len(before) == 1, "what it had saved is still there"
        with started(copy) as head:  # `timeout make grid` and the like end a whole group, and tasks are told twice
            until(lambda: at_work(copy) > before or head.poll() is not None)
            os.killpg(head.pid, signal.SIGTERM)
            assert "Stopped; what is done is kept" in head.communicate(timeout=DEADLINE)[0]
        assert subprocess.run(["pgrep", "-f", "repro --single-item train@tiny-focal3-0"]).returncode == 1

        before = at_work(copy)
        with started(copy) as head:
            until(lambda: at_work(copy) > before or head.poll() is not None)
            head.kill()
            assert head.wait() == -signal.SIGKILL, "it was still at work"
            assert "is being stopped" in call(copy, *GRID, "cancel"), "also without the process that started it"
            until(lambda: "does not run any more" in call(copy, *GRID, "cancel", fails=None))
        (copy / "go").touch()
        output = call(copy, *GRID, "run", "train@*focal3*")
        assert "focal3-0 done computed" in " ".join(output.split()) and not at_work(copy)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "trian@*"], "No stage matches 'trian@*'; `dvc stage list` names all that params.yaml activates."),
        (
            ["run", "train@*", "scale@*"],
            "scale@tiny depends on train@tiny-cross_entropy-0, so they cannot run at once",
        ),
        (["run", "--jobs", "0"], "--jobs must be 1 or more, got 0."),
        (["run", "--cluster", "slurm.yaml"], "--cluster says what to ask Slurm for; it goes with --executor slurm."),
        (["status", "yesterday"], "No grid was started here."),
        (["cancel"], "No grid was started here."),
    ],
)
def test_what_is_no_grid_is_refused_in_one_sentence(bare, handlers_kept, arguments, sentence):
    with pytest.raises(SystemExit) as refused:
        command_line.main(["grid", *arguments])
    assert str(refused.value).startswith(f"focalcal: {sentence}")


def test_a_grid_is_where_its_folder_is_and_none_is_ones_own(bare):
    """A compendium that was moved, in a container whose process numbers begin anew."""
    started = grid.Grid(bare / "elsewhere", "local", "", os.getpid(), {"train@tiny-focal1-0": None})
    started.save()
    (bare / "scratch/grid").mkdir(parents=True)
    (bare / "elsewhere").rename(bare / "scratch/grid/moved")
    assert grid.opened(None).folder == bare / "scratch/grid/moved"
    assert grid.ended_elsewhere(["train@tiny-focal1-0"]) == {}


def test_no_cluster_no_commit(bare, handlers_kept, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["grid", "run", "--executor", "slrum"])
    assert "invalid choice: 'slrum' (choose from" in capsys.readouterr().err
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(SystemExit, match="focalcal: There is no sbatch here"):
        command_line.main(["grid", "run", "--executor", "slurm"])
    for name in ("sbatch", "squeue"):
        (commands / name).touch(0o755)
    with pytest.raises(SystemExit, match="focalcal: Tasks on the cluster work on a commit; commit first what is not: "):
        command_line.main(["grid", "run", "--executor", "slurm"])


def test_stages_that_a_clone_cannot_do_are_refused_for_slurm(bare):
    with pytest.raises(ValueError, match="analyse@tiny-04_nll_divergence writes files that are not in DVC's cache"):
        stages.matching(["analyse@*"], in_clones=True)
    with pytest.raises(ValueError, match="prepare@tiny reads data that only this folder has"):
        stages.matching(["prepare@*"], in_clones=True)
    needs, before = stages.matching(["train@*"], in_clones=True)
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


@pytest.fixture
def tasks_seen(tmp_path, monkeypatch):
    """What run_local starts, as (stage, its environment); every task is over at once."""
    seen = []

    class Executor(SimpleNamespace):
        def __init__(self, folder):
            super().__init__(update_parameters=lambda **_: None)

        def submit(self, task, stage):
            seen.append((stage, task.variables))
            return SimpleNamespace(job_id="1", done=lambda: True)

    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid.submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(grid, "process_runs", lambda pid, argument: argument == "compendium grid")
    return seen


def test_each_slot_has_a_gpu_of_its_own(tasks_seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda"))
    grid.run_local(grid.Grid(tmp_path / "scratch/grid/x", "local", "", 1, dict.fromkeys("abcd")), None)
    given = [(stage, variables["CUDA_VISIBLE_DEVICES"]) for stage, variables in tasks_seen]
    assert given == [("a", "4"), ("b", "7"), ("c", "4"), ("d", "7")]


def test_each_slot_has_its_share_of_the_threads_however_few_stages_are_left(tasks_seen, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(devices, "device", lambda: torch.device("cpu"))
    grid.run_local(grid.Grid(tmp_path / "scratch/grid/x", "local", "", 1, dict.fromkeys("ab")), 3)
    assert [(stage, variables["OMP_NUM_THREADS"]) for stage, variables in tasks_seen] == [("a", "2"), ("b", "2")]
    assert not {"CUDA_VISIBLE_DEVICES", "FOCALCAL_DEVICE"} & set(tasks_seen[0][1])


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


def test_what_slurm_is_asked_for(bare, monkeypatch):
    asked = {}

    class Executor(grid.submitit.SlurmExecutor):
        @classmethod
        def affinity(cls):  # how submitit finds out whether there is a srun
            return 2

        def map_array(self, task, names, needs):
            asked[names[0]] = self._make_submission_file_text("true", "x"), task.variables["FOCALCAL_DEVICE"]
            if len(asked) == 2:
                raise grid.FailedJobError("sbatch: error: AssocMaxSubmitJobLimit")
            return [SimpleNamespace(job_id=f"7_{number}") for number, _ in enumerate(names)]

    monkeypatch.setattr(grid.submitit, "SlurmExecutor", Executor)
    wanted = grid.Cluster(partition="long", gpus=2, gpu_type="a100", time=90, array=2, setup=["module load cuda"])
    names = ["train@a", "train@b", "train@c"]
    started = grid.Grid(bare / "scratch/grid/asked", "slurm", "HEAD", os.getpid(), dict.fromkeys(names))
    started.save()
    grid.submit_slurm(started, dict.fromkeys(names, ()), wanted, 5)
    text, device = asked["train@a"]
    assert device == "cuda" and "\nmodule load cuda\n" in text
    for line in ("gres=gpu:a100:2", "partition=long", "time=90", "mem=16GB", "requeue"):
        assert f"#SBATCH --{line}\n" in text, line
    assert started.stages == {"train@a": "7_0", "train@b": "7_1", "train@c": None}
    monkeypatch.setattr(grid.Grid, "_slurm_states", lambda self: {})
    assert started.rows()["train@c"]["state"] == "not started"


def test_what_slurm_says_of_a_task_and_what_its_result_says(bare, monkeypatch):
    """squeue's words, and the pickles that submitit leaves, by task: 7_0 waits ... 7_4 is over and forgotten."""
    said = ["7_0|PENDING|Resources", "7_1|RUNNING|None", "7_2|OUT_OF_MEMORY|None", "7_3|COMPLETED|None"]
    commands = bare / "commands"
    commands.mkdir()
    (commands / "squeue").write_text("#!/bin/sh\necho '" + "\n".join(said) + "'\n")
    (commands / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    names = [f"train@{letter}" for letter in "abcde"]
    jobs = {name: f"7_{number}" for number, name in enumerate(names)}
    begun = grid.Grid(bare / "scratch/grid/asked", "slurm", "HEAD", os.getpid(), jobs)
    begun.save()
    for name, outcome in (("train@c", ("error", "killed")), ("train@d", ("success", {"how": "computed"}))):
        path = grid.JobPaths(begun.logs(name), jobs[name], 0).result_pickle
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(outcome))
    rows = {name: (row["state"], row["note"]) for name, row in begun.rows().items()}
    assert rows["train@a"] == ("waiting", "Resources") and rows["train@b"] == ("running", "")
    assert rows["train@c"] == ("failed", "killed (Slurm: OUT_OF_MEMORY)")
    assert rows["train@d"] == ("done", "computed") and rows["train@e"] == ("stopped", "")
    with pytest.raises(RuntimeError, match="Grid asked still runs some of these stages"):
        grid.ended_elsewhere(names)
    (commands / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert begun.rows()["train@a"]["state"] == "running", "squeue is silent"
    with pytest.raises(RuntimeError, match="Slurm does not answer, so whether grid asked still runs them"):
        grid.ended_elsewhere(names)


def test_the_time_that_is_left_by_hand():
    """10 and 20 s were computed; four at work are half done, six wait: 15 x (2 + 6) / 4."""
    rows = {s: {"note": "computed", "result": {"seconds": s}} for s in (10, 20)}
    rows[1] = {"note": "from the cache", "result": {"seconds": 1}}
    assert grid.time_left(rows, 4, 6) == ", about 0:00:30 left" and grid.time_left(rows, 0, 6) == ""


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints_are_removed_from_scratch_only(tmp_path, monkeypatch, handlers_kept, inside):
    scratch = tmp_path / "scratch"
    kept = (scratch if inside else tmp_path) / "tiny/focal3-0/key"
    kept.mkdir(parents=True)

    def dvc(*_, FOCALCAL_KEEP_CHECKPOINTS, **__):
        Path(FOCALCAL_KEEP_CHECKPOINTS).write_text(str(kept))
        return "computed"

    monkeypatch.setattr(tasks, "dvc", dvc)
    assert tasks.Task(tmp_path, {"FOCALCAL_SCRATCH": str(scratch)})("train@x")["how"] == "computed"
    assert kept.parent.exists() != inside and not list((scratch / "grid/stages").glob("*.checkpoints"))


@pytest.mark.whole
def test_what_a_clone_did_is_entered_unless_settings_have_changed(copy, monkeypatch, handlers_kept):
    """As on a cluster, while which somebody edits params.yaml."""
    stage = "train@tiny-focal3-0"
    write_parameters(copy, real_parameters(LOSSES, exceptions={"focal3": {"clip": 1.0}}, more_losses=MILD))
    commit(copy)
    call(copy, "dvc", "repro", "prepare@tiny")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    settings = {
        "commit": "HEAD",
        "lock": copy / "dvc.lock",
        "cache": str(copy / ".dvc/cache"),
        "folder": str(copy / "scratch"),
    }
    done = tasks.Task(copy, {"FOCALCAL_SCRATCH": str(copy / "scratch")}, settings)(stage, ("strip", "prepare@tiny"))
    assert done["how"] == "computed" and not list((copy / "scratch").glob("focalcal-*"))
    entry, lock = {stage: done["entry"]}, (copy / "dvc.lock").read_bytes()
    with changed(copy, real_parameters(LOSSES, exceptions={"focal3": {"clip": 3.0}}, more_losses=MILD)):
        assert stages.collect(entry) == ([], [stage], []) and (copy / "dvc.lock").read_bytes() == lock
    shutil.rmtree(copy / "artifacts/tiny/runs/focal3")
    assert stages.collect(entry) == ([stage], [], [])
    assert (copy / "artifacts/tiny/runs/focal3/0/history.csv").exists()
    assert stages.collect(entry) == ([], [], []), "up to date"


@pytest.mark.whole
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
