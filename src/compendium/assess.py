"""Tables and figures for logits that come from elsewhere, without training.

Each file holds val_logits and test_logits, (N, K), and val_labels and test_labels, (N,); its name is the model's in
every table. The chapters that need nothing else (03, 07, 08, 10, 11 and 15) are executed for all of them side by side:
figures and tables go to figures/STUDY, notebooks and numbers to artifacts/STUDY.
"""

import re
import shutil
from pathlib import Path

import numpy as np

from compendium import notebook, paths, settings
from focalcal import metrics

CHAPTERS = ("03_scale", "07_reliability", "08_results", "10_evidence", "11_calibratability", "15_selective_prediction")
ARRAYS = ("val_logits", "val_labels", "test_logits", "test_labels")
FEWEST = 200  # samples of a split: fewer say nothing about fifteen bins


def read(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of a file, checked; ValueError, in one sentence, for anything that cannot be logits."""
    file = paths.read_npz(path)
    missing = [name for name in ARRAYS if name not in file]
    if missing:
        raise ValueError(f"{path} lacks the array '{missing[0]}'; it has: {', '.join(file) or 'none'}.")
    for split in ("val", "test"):
        logits, labels = file[f"{split}_logits"], file[f"{split}_labels"]
        try:
            logits, labels = metrics.check(logits, labels)
        except ValueError as problem:
            raise ValueError(f"{path}, {split}: {problem}") from problem
        if len(labels) < FEWEST:
            raise ValueError(f"{path}: {len(labels)} samples in {split} are too few; {FEWEST} or more are needed.")
        if logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-2):
            raise ValueError(f"{path}: {split}_logits look like probabilities; store log(max(p, 1e-12)) instead.")
    if file["val_logits"].shape[1] != file["test_logits"].shape[1]:
        counts = file["val_logits"].shape[1], file["test_logits"].shape[1]
        raise ValueError(f"{path}: val has {counts[0]} classes and test has {counts[1]}.")
    return {name: file[name] for name in ARRAYS}


def assess(study: str, files: list[Path]) -> None:
    """Execute the chapters for these models; nothing is written before every file has been found good."""
    if not re.fullmatch(r"[\w-]+", study):
        raise ValueError(f"A study's name consists of letters, digits, _ and -, got '{study}'.")
    if study in settings.block(settings.params(), "studies", "studies"):
        raise ValueError(f"'{study}' is a study of params.yaml; choose another name.")
    for path in files:
        if path.resolve().is_relative_to(paths.study(study).resolve()):
            raise ValueError(
                f"{path} lies in the folder that `compendium assess {study}` makes anew; move it elsewhere."
            )
    models = {path.stem: read(path) for path in files}
    if len(models) < len(files):
        raise ValueError("Two files have the same name; models are told apart by it.")
    (first, reference), *others = models.items()
    for name, arrays in others:
        if not np.array_equal(arrays["test_labels"], reference["test_labels"]):
            raise ValueError(f"The test labels of {name} and {first} differ; assess them as two studies.")
    mark = paths.study(study) / "assessed.txt"  # tells what this function made from what the pipeline made
    for place in (paths.study(study), paths.root() / "figures" / study):
        if place.exists() and not mark.is_file():
            raise ValueError(f"{place} is there, and not from `compendium assess`; choose another name, or delete it.")
    shutil.rmtree(paths.study(study), ignore_errors=True)
    with paths.atomic(mark) as part:
        part.write_text("".join(f"{path}\n" for path in files))
    for name, arrays in models.items():
        paths.write_npz(paths.run(study, name, 0) / "logits.npz", **arrays)
    for chapter in CHAPTERS:
        source = paths.root() / "notebooks" / f"{chapter}.ipynb"
        notebook.execute(source, paths.study(study) / "notebooks" / source.name, {"study": study})
    print(f"Figures and tables: {paths.root() / 'figures' / study}")
    print(f"Executed notebooks: {paths.study(study) / 'notebooks'}")
