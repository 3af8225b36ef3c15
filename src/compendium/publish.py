"""Finished runs from any machine, packed into one file, and published in this repository's DVC store.

A published study needs its block in params.yaml and its name under active.published; `dvc repro` then analyses it.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from zipfile import ZIP_DEFLATED

import numpy as np
import pandas as pd

from compendium import fetch, paths, runs, settings, stages
from focalcal import calibrate

RUN_FILES = ("history.csv", "logits.npz")  # and for chapter 5 gradients.npz, for chapter 9 of images shifted.npz
TOLERANCE = 3e-4  # by which half-precision logits may change a metric: far less than another test set would
MEMBER = re.compile(
    r"[\w.-]+/(runs/[\w.-]+/\d+/\w+\.(csv|npz)|(provenance|models)/[\w.-]+-\d+\.(json|safetensors)|params\.yaml)"
)


def pack(study: str, out: Path | None = None, weights: bool = False, scores_only: bool = False) -> None:
    """Write a study's finished runs to ``out`` (STUDY.tar): histories, predictions, gradients, provenance, params.yaml.

    weights: also the networks; scores_only: without the gradients and the predictions for images from elsewhere, which
    chapters 5 and 9 read. Runs that lack a file are named and left out. Raises FileNotFoundError if there is none.
    """
    out, folder, found = out or Path(f"{study}.tar"), paths.study(study), 0
    with paths.atomic(out) as part, tarfile.open(part, "w", dereference=True) as archive:
        for run in sorted(folder.glob("runs/*/*")):
            loss, seed = run.parent.name, run.name
            beside = [folder / "provenance" / f"{loss}-{seed}.json"]
            beside += [folder / "models" / f"{loss}-{seed}.safetensors"] if weights else []
            images = settings.data(study).vectors is None
            more = () if scores_only else ("gradients.npz", "shifted.npz") if images else ("gradients.npz",)
            wanted = [*(run / name for name in (*RUN_FILES, *more)), *beside]
            missing = [path.name for path in wanted if not path.is_file()]
            if missing:
                print(f"{loss}, seed {seed} is left out: {', '.join(missing)} missing.")
                continue
            for path in wanted:
                archive.add(path, f"{study}/{path.relative_to(folder)}")
            found += 1
        if not found:
            raise FileNotFoundError(f"No finished run in {folder / 'runs'}; train first.")
        archive.add(paths.root() / "params.yaml", f"{study}/params.yaml")
    print(f"{found} runs in {out} ({out.stat().st_size / 1e6:.1f} MB).")


def halve_precision(path: Path) -> bool:
    """Rewrite a run's logits in half precision, each row's largest as 0, if no metric changes by more than TOLERANCE.

    Compared are all metrics of both splits, as trained and under either temperature. Returns whether it was done. The
    file is compressed either way.
    """
    file, splits = paths.read_npz(path), runs.read_logits(path)
    paths.write_npz(path, ZIP_DEFLATED, **file)
    half = {}
    for split, (logits, *rest) in splits.items():
        shifted = logits - logits.max(axis=1, keepdims=True)
        if shifted.min() < np.finfo(np.float16).min:
            return False
        half[split] = shifted.astype(np.float16), *rest
    chosen = calibrate.temperatures(*splits["val"])
    back = {split: (logits.astype(np.float64), *rest) for split, (logits, *rest) in half.items()}  # as they are read
    before, after = (calibrate.measure(of, chosen) for of in (splits, back))
    if max(abs(a["value"] - b["value"]) for a, b in zip(before, after, strict=True)) > TOLERANCE:
        return False
    paths.write_npz(path, ZIP_DEFLATED, **file | {f"{split}_logits": pair[0] for split, pair in half.items()})
    return True


def slim_shifted(path: Path, weaker: bool) -> None:
    """Rewrite a run's shifted.npz compressed, and, unless ``weaker``, without the noise of severities 1 to 4."""
    out = set() if weaker else {f"noise{level}" for level in range(1, 5)}
    file = paths.read_npz(path)
    paths.write_npz(path, ZIP_DEFLATED, **{name: logits for name, logits in file.items() if name not in out})


def same_results(one: Path, other: Path) -> tuple[bool, bool]:
    """Whether the histories of two runs have the same bytes, and whether their logits are the same numbers."""
    histories = [(run / "history.csv").read_bytes() for run in (one, other)]
    ours, theirs = (paths.read_npz(run / "logits.npz") for run in (one, other))
    alike = (ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours)
    return histories[0] == histories[1], ours.keys() == theirs.keys() and all(alike)


def _checked(run: Path) -> None:
    """ValueError, naming the file, if a run is not whole."""
    for name in RUN_FILES:
        if not (run / name).is_file():
            raise ValueError(f"{run.parent.name}, seed {run.name}: {name} is missing in the packed file.")
    try:
        history = pd.read_csv(run / "history.csv", dtype={"test_nll": float})
    except ValueError as problem:
        raise ValueError(f"{run.parent.name}, seed {run.name}: history.csv is damaged ({problem}).") from problem
    epochs = history["epoch"].tolist() if {"epoch", "test_nll"} <= set(history) else []
    if not epochs or epochs != list(range(1, len(epochs) + 1)):
        raise ValueError(f"{run.parent.name}, seed {run.name}: history.csv does not hold every epoch once.")
    if not np.isfinite(history["test_nll"]).all():
        raise ValueError(f"{run.parent.name}, seed {run.name}: the test NLL in history.csv is not finite.")
    try:
        runs.read_logits(run / "logits.npz")
        for path in run.glob("*.npz"):
            paths.read_npz(path)
        json.loads(paths.existing(run.parents[2] / "provenance" / f"{run.parent.name}-{run.name}.json").read_text())
    except (ValueError, FileNotFoundError) as problem:
        raise ValueError(f"{run.parent.name}, seed {run.name}, is damaged in the packed file: {problem}") from problem


def add(archive: Path) -> Path:
    """Unpack a packed file into published/<study>; that folder.

    Logits are kept in half precision where that changes no metric, and weaker noise than the strongest for seed 0 only;
    both are compressed.
    Nothing changes unless every run in it is whole. Raises ValueError if one is not, if a file of another kind is in
    it, or if a run is published already with other results.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(paths.existing(archive)) as packed:
                names = packed.getnames()
                bad = [name for name in names if not MEMBER.fullmatch(name)]
                if bad or not names:
                    raise ValueError(f"{archive} is not what `compendium publish pack` writes: {bad[:1] or 'empty'}.")
                paths.unpack(packed, scratch)
        except fetch.DAMAGE as problem:
            raise ValueError(f"{archive} is damaged or no tar file ({problem}).") from problem
        source, *others = sorted(Path(scratch).iterdir())
        if not (source / "params.yaml").is_file():  # pack writes it last; a damaged header looks like the end of a tar
            raise ValueError(f"{archive} is damaged: it ends before its params.yaml.")
        if others:
            raise ValueError(f"{archive} holds several studies; pack each alone: `compendium publish pack STUDY`.")
        study = source.name
        settings.study(study)  # the analyses need its block
        target = paths.root() / "published" / study
        if target.with_name(f"{study}.dvc").is_file() and not target.is_dir():
            raise ValueError(f"{target} is not here; run `dvc pull published/{study}.dvc` first, to add to it.")
        found = sorted(source.glob("runs/*/*"))
        if not found:
            raise ValueError(f"{archive} holds no run.")
        for run in found:
            _checked(run)
        for run in found:
            half = halve_precision(run / "logits.npz")
            print(f"{study}, {run.parent.name}, seed {run.name}: logits in {'half' if half else 'single'} precision")
            there = target / run.relative_to(source)
            if there.is_dir() and not all(same_results(there, run)):
                raise ValueError(f"{there} is published already, with other results; delete it first to replace it.")
            if (run / "shifted.npz").is_file():
                slim_shifted(run / "shifted.npz", weaker=run.name == "0")
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as aside:  # the whole of it, or nothing
            whole = Path(aside) / "whole"
            for folder in (target, source):
                if folder.is_dir():
                    shutil.copytree(folder, whole, dirs_exist_ok=True)
            with stages.ignoring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if target.is_dir():
                    target.rename(Path(aside) / "before")
                whole.rename(target)
        return target


def publish(archives: list[Path]) -> None:
    """Add packed runs, pin them with DVC and push them to the store."""
    for folder in map(add, archives):  # each is pinned and pushed before the next begins
        for verb, where in (("add", folder), ("push", f"{folder}.dvc")):
            if subprocess.run([sys.executable, "-m", "dvc", verb, "-q", where], cwd=paths.root()).returncode:
                raise RuntimeError(f"`dvc {verb} {where}` failed; put it right and run it again.")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"Published {folder} ({size:.1f} MB). In params.yaml move the study to active.published,")
        print(f"run `dvc repro`, and commit published/{folder.name}.dvc and .store.")
