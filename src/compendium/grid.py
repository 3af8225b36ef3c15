"""Many stages at once: on the cores and GPUs of this machine, or as an array job on a Slurm cluster.

A grid is all stages of dvc.yaml whose names match a GLOB (by default train@*) and that are not up to date; none may
depend on another. What they depend on runs first, here. Each is then one `dvc repro --single-item STAGE`: in this
folder, or on Slurm in a clone of the commit that shares this folder's DVC cache. submitit starts the tasks and keeps
their logs; results are in DVC's cache, and trainings go on from their checkpoints.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import cloudpickle
import psutil
import submitit
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from submitit.core.utils import FailedJobError, JobPaths, pickle_load
from tabulate import tabulate

from compendium import paths, settings, stages, tasks

SILENT = "Slurm does not answer"
WAITING = {"PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
ENDED |= {"PREEMPTED", "REVOKED"}


class Cluster(BaseModel):
    """What a task asks Slurm for: the settings of slurm.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True)

    partition: str | None = None  # the cluster's default
    time: int = Field(240, ge=5)  # minutes, after which a task goes on in a new job
    restarts: int = Field(20, ge=0)  # how often it may do so
    memory: int = Field(16, gt=0)  # GB
    cpus: int = Field(4, gt=0)
    gpus: int = Field(0, ge=0)
    gpu_type: str | None = None  # such as a100
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = []  # shell lines before the task, such as: module load cuda
    folder: str = "${TMPDIR:-/tmp}"  # on the node, for the task's clone
    array: int = Field(1000, gt=0)  # tasks in one array job; the cluster's limit, if that is lower

    @field_validator("gpu_type")
    @classmethod
    def _with_a_number(cls, gpu_type, info: ValidationInfo):
        if gpu_type and not info.data.get("gpus"):
            raise ValueError("input needs gpus, how many of them, beside it")
        return gpu_type

    def describe(self) -> str:
        """What a task gets, for people."""
        gpus = f"{self.gpus} GPUs{f' ({self.gpu_type})' if self.gpu_type else ''}"
        where = f"partition {self.partition}" if self.partition else "the default partition"
        return f"{where}, {self.cpus} CPUs, {gpus if self.gpus else 'no GPU'}, {self.memory} GB, {self.time} minutes"


def cluster(path: Path | None = None) -> Cluster:
    """Settings from a YAML file, by default slurm.yaml if there is one; ValueError in one sentence for a bad file."""
    if path is None and not (path := paths.root() / "slurm.yaml").exists():
        return Cluster()
    if not path.is_file():
        raise FileNotFoundError(f"{path}, of --cluster, is missing; docs/slurm.yaml is a template.")
    try:
        values = parse_yaml(path.read_text("utf-8"), path)  # YAML 1.2, to which 12:00:00 is no number
    except YAMLFileCorruptedError as problem:
        raise ValueError(f"{path} is not YAML: {' '.join(str(problem.__cause__).split())}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must consist of 'name: value' settings, such as 'partition: gpu'.")
    values = {str(name): value for name, value in values.items()}
    return settings.build(Cluster, values, dict.fromkeys(values, str(path)))


@dataclasses.dataclass
class Grid:
    """What was started, kept as grid.json in ``folder`` beside submitit's files."""

    folder: Path
    executor: str
    commit: str
    pid: int  # of the process that starts the tasks; 0 once all are handed to Slurm
    stages: dict[str, str | None]  # stage -> submitit's job id, None before it is started
    finished: dict[str, dict] = dataclasses.field(default_factory=dict)  # rows that are done, once seen

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with paths.atomic(self.folder / "grid.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(self) | {"finished": {}}, default=str, indent=1))

    def jobs(self) -> list[str]:
        """Slurm's numbers of the array jobs."""
        return sorted({job.split("_")[0] for job in self.stages.values() if job})

    def logs(self, stage: str) -> Path:
        """submitit's folder for a task: its own where ids are process numbers, which come again."""
        return self.folder / stage if self.executor == "local" else self.folder

    def rows(self) -> dict[str, dict]:
        """For each stage its state, what there is to say of it, the path of its log, and once it is done its result."""
        found, states = {}, self._slurm_states() if self.executor == "slurm" else self._local_states()
        with suppress(PermissionError):  # of somebody else's grid
            self.folder.chmod(self.folder.stat().st_mode)  # a network disk then looks again for new files
        for stage, job in self.stages.items():
            if stage in self.finished or job is None:
                unstarted = "waiting" if process_runs(self.pid, "compendium grid") else "not started"
                found[stage] = self.finished.get(stage, {"state": unstarted, "note": "", "log": None})
                continue
            files, (state, note) = JobPaths(self.logs(stage), job, 0), states.get(job, ("", ""))
            row = {"state": "waiting" if state in WAITING else "running", "note": note, "log": files.stdout}
            outcome, result = pickle_load(files.result_pickle) if files.result_pickle.exists() else (None, None)
            if outcome == "success":
                row |= {"state": "done", "note": result["how"], "result": result}
                self.finished[stage] = row
            elif state in ENDED or not state:  # an error may also be that of an earlier start
                row |= {"state": "failed" if outcome else state.lower() or "stopped"}
                row |= {"note": reason(row["log"], result) if outcome else ""}
                if outcome and state not in ("", "FAILED", "COMPLETED"):
                    row["note"] += f" (Slurm: {state})"  # such as OUT_OF_MEMORY
            found[stage] = row
        return found

    def _local_states(self) -> dict[str, tuple[str, str]]:
        started = {stage: job for stage, job in self.stages.items() if job and stage not in self.finished}
        return {job: ("RUNNING", "") for stage, job in started.items() if process_runs(int(job), str(self.logs(stage)))}

    def _slurm_states(self) -> dict[str, tuple[str, str]]:
        """Slurm's word for each task, and why it waits; Slurm forgets them minutes after their end."""
        found, silent = {}, ("UNKNOWN", SILENT)  # counts as running
        for number in self.jobs():
            if shutil.which("squeue") is None:
                return dict.fromkeys(filter(None, self.stages.values()), silent)
            command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", "--format=%i|%T|%r"]
            asked = subprocess.run(command, capture_output=True, text=True)
            if asked.returncode and "Invalid job id" not in asked.stderr:
                return dict.fromkeys(filter(None, self.stages.values()), silent)
            lines = [line.split("|") for line in asked.stdout.splitlines() if line.count("|") == 2]
            found |= {job: (state, why if state in WAITING else "") for job, state, why in lines}
        return found


def process_runs(pid: int, argument: str) -> bool:
    """Whether a process of this number runs and has ``argument`` among, or in, its own."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and argument in " ".join(process.cmdline())
    except psutil.Error:
        return False


def reason(log: Path, error: str) -> str:
    """Why a task failed: the last sentence for people in its log, or the end of the error that submitit kept."""
    text = log.read_text(errors="replace").replace("\r", "\n") if log.exists() else ""
    messages = [
        line for start in ("focalcal: ", "ERROR: ") for line in text.splitlines()[::-1] if line.startswith(start)
    ]
    return (messages or error.strip().splitlines()[-1:])[0]


def follow(grid: Grid, step=lambda: None, every: float = 10.0) -> dict[str, dict]:
    """Print progress until nothing waits or runs; the rows then. step: called before each look."""
    printed, begun, looks, enough = None, time.time(), 0, 1
    while looks < enough:
        time.sleep(every if printed else 0)
        step()
        rows = grid.rows()
        count = Counter(row["state"] for row in rows.values())
        done, running, waiting = count["done"], count["running"], count["waiting"]
        looks = 0 if running + waiting else looks + 1
        if grid.executor == "slurm":  # results reach a shared disk a little later
            enough = 7 if count["completed"] else 2
        line = f"{done} of {len(rows)} done, {running} running, {waiting} waiting"
        line += f", {bad} failed" if (bad := len(rows) - done - running - waiting) else ""
        whys = Counter(row["note"] for row in rows.values() if row["state"] in ("waiting", "running") and row["note"])
        if whys and (SILENT in whys or not running):
            line += f" ({whys.most_common(1)[0][0]})"
        if line != printed:
            printed = line
            print(f"{duration(time.time() - begun)}  {line}{time_left(rows, running, waiting)}", flush=True)
    return rows


def time_left(rows: dict[str, dict], running: int, waiting: int) -> str:
    """How long the rest will take, if some stages have been computed and some are at work."""
    seconds = [row["result"]["seconds"] for row in rows.values() if row["note"] == "computed"]
    if not (seconds and running):
        return ""
    return f", about {duration(sum(seconds) / len(seconds) * (running / 2 + waiting) / running)} left"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def run_local(grid: Grid, slots: int | None) -> dict[str, dict]:
    """Start the stages one after another, one in each slot, with its share of GPUs or CPU threads."""
    import torch

    from focalcal import devices

    on, cores = devices.device(), torch.get_num_threads()
    gpus = visible_gpus(on, torch.cuda.device_count()) if on.type == "cuda" else []
    slots = slots or len(gpus) or (cores if on.type == "cpu" else 1)
    threads = max(1, cores // slots)  # the same however many stages are left: results depend on it
    slots = min(slots, len(grid.stages))
    have = f"{len(gpus)} GPUs" if gpus else f"CPU threads: {threads} each"
    print(f"{len(grid.stages)} stages, {slots} at a time, {have}; logs in {grid.folder}")
    waiting, running = list(grid.stages), {}

    def start():
        for slot in range(slots):
            if slot in running and running[slot].done():
                del running[slot]
            if slot not in running and waiting:
                variables = {"FOCALCAL_SCRATCH": str(paths.scratch().resolve()), "OMP_NUM_THREADS": str(threads)}
                if gpus:
                    variables |= {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)], "FOCALCAL_DEVICE": "cuda"}
                stage = waiting.pop(0)
                executor = submitit.LocalExecutor(grid.logs(stage))
                executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
                with stages.ignoring(signal.SIGINT):  # which a terminal sends to tasks, too; they get a SIGTERM below
                    running[slot] = executor.submit(tasks.Task(paths.root(), variables), stage)
                grid.stages[stage] = running[slot].job_id
                grid.save()

    try:
        return follow(grid, start, every=0.5)
    except BaseException:
        with stages.ignoring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # one that comes now stops the same
            for job in running.values():
                stop(job.job_id)
        raise
    finally:
        while not all(job.done() for job in running.values()):
            time.sleep(0.2)


def stop(job: str) -> None:
    """Tell a local task to end; submitit's own cancelling would kill it a second later."""
    with suppress(ProcessLookupError):
        os.kill(int(job), signal.SIGTERM)


def visible_gpus(device, seen: int) -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them.

    device: the torch device chosen, one GPU of them if it has a number; seen: how many torch counts.
    """
    named = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) or [*map(str, range(seen))]
    if not named[0].startswith("MIG"):  # of slices torch counts but one
        named = named[:seen]
    return named if device.index is None else [named[device.index]]


def submit_slurm(grid: Grid, needs: dict[str, tuple[str, ...]], wanted: Cluster, slots: int | None) -> None:
    """Hand the stages to Slurm as an array job (more, if there are very many)."""
    given = {name: getattr(wanted, name) for name in ("partition", "account", "qos", "constraint", "time", "setup")}
    given |= {"mem": f"{wanted.memory}GB", "cpus_per_task": wanted.cpus, "array_parallelism": slots or wanted.array}
    if wanted.gpus:
        given["gres"] = ":".join(filter(None, ("gpu", wanted.gpu_type, str(wanted.gpus))))
    executor = submitit.SlurmExecutor(grid.folder, max_num_timeout=wanted.restarts)
    executor.update_parameters(
        job_name="focalcal", stderr_to_stdout=True, additional_parameters={"requeue": True},
        srun_args=[f"--cpus-per-task={wanted.cpus}"], **{name: value for name, value in given.items() if value},
    )  # fmt: skip
    with Repo(str(paths.root())) as repo:
        cache = repo.cache.local_cache_dir
    lock = shutil.copy(paths.root() / "dvc.lock", grid.folder)
    variables = {"OMP_NUM_THREADS": str(wanted.cpus), "FOCALCAL_SCRATCH": str(paths.scratch().resolve())}
    variables["FOCALCAL_DEVICE"] = "cuda" if wanted.gpus else "cpu"
    clone = {"commit": grid.commit, "lock": lock, "cache": cache, "folder": wanted.folder}
    task, names, refused = tasks.Task(paths.root(), variables, clone), list(grid.stages), ""
    cloudpickle.register_pickle_by_value(tasks)  # its code of now, whatever becomes of this folder's
    ours = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_CONF", "SBATCH_"))}
    # No job stays unknown, and none has traces of one that we are in.
    with stages.ignoring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), submitit.helpers.clean_env():
        os.environ.update(ours)
        for first in range(0, len(names), wanted.array):
            part = names[first : first + wanted.array]
            try:
                jobs = executor.map_array(task, part, [needs[name] for name in part])
            except FailedJobError as problem:
                refused = f"Slurm refuses {len(names) - first} of {len(names)} stages: {' '.join(str(problem).split())}"
                break
            grid.stages |= {stage: job.job_id for stage, job in zip(part, jobs, strict=True)}
            grid.save()
    grid.pid = 0  # from now on nothing is started
    grid.save()
    if not grid.jobs():
        raise RuntimeError(refused)
    submitted = sum(job is not None for job in grid.stages.values())
    print(f"{submitted} stages submitted as job {', '.join(grid.jobs())} to {wanted.describe()}; logs in {grid.folder}")
    if refused:
        print(refused)


def entries(rows: dict[str, dict]) -> dict[str, dict]:
    """What the finished tasks left in the dvc.lock of their clones."""
    return {name: row["result"]["entry"] for name, row in rows.items() if row["state"] == "done"}


def summary(rows: dict[str, dict]) -> int:
    """Print a table of the stages, only of the unfinished if there are many; the exit status."""
    bad, table = {stage: row for stage, row in rows.items() if row["state"] != "done"}, []
    for stage, row in (rows if len(rows) <= 50 else bad).items():
        took = duration(row["result"]["seconds"]) if "result" in row else ""
        log = os.path.relpath(row["log"]) if row["log"] else ""
        table.append([stage, row["state"], row["note"] if row["state"] != "failed" else "", took, log])
    if table:
        print(tabulate(table, ["stage", "state", "how", "time", "log"], disable_numparse=True))
    for stage, row in bad.items():
        if row["state"] == "failed":
            print(f"{stage}: {row['note']}")
    print(f"{len(rows) - len(bad)} of {len(rows)} stages are done.")
    return 1 if bad else 0


def conclude(grid: Grid, rows: dict[str, dict]) -> int:
    """Summarise and collect what has ended; the exit status."""
    status = summary(rows)
    if grid.executor == "slurm":
        print("Entering the results into dvc.lock ...", flush=True)
        entered, others, again = stages.collect(entries(rows))
        fetched = f"{len(entered) - len(again)} results fetched from the cache"
        print(f"{fetched}; `dvc repro` has to run {len(again) or 'none'} again.")
        if others:
            print(f"Not entered, since settings, code or data are others now than when they ran: {', '.join(others)}.")
    print("`grid run` again runs those that are not done." if status else "`dvc repro` runs what follows from them.")
    return status


def run(globs: list[str], executor: str, slots: int | None, config: Path | None) -> int:
    """Run a grid to its end; the exit status."""
    on_slurm, root = executor == "slurm", paths.root()
    if config and not on_slurm:
        raise ValueError("--cluster says what to ask Slurm for; it goes with --executor slurm.")
    wanted = cluster(config) if on_slurm else None
    if on_slurm and not (shutil.which("sbatch") and shutil.which("squeue")):
        raise RuntimeError("There is no sbatch here; on a machine that can submit jobs, run this again.")
    commit = committed(root) if on_slurm else ""
    needs, before = stages.matching(globs, on_slurm)
    done = ended_elsewhere(needs)
    if stages.outdated(before):  # all of them, for what is above one of these may make others outdated
        tasks.dvc(root, "--wait-for-lock", "repro", *before)
    entered, _, again = stages.collect(entries(done))
    if entered:
        print(f"{len(entered) - len(again)} results of earlier grids fetched from the cache.")
    names = stages.outdated(list(needs))
    print(f"{len(needs) - len(names)} of {len(needs)} stages are up to date.")
    if not names:
        return 0
    folder = paths.scratch().resolve() / "grid" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    grid = Grid(folder, executor, commit, os.getpid(), dict.fromkeys(names))
    ended_elsewhere(names)  # again, for much may have been repeated since
    grid.save()
    if not on_slurm:
        return conclude(grid, run_local(grid, slots))
    return wait(grid, lambda: submit_slurm(grid, needs, wanted, slots))


def committed(root: Path) -> str:
    """The commit that tasks on a cluster work on; RuntimeError if anything but dvc.lock is not committed."""
    asked = [
        subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".", ":(exclude)dvc.lock"])
    ]
    commit, changed = (answer.stdout.strip() for answer in asked)
    if changed or not commit:
        what = " ".join((changed or asked[1].stderr or "nothing is committed").split())[:200]
        raise RuntimeError(f"Tasks on the cluster work on a commit; commit first what is not: {what}")
    return commit


def ended_elsewhere(names) -> dict[str, dict]:
    """Rows of those of the stages that earlier grids have done on Slurm; RuntimeError if one still runs any of them."""
    done = {}
    for name in _started():
        earlier = opened(name)
        if not set(earlier.stages) & set(names):
            continue
        if earlier.pid == os.getpid():  # in a container that was started again
            earlier.pid = 0
        rows = {stage: row for stage, row in earlier.rows().items() if stage in names}
        if SILENT in {row["note"] for row in rows.values()}:
            raise RuntimeError(
                f"{SILENT}, so whether grid {name} still runs them cannot be told here. Run this where squeue works; "
                f"if the grid has ended, delete {earlier.folder}."
            )
        if {"waiting", "running"} & {row["state"] for row in rows.values()}:
            say = "python -m compendium grid"
            advice = f"`{say} status --wait {name}` follows it, `{say} cancel {name}` stops it"
            raise RuntimeError(f"Grid {name} still runs some of these stages; {advice}.")
        if earlier.executor == "slurm":
            done |= {stage: row for stage, row in rows.items() if row["state"] == "done"}
    return done


def wait(grid: Grid, submit=None) -> int:
    """Follow a grid, first submitted if it is not yet, to its end; it goes on if this is interrupted. Exit status."""
    try:
        if submit:
            submit()
        rows = follow(grid)
    except KeyboardInterrupt:
        if not grid.jobs():
            raise
        name = grid.folder.name
        print(f"\nThe grid goes on. Follow it: python -m compendium grid status --wait {name}")
        print(f"Stop it: python -m compendium grid cancel {name}")
        return 130
    return conclude(grid, rows)


def _started() -> list[str]:
    """Names of all grids started here, oldest first."""
    return sorted(path.parent.name for path in (paths.scratch() / "grid").glob("*/grid.json"))


def opened(name: str | None) -> Grid:
    """The grid of this name, or the newest."""
    found = _started()
    if not found or name not in (None, *found):
        raise ValueError(
            f"There is no such grid; started here: {', '.join(found)}." if found else "No grid was started here."
        )
    folder = paths.scratch().resolve() / "grid" / (name or found[-1])
    return Grid(**json.loads((folder / "grid.json").read_text()) | {"folder": folder})


def cancel(grid: Grid) -> None:
    """Stop all that runs or waits; what is done is kept, and the checkpoints."""
    if not {"waiting", "running"} & {row["state"] for row in grid.rows().values()}:
        raise RuntimeError(f"Grid {grid.folder.name} does not run any more.")
    if grid.executor == "local" and process_runs(grid.pid, "compendium grid"):
        os.kill(grid.pid, signal.SIGTERM)
    elif grid.executor == "local":  # who started them was killed
        for job in grid._local_states():
            stop(job)
    else:
        asked = subprocess.run(["scancel", *grid.jobs()], capture_output=True, text=True)
        if asked.returncode:
            raise RuntimeError(f"scancel says: {asked.stderr.strip()}")
    print(f"Grid {grid.folder.name} is being stopped; what is done is kept, and the checkpoints.")


def call(given) -> int:
    """Do what `compendium grid` was asked for, given its parsed arguments; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)  # however this is stopped, what it runs here is, too
    try:
        if given.command == "run":
            if given.jobs is not None and given.jobs < 1:
                raise ValueError(f"--jobs must be 1 or more, got {given.jobs}.")
            config = given.cluster and given.cluster.resolve()
            os.chdir(paths.root())  # DVC names stages as seen from there
            return run(given.glob, given.executor, given.jobs, config)
        os.chdir(paths.root())
        grid = opened(given.grid)
        if given.command == "cancel":
            cancel(grid)
            return 0
        return wait(grid) if given.wait else summary(grid.rows())
    except DvcException as problem:
        raise RuntimeError(problem) from problem
    except KeyboardInterrupt:
        print("\nStopped; what is done is kept, and the checkpoints. The same command again goes on.")
        return 130
