"""A copy of this repository with one tiny study, for tests that run the real pipeline."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import yaml
from helpers import write_parameters

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 600  # seconds, of anything that is waited for, on a busy machine
COMPENDIUM = (sys.executable, "-m", "compendium")

STUB = '''"""Stands for preparing and for a training: the same files, in no time. A long one waits for `go`."""
import os, sys, time
from pathlib import Path
import yaml
study, *training = sys.argv[1:]
names = ["notebooks/01_prepare.ipynb", "prepared.npz"]
if training:
    loss, seed = training
    values = yaml.safe_load(Path("params.yaml").read_text())
    if values["shared"]["losses"][loss].get("alpha", 0) > 1:
        sys.exit("focalcal: label_smoothing: alpha must lie in [0, 1), got 7.0.")
    checkpoints = Path(os.environ.get("FOCALCAL_SCRATCH", "scratch"), study, f"{loss}-{seed}", "key")
    checkpoints.mkdir(parents=True, exist_ok=True)
    if kept := os.environ.get("FOCALCAL_KEEP_CHECKPOINTS"):
        Path(kept).write_text(str(checkpoints))
    print("epoch 1")
    if loss == "focal3" and values["studies"][study]["exceptions"].get(loss, {}).get("epochs"):
        (checkpoints / f"at-work-{os.getpid()}").touch()
        while not Path("go").exists():
            time.sleep(0.05)
    names = [f"notebooks/02_train/{loss}-{seed}.ipynb", f"runs/{loss}/{seed}/history.csv"]
    names += [f"provenance/{loss}-{seed}.json", f"models/{loss}-{seed}.safetensors"]
for name in names:
    path = Path("artifacts", study, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(training))
'''


def real_parameters(losses: list[str], seeds: int = 1, exceptions=None, more_losses=None) -> dict:
    """params.yaml with one active study, tiny.

    exceptions: the study's; more_losses: further entries of shared.losses.
    """
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    active = {"headline": "tiny", "studies": ["tiny"], "published": [], "analysed": [], "detectors": []}
    values["active"] = active | {"sweeps": {}, "repeats": {}, "comparisons": {}, "losses": losses}
    values["active"]["seeds"] = list(range(seeds))
    small = {"train": 64, "test": 24, "epochs": 6, "batch": 8, "width": 16, "seeds": [0]}
    values["detectors"]["boxes"] = values["detectors"]["detection"] | {"dataset": "digits"} | small
    values["shared"]["losses"] |= more_losses or {}
    values["shared"]["beside"] = "tiny"
    values["studies"]["tiny"] = {
        "data": {"dataset": "digits", "train": 300, "val": 100, "test": 200, "shifted": ["digits", "svhn"]},
        "training": {"network": "small_resnet", "epochs": 3, "milestones": [2, 3], "augment": False, "threads": 1},
        "exceptions": exceptions or {},
    }
    return values


@contextmanager
def changed(folder: Path, values: dict):
    """Other parameters for a while."""
    before = (folder / "params.yaml").read_bytes()
    write_parameters(folder, values)
    try:
        yield
    finally:
        (folder / "params.yaml").write_bytes(before)


def repository(folder: Path, losses: list[str], **wanted) -> Path:
    """All files but ignored ones in a new git repository with a commit; its active study is scikit-learn's digits.

    wanted: as for ``real_parameters``.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith((".store/", "figures/", "published/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    write_parameters(folder, real_parameters(losses, **wanted))
    (folder / "data" / "fashion_mnist").mkdir(parents=True)
    (folder / "data" / "fashion_mnist" / "README").write_text("digits come with scikit-learn")
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["dvc", "commit", "-q", "-f", "data.dvc"]):
        call(folder, *command)
    commit(folder)
    return folder


def stub(folder: Path) -> None:
    """Let the copy prepare and train with STUB instead; what a training does has its own tests."""
    (folder / "stub.py").write_text(STUB)
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text())
    for stage, words in (("prepare", "${item.study}"), ("train", "${item.study} ${item.loss} ${item.seed}")):
        pipeline["stages"][stage]["cmd"] = f"python stub.py {words}"
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    commit(folder)


def commit(folder: Path) -> None:
    call(folder, "git", "add", "-A")
    who = ("user.name=t", "user.email=t@example.org", "commit.gpgsign=false")
    call(folder, "git", *(word for value in who for word in ("-c", value)), "commit", "-q", "-m", "tiny")


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
