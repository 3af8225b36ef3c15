"""A copy of this repository with one tiny study, for tests that run the real pipeline."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, of anything that is waited for, on a busy machine
COMPENDIUM = (sys.executable, "-m", "compendium")


def parameters(losses: list[str], seeds: int = 1, exceptions=None, more_losses=None) -> dict:
    """params.yaml with one active study, tiny.

    exceptions: the study's; more_losses: further entries of shared.losses.
    """
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    active = {"headline": "tiny", "studies": ["tiny"], "published": [], "analysed": [], "detectors": []}
    values["active"] = active | {"sweeps": {}, "repeats": {}, "comparisons": {}, "losses": losses}
    values["active"]["seeds"] = list(range(seeds))
    small = {"train": 96, "test": 24, "epochs": 6, "batch": 8, "width": 16, "seeds": [0, 1]}
    values["detectors"]["boxes"] = values["detectors"]["detection"] | {"dataset": "digits"} | small
    values["shared"]["losses"] |= more_losses or {}
    values["studies"]["tiny"] = {
        "data": {"dataset": "digits", "train": 300, "val": 100, "test": 200, "shifted": ["digits", "svhn"]},
        "training": {"network": "small_resnet", "epochs": 3, "milestones": [2, 3], "augment": False, "threads": 1},
        "exceptions": exceptions or {},
    }
    return values


def write_parameters(folder: Path, values: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def repository(folder: Path, losses: list[str], **wanted) -> Path:
    """The tracked files in a new git repository with a commit; its active study is scikit-learn's digits.

    wanted: as for ``parameters``.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith((".store/", "figures/", "published/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    write_parameters(folder, parameters(losses, **wanted))
    (folder / "data" / "fashion_mnist").mkdir(parents=True)
    (folder / "data" / "fashion_mnist" / "README").write_text("digits come with scikit-learn")
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["dvc", "commit", "-q", "-f", "data.dvc"]):
        call(folder, *command)
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "tiny")


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(folder / "src"), "FOCALCAL_DEVICE": "cpu", "PATH": path}


def call(folder: Path, *command, fails=False, **variables) -> str:
    """Run a command in the copy and return all it printed; fails: whether it must, None for either."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder) | variables, capture_output=True, text=True, timeout=DEADLINE
    )  # fmt: skip
    assert fails is None or (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(condition, seconds: float = DEADLINE, every: float = 0.1):
    """The first true value of ``condition()``; AssertionError if it takes longer."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(every)
    return value
