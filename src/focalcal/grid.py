"""Many stages at once: on the cores and GPUs of this machine, or as an array job on a Slurm cluster.

    python -m focalcal.grid run [--executor local|slurm] [--jobs N] [--cluster FILE] [GLOB...]
    python -m focalcal.grid status [--wait] [GRID]
    python -m focalcal.grid cancel [GRID]

A grid is all stages of dvc.yaml whose names match a GLOB (by default 'train@*') and that are not up to date; none may
depend on another. What they depend on runs first, here. Then each is `dvc repro --single-item STAGE`: in this folder,
one in each of N slots, or on Slurm in a clone of the commit with this folder's DVC cache. submitit starts the tasks and
keeps their logs; what was computed is in DVC's cache, and trainings go on from their checkpoints.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import submitit
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml, modify_yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from submitit.core.utils import JobPaths, pickle_load
from submitit.helpers import Checkpointable
from tabulate import tabulate

from focalcal import paths

ARRAY = 1000  # tasks in an array job, Slurm's usual limit
WAITING = {"PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED"}
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
HOW = {"Running stage": "computed", "is cached": "from the cache", "didn't change": "up to date"}  # in DVC's words


class Cluster(BaseModel):
    """What a task asks Slurm for: the settings of slurm.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True)

    partition: str | None = None  # the cluster's default
    time: int = Field(240, gt=0)  # minutes until a task is stopped and goes on in a new job
    memory: int = Field(16, gt=0)  # GB
    cpus: int = Field(4, gt=0)
    gpus: int = Field(0, ge=0)
    gpu_type: str | None = None  # such as a100
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = []  # shell lines before the task, such as: module load cuda
    folder: str = "${TMPDIR:-/tmp}"  # on the node, for the task's clone
    restarts: int = Field(20, ge=0)  # after so many time limits a task has failed


def cluster(path: Path | None) -> Cluster:
    """Settings from a YAML file, by default slurm.yaml if there is one; ValueError in one sentence for a bad file."""
    path = path or paths.root() / "slurm.yaml"
    if not path.exists() and path == paths.root() / "slurm.yaml":
        return Cluster()
    try:
        values = yaml.safe_load(path.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} must consist of 'name: value' settings.")
        return Cluster(**values)
    except yaml.YAMLError as problem:
        raise ValueError(f"{path} is not YAML: {' '.join(str(problem).split())}.") from None
    except ValidationError as problems:
        first = problems.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{path} has no setting '{name}'; it has: {', '.join(Cluster.model_fields)}.") from None
        raise ValueError(f"{path}, {name}: {first['msg'].lower()}, got {first['input']!r}.") from None


def chosen(globs: list[str], cached_only: bool) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The stages that match, each with those it reads from, and all that they depend on.

    ValueError, in one sentence, if they make no grid.

    cached_only: refuse what the clones on a cluster could not hand back or do not have.
    """
    with Repo(str(paths.root())) as repo:
        graph = repo.index.graph
        named = {stage.addressing: stage for stage in repo.index.stages}
        matching = {name for glob in globs for name in fnmatch.filter(named, glob) if named[name].cmd}
        for glob in globs:
            if not fnmatch.filter(matching, glob):
                raise ValueError(f"No stage matches '{glob}'; `dvc stage list --all` names them.")
        above = {name: {stage.addressing for stage in _above(graph, named[name])} for name in matching}
        for name in sorted(matching):
            if within := above[name] & matching:
                raise ValueError(f"{name} depends on {min(within)}, so they cannot run at once: run one grid each.")
            if cached_only and not all(out.use_cache and not out.persist for out in named[name].outs):
                raise ValueError(f"{name} writes files that are not in DVC's cache, so it can run here only.")
            if cached_only and not all(stage.cmd for stage in graph.successors(named[name])):
                raise ValueError(f"{name} reads data that only this folder has, so it can run here only.")
        before = [name for name in named if named[name].cmd and any(name in names for names in above.values())]
        needs = {name: tuple(s.addressing for s in graph.successors(named[name])) for name in named if name in matching}
        return needs, before


def _above(graph, stage) -> set:
    """All that a stage depends on."""
    found, todo = set(), [stage]
    while todo:
        new = set(graph.successors(todo.pop())) - found
        found |= new
        todo += new
    return found


def outdated(stages: list[str]) -> list[str]:
    """Those of the stages that dvc repro would not skip."""
    with Repo(str(paths.root())) as repo:
        changed = repo.status(targets=stages)
    return [stage for stage in stages if stage in changed]


class Task(Checkpointable):
    """A stage in its place: called on the machine that executes it; requeued as it is when Slurm wants the node."""

    def __init__(self, head: Path, environment: dict[str, str], away: dict | None = None):
        """head: the folder of the one who started the grid; away: see ``clone``, None to work in head."""
        self.head, self.environment, self.away = head, environment, away

    def __call__(self, stage: str, needs: tuple[str, ...] = ()) -> dict:
        """What was done, in how many seconds, and away the stage's entry in dvc.lock.

        needs: what the stage depends on, to be fetched from the cache first when away.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stopped is not failed: no result
        begun = time.time()
        if self.away is None:
            return {"how": self.reproduce(stage, self.head), "seconds": time.time() - begun}
        alone = FileLock(Path(self.away["locks"]) / f"{stage}.lock")  # an earlier start may have outlived its node
        with alone, clone(self.head, **self.away["clone"]) as folder:
            self.dvc(folder, "checkout", "--quiet", *needs)
            how = self.reproduce(stage, folder)
            entry = load_yaml(folder / "dvc.lock")["stages"][stage]
        return {"how": how, "seconds": time.time() - begun, "entry": entry}

    def reproduce(self, stage: str, folder: Path) -> str:
        said = self.dvc(folder, "--wait-for-lock", "repro", "--single-item", stage)
        return next((how for words, how in HOW.items() if words in said), "")

    def dvc(self, folder: Path, *arguments: str) -> str:
        """Run DVC, its output passed on; RuntimeError if it fails, and nothing of it goes on if this is stopped."""
        environment = os.environ | self.environment | {"PYTHONPATH": str(folder / "src"), "PYTHONUNBUFFERED": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment |= {"JUPYTER_PREFER_ENV_PATH": "1"}
        if self.away:
            environment["DVC_SITE_CACHE_DIR"] = str(folder / ".dvc" / "site")
        command, said = [sys.executable, "-m", "dvc", *arguments], []
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    said.append(line)
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                raise
        if process.returncode:
            raise RuntimeError(f"dvc {' '.join(arguments)} exited with {process.returncode}.")
        return "".join(said)


@contextmanager
def clone(head: Path, commit: str, lock: Path, cache: str, folder: str):
    """Yields a clone of a commit on this node that shares the DVC cache of ``head``; gone afterwards.

    lock: a copy of head's dvc.lock, which knows the stages that ran there first.
    """
    place = subprocess.run(["sh", "-c", f'printf %s "{folder}"'], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(dir=place, prefix="focalcal-", ignore_cleanup_errors=True) as made:
        made = Path(made) / "clone"
        for command in (
            ["git", "clone", "--quiet", "--shared", "--no-checkout", str(head), str(made)],
            ["git", "-C", str(made), "checkout", "--quiet", "--detach", commit],
        ):
            subprocess.run(command, check=True)
        shutil.copy(lock, made / "dvc.lock")
        config = f"[core]\n    hardlink_lock = true\n[cache]\n    dir = {cache}\n"
        (made / ".dvc" / "config.local").write_text(config)
        yield made


@dataclasses.dataclass
class Grid:
    """What was started, kept as grid.json in ``folder`` beside submitit's files."""

    folder: Path
    executor: str
    commit: str
    pid: int  # of the process that starts the stages; on Slurm it may end
    slots: int
    stages: dict[str, str | None]  # stage -> submitit's job id, None before it is started

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with paths.atomic(self.folder / "grid.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(self) | {"folder": str(self.folder)}, indent=1))

    def rows(self) -> dict[str, dict]:
        """For each stage its state, its result once it is done, and the log's path."""
        found, states = {}, self._slurm_states() if self.executor == "slurm" else self._local_states()
        for stage, job in self.stages.items():
            if job is None:
                found[stage] = {"state": "waiting" if psutil.pid_exists(self.pid) else "not started", "log": ""}
                continue
            files, state = JobPaths(self.folder, job, 0), states.get(job, "")
            row = {"state": "waiting" if state in WAITING else "running", "log": files.stdout}
            if state in ENDED or not state:
                row["state"] = state.lower() or "stopped"
                if files.result_pickle.exists():
                    outcome, result = pickle_load(files.result_pickle)
                    row |= {"state": "done", "result": result} if outcome == "success" else {"state": "failed"}
            found[stage] = row
        return found

    def _local_states(self) -> dict[str, str]:
        def alive(job):
            try:
                process = psutil.Process(int(job))
                return process.status() != psutil.STATUS_ZOMBIE and str(self.folder) in process.cmdline()
            except psutil.Error:
                return False

        return {job: "RUNNING" for job in self.stages.values() if job and alive(job)}

    def _slurm_states(self) -> dict[str, str]:
        """Slurm's word for each task that it still knows of; it forgets them minutes after their end."""
        found = {}
        for number in sorted({job.split("_")[0] for job in self.stages.values() if job}):
            command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", "--format=%i|%T"]
            asked = subprocess.run(command, capture_output=True, text=True)
            if asked.returncode and "Invalid job id" not in asked.stderr:  # Slurm does not answer: all as it was
                return {job: "RUNNING" for job in self.stages.values() if job}
            found |= dict(line.split("|") for line in asked.stdout.split())
        return found


def follow(grid: Grid, step=lambda: None, every: float = 5.0) -> dict[str, dict]:
    """Print progress until nothing waits or runs; the last rows. step: called before each look."""
    said, begun, settled = None, time.time(), 0
    while True:
        step()
        rows = grid.rows()
        count = {
            state: [row["state"] for row in rows.values()].count(state) for state in ("done", "running", "waiting")
        }
        seconds = [row["result"]["seconds"] for row in rows.values() if "result" in row]
        left = count["running"] / 2 + count["waiting"]
        line = (
            f"{count['done']} of {len(rows)} done, {count['running']} running, {len(rows) - sum(count.values())} failed"
        )
        if seconds and left:
            line += f", about {duration(sum(seconds) / len(seconds) * left / max(1, count['running']))} left"
        if line.split(", about")[0] != said:
            said = line.split(", about")[0]
            print(f"{duration(time.time() - begun)}  {line}", flush=True)
        settled = settled + 1 if not left else 0
        if settled > (grid.executor == "slurm"):  # a second look: results reach a shared disk a little later
            return rows
        time.sleep(every)


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def reason(log: Path) -> str:
    """Why a stage failed: the sentence in its log."""
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return next((line for start in ("focalcal: ", "ERROR: ") for line in reversed(lines) if line.startswith(start)),
                lines[-1] if lines else "")  # fmt: skip


def run_local(grid: Grid) -> dict[str, dict]:
    """Start the stages one after another, one in each slot, with its share of GPUs or CPU threads."""
    import torch

    gpus, cores = torch.cuda.device_count(), torch.get_num_threads()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    grid.slots = min(grid.slots or gpus or cores, len(grid.stages))
    threads = max(1, cores // grid.slots)
    on = f"on {gpus} GPUs" if gpus else f"{threads} of {cores} CPU threads each"
    print(f"{len(grid.stages)} stages, {grid.slots} at a time, {on}; logs in {grid.folder}")
    executor = submitit.LocalExecutor(grid.folder)
    executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
    waiting, running = list(grid.stages), {}

    def start():
        for slot in range(grid.slots):
            if slot in running and running[slot].done():
                del running[slot]
            if slot not in running and waiting:
                environment = {"OMP_NUM_THREADS": str(threads)} if grid.slots > 1 else {}
                if gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
                stage = waiting.pop(0)
                running[slot] = executor.submit(Task(paths.root(), environment), stage)
                grid.stages[stage] = running[slot].job_id
                grid.save()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop, however it comes, stops the slots too
    try:
        return follow(grid, start, every=0.5)
    finally:
        for job in running.values():
            job.cancel()
        while not all(job.done() for job in running.values()):
            time.sleep(0.2)


def submit_slurm(grid: Grid, wanted: Cluster, needs: dict[str, tuple[str, ...]]) -> None:
    """Hand the stages to Slurm, as one array job."""
    executor = submitit.SlurmExecutor(grid.folder, max_num_timeout=wanted.restarts)
    settings = {name: getattr(wanted, name) for name in ("partition", "account", "qos", "constraint")}
    if wanted.gpus and wanted.gpu_type:
        settings["gres"] = f"gpu:{wanted.gpu_type}:{wanted.gpus}"
    elif wanted.gpus:
        settings["gpus_per_node"] = wanted.gpus
    settings |= {"time": wanted.time, "mem": f"{wanted.memory}GB", "cpus_per_task": wanted.cpus, "setup": wanted.setup}
    settings |= {"job_name": "focalcal", "stderr_to_stdout": True, "array_parallelism": grid.slots or ARRAY}
    executor.update_parameters(**{name: value for name, value in settings.items() if value})
    with Repo(str(paths.root())) as repo:
        cache = repo.cache.local_cache_dir
    scratch = paths.scratch().resolve()
    (scratch / "grid" / "locks").mkdir(parents=True, exist_ok=True)
    shutil.copy(paths.root() / "dvc.lock", grid.folder)
    whence = {"commit": grid.commit, "lock": grid.folder / "dvc.lock", "cache": cache, "folder": wanted.folder}
    environment = {"OMP_NUM_THREADS": str(wanted.cpus), "FOCALCAL_SCRATCH": str(scratch)}
    task = Task(paths.root(), environment, {"locks": str(scratch / "grid" / "locks"), "clone": whence})
    names = list(grid.stages)
    for first in range(0, len(names), ARRAY):
        part = names[first : first + ARRAY]
        for stage, job in zip(part, executor.map_array(task, part, [needs[name] for name in part]), strict=True):
            grid.stages[stage] = job.job_id
        grid.save()
    print(f"{len(names)} stages submitted as job {', '.join(sorted({j.split('_')[0] for j in grid.stages.values()}))}; "
          f"logs in {grid.folder}")  # fmt: skip


def collect(rows: dict[str, dict]) -> None:
    """Enter what tasks did elsewhere into dvc.lock, in one go, and fetch it from the cache."""
    entries = {stage: row["result"]["entry"] for stage, row in rows.items() if row["state"] == "done"}
    if not entries:
        return
    with Repo(str(paths.root())) as repo, repo.lock, modify_yaml(paths.root() / "dvc.lock") as lock:
        lock["stages"] |= entries
    with Repo(str(paths.root())) as repo:
        repo.checkout(targets=list(entries))
    again = outdated(list(entries))
    print(
        f"{len(entries)} results fetched from the cache; `dvc repro` has to run {len(again) or 'none'} of them again."
    )


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Print a table of the stages, of all or of the unfinished only if there are many; the unfinished ones."""
    bad = {stage: row for stage, row in rows.items() if row["state"] != "done"}
    shown = rows if len(rows) <= 50 else bad
    if shown:
        table = [
            {"stage": stage, "state": row["state"], "how": row.get("result", {}).get("how"),
             "time": duration(row["result"]["seconds"]) if "result" in row else None, "log": row["log"]}
            for stage, row in shown.items()
        ]  # fmt: skip
        print(tabulate(table, headers="keys", disable_numparse=True))
    for stage, row in bad.items():
        if row["state"] == "failed":
            print(f"{stage}: {reason(row['log'])}")
    return bad


def conclude(grid: Grid, rows: dict[str, dict]) -> int:
    """Collect and summarise a grid that has ended; the exit status."""
    if grid.executor == "slurm":
        collect(rows)
    if bad := summary(rows):
        print(f"{len(bad)} of {len(rows)} stages are not done; the others are kept. Run the grid again for the rest.")
        return 1
    print(f"All {len(rows)} stages are done; `dvc repro` runs what follows from them.")
    return 0


def run(globs: list[str], executor: str, jobs: int | None, config: Path | None) -> int:
    """Run a grid to its end; the exit status."""
    away = executor == "slurm"
    wanted = cluster(config) if away else None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=paths.root(), capture_output=True, text=True
    ).stdout.strip()
    if away:
        if not (shutil.which("sbatch") and shutil.which("squeue")):
            raise RuntimeError("There is no sbatch here: run this on a machine of the cluster that can submit jobs.")
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=paths.root(), capture_output=True, text=True
        ).stdout
        if changed or not commit:
            raise RuntimeError(
                f"Tasks on the cluster work on a commit, and here is something uncommitted ({changed.split()[-1]}, for "
                "instance): commit it first."
                if commit
                else "This folder is not a git repository with a commit."
            )
    needs, before = chosen(globs, cached_only=away)
    if before and dvc_here("repro", *before):
        raise RuntimeError("What the grid depends on failed; its message is above.")
    stages = outdated(list(needs))
    if skipped := len(needs) - len(stages):
        print(f"{skipped} of {len(needs)} stages are up to date.")
    if not stages:
        return 0
    name = time.strftime("%Y%m%d-%H%M%S")
    grid = Grid(
        paths.scratch().resolve() / "grid" / name, executor, commit, os.getpid(), jobs or 0, dict.fromkeys(stages)
    )
    grid.save()
    if not away:
        return conclude(grid, run_local(grid))
    submit_slurm(grid, wanted, needs)
    return wait(grid)


def wait(grid: Grid) -> int:
    """Follow a grid to its end; Ctrl-C leaves it alone."""
    try:
        rows = follow(grid)
    except KeyboardInterrupt:
        print(f"\nThe grid goes on. To come back: python -m focalcal.grid status --wait {grid.folder.name}")
        print(f"To stop it: python -m focalcal.grid cancel {grid.folder.name}")
        return 130
    return conclude(grid, rows)


def dvc_here(*arguments: str) -> int:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=paths.root(), env=environment).returncode


def opened(name: str | None) -> Grid:
    """The grid of this name, or the newest."""
    found = {path.parent.name: path for path in sorted((paths.scratch() / "grid").glob("*/grid.json"))}
    if not found or (name and name not in found):
        known = f"there are: {', '.join(found)}" if found else "none was started here"
        raise ValueError(f"No grid {name or ''}".rstrip() + f"; {known}.")
    values = json.loads(found[name or max(found)].read_text())
    return Grid(**values | {"folder": Path(values["folder"])})


def cancel(grid: Grid) -> None:
    """Stop all that runs or waits; what is done and the checkpoints stay."""
    if grid.executor == "slurm":
        subprocess.run(["scancel", *sorted({job.split("_")[0] for job in grid.stages.values() if job})], check=True)
    elif psutil.pid_exists(grid.pid) and "focalcal.grid" in psutil.Process(grid.pid).cmdline():
        os.kill(grid.pid, signal.SIGINT)
    else:
        raise RuntimeError(f"Grid {grid.folder.name} does not run any more.")
    print(f"Grid {grid.folder.name} is stopped; checkpoints and finished stages are kept.")


def main(arguments=None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m focalcal.grid", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_run = commands.add_parser("run", help="run all matching stages that are not up to date")
    of_run.add_argument(
        "glob", nargs="*", default=["train@*"], help="names of stages, with * and ?; by default train@*"
    )
    of_run.add_argument("--executor", choices=("local", "slurm"), default="local")
    of_run.add_argument("--jobs", type=int, help="how many at a time; by default one for each GPU or CPU core")
    of_run.add_argument("--cluster", type=Path, metavar="FILE", help="what to ask Slurm for; by default slurm.yaml")
    of_status = commands.add_parser("status", help="how far a grid is")
    of_status.add_argument("--wait", action="store_true", help="follow it to its end, and collect its results")
    of_cancel = commands.add_parser("cancel", help="stop a grid")
    for command in (of_status, of_cancel):
        command.add_argument("grid", nargs="?", help="by default the newest")
    given = parser.parse_args(arguments)
    try:
        if given.command == "run":
            if given.jobs is not None and given.jobs < 1:
                raise ValueError(f"--jobs must be 1 or more, got {given.jobs}.")
            return run(given.glob, given.executor, given.jobs, given.cluster)
        grid = opened(given.grid)
        if given.command == "cancel":
            cancel(grid)
            return 0
        if given.wait:
            return wait(grid)
        summary(grid.rows())
        return 0
    except (ValueError, RuntimeError, OSError, DvcException) as problem:
        print(f"focalcal: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    from focalcal import grid  # so that tasks find these classes by their name

    sys.exit(grid.main())
