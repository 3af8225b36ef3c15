"""The grid on a real Slurm cluster of two nodes (slurm_cluster.sh), with everything going wrong that does there.

make test-slurm        needs Debian's slurm-wlm and munge; takes minutes
"""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import COMPENDIUM, DEADLINE, call, commit, environment, repository, until

LOSSES = ["cross_entropy", "label_smoothing", "brier", "focal1", "focal2", "focal3", "flsd53", "adafocal"]
MORE = {f"gamma{n}": {"function": "focal", "gamma": n / 4} for n in range(4)}
LONG = {"focal1": {"epochs": 200}, "focal2": {"epochs": 200}, "flsd53": {"epochs": 200}, "focal3": {"epochs": 1600}}
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
GRID = (*COMPENDIUM, "grid")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld", path=os.defpath + ":/usr/sbin") is None, reason="no Slurm here"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster: the variables to reach it, and a function that runs its commands."""
    folder = tmp_path_factory.mktemp("slurm")
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([CLUSTER, "start", folder], check=True, timeout=DEADLINE)

    def command(*words):
        done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield folder, variables, command
    subprocess.run([CLUSTER, "stop", folder])


def epochs_saved(copy, stage) -> list[int]:
    """Epochs of the checkpoints of a training, by its stage's name."""
    saved = (copy / "scratch" / "tiny" / stage.removeprefix("train@tiny-")).glob("*/[0-9]*.safetensors")
    return [int(path.name.split("-")[0]) for path in saved]


def results(copy):
    """All that trainings leave, but for provenance."""
    study = copy / "artifacts" / "tiny"
    found = [*study.glob("runs/*/*/*"), *study.glob("models/*"), *study.glob("notebooks/02_train/*")]
    return {str(path.relative_to(study)): path.read_bytes() for path in found}


def test_a_grid_survives_what_happens_on_a_cluster(slurm, tmp_path):
    folder, variables, command = slurm
    failing = {"label_smoothing": {"alpha": 7.0}}
    copy = repository(tmp_path / "slurm", [*LOSSES, *MORE], exceptions=LONG | failing, more_losses=MORE)
    (tmp_path / "slurm.yaml").write_text("cpus: 1\nmemory: 4\ntime: 10\n")
    run = (*GRID, "run", "--executor", "slurm", "--cluster", str(tmp_path / "slurm.yaml"))
    locked = []  # what dvc.lock says while tasks are at work
    with open(tmp_path / "said", "w") as said:
        head = subprocess.Popen(run, cwd=copy, env=environment(copy) | variables, stdout=said, stderr=said)

    def job_at_work(stage):
        """Its job, once the training has saved some epochs and is not over the half."""
        most = LONG[stage.removeprefix("train@tiny-").removesuffix("-0")]["epochs"] / 2
        grid = json.loads(next((copy / "scratch" / "grid").glob("*/grid.json")).read_text())
        return 3 < max(epochs_saved(copy, stage), default=0) < most and grid["stages"][stage]

    until(lambda: "submitted as job" in (tmp_path / "said").read_text())
    locked.append((copy / "dvc.lock").read_bytes())
    requeued, timed_out, killed, orphaned = (f"train@tiny-{loss}-0" for loss in LONG)
    command("scontrol", "requeue", until(lambda: job_at_work(requeued)))
    reached = {requeued: max(epochs_saved(copy, requeued))}
    end_of_time = ["scancel", "--signal=USR2", until(lambda: job_at_work(timed_out))]  # what Slurm sends then
    with suppress(subprocess.TimeoutExpired):  # the task requeues itself, which scancel takes for a failure
        subprocess.run(end_of_time, env=os.environ | variables, capture_output=True, timeout=1)
    reached[timed_out] = max(epochs_saved(copy, timed_out))
    command("scancel", until(lambda: job_at_work(killed)))
    node = command("squeue", "--noheader", f"--jobs={until(lambda: job_at_work(orphaned))}", "--format=%N").strip()
    os.kill(int((folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    until(lambda: "down" in command("sinfo", "--noheader", f"--nodes={node}", "--format=%T"))
    reached[orphaned] = max(epochs_saved(copy, orphaned))
    subprocess.run([CLUSTER, "node", folder, node], check=True)
    lowest = dict(reached)
    locked.append((copy / "dvc.lock").read_bytes())

    def over():
        for name, epoch in lowest.items():
            lowest[name] = min(epoch, max(epochs_saved(copy, name), default=epoch))
        return head.poll() is not None

    until(over, 2 * DEADLINE)
    output = (tmp_path / "said").read_text()

    assert head.returncode == 1 and lowest == reached, "each went on from its checkpoint"
    assert locked[0] == locked[1] != (copy / "dvc.lock").read_bytes(), "entered at the end, by the head alone"
    states = dict(re.findall(r"^(train@[^\s:]+) +(\w+)", output, re.M))
    expected = {"train@tiny-label_smoothing-0": "failed", killed: "cancelled"}
    assert len(states) == 12 and {name: state for name, state in states.items() if state != "done"} == expected
    assert "label_smoothing-0: focalcal: label_smoothing: alpha must" in output
    assert "10 results fetched from the cache; `dvc repro` has to run none" in output
    logs = {name: copy / log for name, log in re.findall(r"^(train@\S+) .* (\S+)$", output, re.M) if name in states}
    starts = {name: log.read_text().count("Running stage") for name, log in logs.items()}
    assert {name for name, count in starts.items() if count != 1} == {requeued, timed_out, orphaned}
    assert all(starts[name] == 2 for name in reached) and "Calling checkpoint" in logs[timed_out].read_text()

    assert epochs_saved(copy, killed), "its checkpoints are kept"
    commit(copy)
    again = call(copy, *run, fails=True, **variables)
    assert "10 of 12 stages are up to date." in again and "1 results fetched" in again

    with_dvc = ["adafocal", "gamma3"]
    alone = repository(tmp_path / "alone", with_dvc, exceptions=LONG, more_losses=MORE)
    call(alone, *GRID, "run", "--jobs", "2", OMP_NUM_THREADS="2")
    assert len(results(alone)) == 2 * 6 and results(alone).items() <= results(copy).items()
    short = [loss for loss in [*LOSSES, *MORE] if loss not in ("label_smoothing", *LONG, *with_dvc)]
    for losses in (short, ["focal1", "focal2", "flsd53"], ["focal3"]):  # the others without DVC, which takes longer
        call(alone, *COMPENDIUM, "train", "tiny", *losses)
    trained = results(alone)
    assert len(trained) == 11 * 5 + 2 and trained.items() <= results(copy).items()
    call(copy, "git", "checkout", "-q", "HEAD~1", "--", "dvc.lock")  # without what the command collected
    restored = call(copy, "dvc", "repro", "--keep-going", "train", fails=True)
    assert len(re.findall(r"Stage 'train@\S+' is cached - skipping run", restored)) == 11
    assert re.findall("Running stage '(.*)'", restored) == ["train@tiny-label_smoothing-0"]


def test_ctrl_c_leaves_the_jobs_alone(slurm, tmp_path):
    folder, variables, command = slurm
    variables = variables | {"SLURM_MEM_PER_CPU": "100"}  # as within a job: with it, srun refuses what we ask for
    copy = repository(tmp_path / "copy", ["focal1", "focal2", "focal3"], exceptions={"focal3": {"epochs": 5000}})
    (tmp_path / "slurm.yaml").write_text("cpus: 1\nmemory: 4\ntime: 10\n")
    run = (*GRID, "run", "--executor", "slurm", "--cluster", str(tmp_path / "slurm.yaml"), "train@*focal[12]*")
    head = subprocess.Popen(
        run, cwd=copy, env=environment(copy) | variables, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    said = ""
    while "submitted as job" not in said and (line := head.stdout.readline()):
        said += line
    assert "2 stages submitted as job" in said and "the default partition, 1 CPUs, no GPU, 4 GB, 10 minutes" in said
    head.send_signal(signal.SIGINT)
    rest = head.communicate(timeout=DEADLINE)[0]
    assert head.returncode == 130 and "The grid goes on. Follow it: python -m compendium grid status --wait" in rest
    assert "still runs some of these stages" in call(copy, *run, fails=True, **variables)
    name = re.search(r"status --wait (\S+)", rest)[1]
    output = call(copy, *GRID, "status", "--wait", name, **variables)
    assert "2 of 2 stages are done" in output and "2 results fetched" in output and "has to run none" in output

    lock = (copy / "dvc.lock").read_bytes()
    call(copy, "git", "checkout", "-q", "HEAD", "--", "dvc.lock")  # as if nobody had waited for them
    commands = call(copy, *run, **variables)
    assert "2 results of earlier grids fetched" in commands and "2 of 2 stages are up to date" in commands
    assert (copy / "dvc.lock").read_bytes() == lock

    long = subprocess.Popen([*run[:-1], "train@*focal3*"], cwd=copy, env=environment(copy) | variables)
    until(lambda: epochs_saved(copy, "train@tiny-focal3-0"))
    assert "is being stopped" in call(copy, *GRID, "cancel", **variables)
    assert long.wait(timeout=DEADLINE) == 1 and "cancelled" in call(copy, *GRID, "status", fails=True, **variables)
    assert command("squeue", "--noheader", "--states=running,pending", "--format=%i") == ""
