"""What DVC costs when there are many trainings: the real dvc.yaml with a command that takes no time.

    python tests/scale.py [--all] N...      N: trainings, in dozens; --all: also plain `dvc repro` of everything

Seconds on this machine; docs/grid.md quotes a run of it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tiny import REPOSITORY, call, repository, stub

from compendium import stages, tasks

LOSSES = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["active"]["losses"]  # a dozen


def timed(what, function, *arguments):
    begun = time.perf_counter()
    result = function(*arguments)
    print(f"    {time.perf_counter() - begun:7.1f} s  {what}", flush=True)
    return result


def measure(folder: Path, count: int, everything: bool) -> None:
    print(f"{count} trainings", flush=True)
    os.chdir(folder.parent)
    copy = repository(folder, LOSSES, seeds=count // 12)
    (copy / "dvc.lock").unlink()
    stub(copy)
    call(copy, "dvc", "repro", "prepare@tiny")
    names = [f"train@tiny-{loss}-{seed}" for seed in range(count // 12) for loss in LOSSES]
    if everything:
        lock = (copy / "dvc.lock").read_text()
        timed("dvc repro, all computed one after another", call, copy, "dvc", "repro", "train")
        (copy / "dvc.lock").write_text(lock)

    cache = str(copy / ".dvc" / "cache")
    clone_settings = {"commit": "HEAD", "lock": copy / "dvc.lock", "cache": cache, "folder": tempfile.gettempdir()}
    collected = {}
    for first in range(0, count, 48):  # as on a cluster, but 48 stages a clone
        part = names[first : first + 48]
        with tasks.clone(copy, "part", **clone_settings) as made:
            call(made, "dvc", "checkout", "strip", "prepare@tiny")
            call(made, "dvc", "repro", "--single-item", *part)
            entries = tasks.load_yaml(made / "dvc.lock")["stages"]
        collected |= {stage: entries[stage] for stage in part}
    os.chdir(copy)
    timed("results of all tasks collected on the head", stages.collect, collected)
    timed("dvc repro, nothing to do", call, copy, "dvc", "repro", "train")
    timed("dvc repro --single-item of one stage, forced", call, copy, "dvc", "repro", "-f", "-s", names[0])
    (copy / "scratch").mkdir(exist_ok=True)
    task = tasks.Task(copy, {"FOCALCAL_SCRATCH": str(copy / "scratch")}, clone_settings)
    timed("one task of a cluster: clone, checkout, stage", task, names[0], ("strip", "prepare@tiny"))


if __name__ == "__main__":
    for number in [int(word) for word in sys.argv[1:] if word != "--all"]:
        with tempfile.TemporaryDirectory() as place:
            measure(Path(place) / "copy", number, "--all" in sys.argv)
