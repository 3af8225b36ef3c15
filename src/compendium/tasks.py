"""A stage on the machine that executes it: here, or in a clone on a node of a cluster. See grid."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from dvc.config import Config
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml
from filelock import FileLock, Timeout
from submitit.helpers import Checkpointable

HOW = {"Running stage": "computed", "is cached": "from the cache", "didn't change": "up to date"}  # in DVC's words
STOPPED = 128 + signal.SIGTERM  # the exit status of a task that was told to end


def dvc(folder: Path, *arguments: str, **variables: str) -> str:
    """Run DVC in a folder, with its code and this environment, and pass its output on; RuntimeError if it fails.

    Returns how a stage got done, in the words of HOW. If this process is stopped meanwhile, so is DVC, but not while
    it writes dvc.lock, which would be cut off.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join(filter(None, (str(folder / "src"), os.environ.get("PYTHONPATH"))))
    ours = {"PATH": path, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    ours |= {"SHELL": "/bin/sh", "PYTHONUTF8": "1"}
    command, how = [sys.executable, "-m", "dvc", *arguments], ""
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | ours | variables, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                how = next((name for words, name in HOW.items() if words in line), how)
        except BaseException:
            with Repo(str(folder), _wait_for_lock=True) as repo, repo.lock, suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        raise RuntimeError(f"dvc {' '.join(arguments)} exited with {process.returncode}; its message is above.")
    return how


def leave(*_) -> None:
    """Answer a signal that ends this task; once, so that another one does not cut short what stops DVC."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED)


class Task(Checkpointable):
    """One stage, called on the machine that executes it; requeued as it is when Slurm wants the node back."""

    def __init__(self, head: Path, variables: dict[str, str], clone_settings: dict | None = None):
        """head: the folder of whoever runs the grid; variables: environment.

        clone_settings: those of ``clone``, or None to work in head itself.
        """
        self.head, self.variables, self.clone_settings = head, variables, clone_settings

    def __call__(self, stage: str, needs: tuple[str, ...] = ()) -> dict:
        """How the stage got done and in how many seconds; in a clone also its entry in dvc.lock.

        needs: the stages it reads from, which a clone fetches from the cache first. Checkpoints stay until the
        results are in the cache. Stopped is not failed: a task that is stopped leaves no result.
        """
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, leave)
        begun, repro = time.time(), ("--wait-for-lock", "repro", "--single-item", stage)
        shared = Path(self.variables["FOCALCAL_SCRATCH"]) / "grid" / "stages"
        shared.mkdir(parents=True, exist_ok=True)
        kept, entry = shared / f"{stage}.checkpoints", None
        variables = self.variables | {"FOCALCAL_KEEP_CHECKPOINTS": str(kept)}
        try:
            with exclusive_lock(shared / f"{stage}.lock"):
                if self.clone_settings is None:
                    how = dvc(self.head, *repro, **variables)
                else:
                    with clone(self.head, stage, **self.clone_settings) as folder:
                        variables["DVC_SITE_CACHE_DIR"] = str(folder / ".dvc" / "site")
                        if needs:  # without names DVC would check everything out
                            dvc(folder, "checkout", "--quiet", *needs, **variables)
                        how = dvc(folder, *repro, **variables)
                        entry = load_yaml(folder / "dvc.lock")["stages"][stage]
                if kept.exists():
                    checkpoints = Path(kept.read_text())
                    if shared.parent.parent in checkpoints.parents:  # in scratch/, whatever a broken file says
                        shutil.rmtree(checkpoints, ignore_errors=True)
                        with suppress(OSError):  # those of other settings are there
                            checkpoints.parent.rmdir()
                    kept.unlink()
        except SystemExit as stop:
            if self.clone_settings and stop.code == STOPPED:
                time.sleep(600)  # Slurm requeues what it has to end itself
            raise
        return {"how": how, "seconds": time.time() - begun, "entry": entry}


@contextmanager
def exclusive_lock(path: Path):
    """Holds a lock; an earlier start of the task may have outlived its node, and is then waited for, with a message."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft one would outlive a killed process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(
            f"An earlier start of this task is still at work, or {path} is held for a dead node; waiting.", flush=True
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def clone(head: Path, stage: str, commit: str, lock: Path, cache: str, folder: str):
    """Yields a clone of a commit on this node, gone afterwards, with the DVC cache of ``head``.

    stage: what it is for; what a killed task left behind for the same stage is removed. lock: a copy of head's
    dvc.lock, which knows the stages that ran there before. Failed notebooks go to head.
    """
    place = subprocess.run(["sh", "-c", f'printf %s "{folder}"'], capture_output=True, text=True, check=True).stdout
    prefix = f"focalcal-{zlib.crc32(f'{head} {stage}'.encode()):08x}-"
    for left in Path(place).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as made:
        made = Path(made) / "clone"
        subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(head), str(made)], check=True)
        subprocess.run(["git", "-C", str(made), "checkout", "--quiet", "--detach", commit], check=True)
        shutil.copy(lock, made / "dvc.lock")
        if (head / ".dvc" / "config.local").exists():  # such as a cache shared by a group
            shutil.copy(head / ".dvc" / "config.local", made / ".dvc")
        with Config(str(made / ".dvc")).edit("local") as local:
            local.setdefault("core", {})["hardlink_lock"] = True
            local.setdefault("cache", {})["dir"] = cache
        try:
            yield made
        finally:
            if (made / "artifacts" / "failed").exists():
                shutil.copytree(made / "artifacts" / "failed", head / "artifacts" / "failed", dirs_exist_ok=True)
