"""A published run, trained again and compared."""

import csv
import json
import os
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd

from compendium import paths, prepare, publish, runs, settings, trainings
from focalcal import calibrate, devices, feed
from focalcal.train import Training

MACHINE = ("commit", "python", "torch", "numpy", "device", "cpu", "cpu_capability", "threads")


def judged(theirs: float, ours: float, sd: float) -> str:
    """equal, within 2 sd of the seeds, or differs; with no second seed, sd NaN, what is not equal is left open."""
    if theirs == ours:
        return "equal"
    if np.isnan(sd):
        return "no second seed"
    return "within 2 sd" if abs(theirs - ours) <= 2 * sd else "differs"


def measured(folder: Path) -> dict[str, float]:
    """Metrics and temperatures of a run, as its logits.npz gives them: test set, before and after scaling."""
    splits = runs.read_logits(folder / "logits.npz")
    chosen = calibrate.temperatures(*splits["val"])
    rows = calibrate.measure({"test": splits["test"]}, chosen)
    found = {f"{row['metric']}, {row['scaling']}": row["value"] for row in rows if row["metric"] != "confidence"}
    return found | {f"temperature, {scaling}": t for scaling, t in chosen.items() if scaling != "none"}


def verify(study: str, loss: str, seed: int) -> int:
    """Train a published run again, with the settings and threads of its provenance; print how it compares.

    Nothing in the project changes. Returns the exit status, 1 if any number differs by more than two standard
    deviations of the published seeds, else 0. ValueError if no such run is published or if it cannot be repeated;
    FileNotFoundError, saying what to fetch, if the run's record or the study's data are not there.
    """
    published, run = paths.root() / "published" / study, paths.published(study, loss, seed)
    record = published / "provenance" / f"{loss}-{seed}.json"
    if not published.with_name(f"{study}.dvc").is_file():
        known = ", ".join(sorted(path.stem for path in published.parent.glob("*.dvc")))
        raise ValueError(f"'{study}' is no published study; published are: {known or 'none'}.")
    if published.is_dir() and not run.is_dir():
        known = [
            f"{path.name} {' '.join(sorted(seed.name for seed in path.iterdir()))}" for path in published.glob("runs/*")
        ]
        pull = f"`dvc pull published/{study}.dvc` fetches what has been published since"
        raise ValueError(f"Of {study} no '{loss} {seed}' is here, but: {', '.join(sorted(known))}; {pull}.")
    if not record.is_file():
        raise FileNotFoundError(f"{record} is not here; `dvc pull published/{study}.dvc` fetches what is published.")
    said = json.loads(record.read_text())
    if "settings" not in said:
        raise ValueError(f"{record} does not say with which settings it was trained, so it cannot be repeated.")
    try:
        config = Training(**said["settings"] | {"threads": said["threads"]})
    except TypeError as problem:
        raise ValueError(f"{record} was written by other code and cannot be repeated by this: {problem}.") from None
    job, on = trainings.Job(study, loss, seed, config, said["loss_settings"]), devices.device()
    there = paths.prepared(study).is_file()  # else made in memory
    prepared = trainings.read_prepared(study) if there else prepare.prepare(settings.data(study))
    theirs = measured(run)
    sd = pd.DataFrame([measured(folder) for folder in sorted(run.parent.glob("[0-9]*"))]).std()  # NaN: one seed
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        Path("dvc.yaml").touch()  # a compendium of its own, to train in
        os.environ.pop("FOCALCAL_SCRATCH", None)  # checkpoints of other trainings are there
        paths.write_npz(paths.prepared(study), **prepared)
        trainings.complete([job], [trainings.new_run(job, prepared, on)], feed.splits(prepared, on), prepared)
        folder = paths.run(study, loss, seed)
        publish.halve_precision(folder / "logits.npz")
        same = publish.same_results(folder, run)
        ours, different = measured(folder), first_difference(folder / "history.csv", run / "history.csv")
    rows = [[name, theirs[name], ours[name], sd[name], judged(theirs[name], ours[name], sd[name])] for name in theirs]
    table = pd.DataFrame(rows, columns=["test", "published", "here", "sd of seeds", "verdict"])
    print(table.to_markdown(index=False, floatfmt=".5f"))
    print(f"history.csv: {'equal, byte for byte' if same[0] else different}")
    print(f"logits.npz: {'equal, number for number' if same[1] else 'not equal'}")
    here = trainings.provenance(on)
    for name in MACHINE:
        if said.get(name) != here[name]:
            print(f"{name}: published with {said.get(name)}, here {here[name]}")
    return int((table.verdict == "differs").any())


def first_difference(ours: Path, theirs: Path) -> str:
    """Where two histories part."""
    with open(ours, newline="") as a, open(theirs, newline="") as b:
        for mine, other in zip(csv.DictReader(a), csv.DictReader(b), strict=False):
            names = [name for name in other if name in mine and mine[name] != other[name]]
            if names:
                return (
                    f"not equal from epoch {other['epoch']} on ({names[0]}: {other[names[0]]}, here {mine[names[0]]})"
                )
    return "not equal: other columns or another number of epochs"
