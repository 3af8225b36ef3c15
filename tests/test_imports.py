"""The method stands alone: focalcal works with numpy, scipy, scikit-learn and torch, and stays small."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "focalcal").glob("*.py"))
NEEDED = ("numpy", "scipy", "scikit-learn", "torch")
COMPENDIUMS = {"pandas", "matplotlib", "seaborn", "pydantic", "yaml", "dvc", "papermill", "nbformat", "tqdm"}
COMPENDIUMS |= {"safetensors", "torchvision", "psutil", "submitit", "compendium"}

HIDE = """
import json, sys

class Without:  # a finder of modules to which the barred ones are not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in barred else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

barred = set(json.loads(sys.stdin.read()))
sys.meta_path[:] = map(Without, sys.meta_path)
"""
WORK = """
import numpy as np
import torch
from focalcal import calibrate, evidence, feed, losses, metrics, networks, posthoc, train

rng, prepared = np.random.default_rng(0), {"mean": np.array([0.5]), "std": np.array([0.3])}
for split, count in (("train", 100), ("val", 60), ("test", 60)):
    prepared[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    prepared[f"{split}_labels"] = rng.integers(0, 3, count)
settings = train.Training(
    network="small_resnet", epochs=2, milestones=[2], batch_size=32, learning_rate=0.05, momentum=0.9,
    weight_decay=5e-4, reduction="mean", clip=2.0, augment=True, threads=1,
)
run = train.Run(networks.make("small_resnet", 3, 1, 0), losses.make("adafocal"), settings)
rows = list(train.train(run, feed.splits(prepared, torch.device("cpu")), 0))
(val, test), counts = (run.predictions[split] for split in ("val", "test")), evidence.resamples(60, 20)
fixed = posthoc.fit("vector", *val)(test[0])
low, high = evidence.interval(metrics.ece(*test), evidence.resampled_metrics(*test[:2], counts, ["ece"])["ece"], "ece")
found = calibrate.temperatures(*val) | metrics.summary(fixed, test[1]) | {"low": low, "high": high}
print(len(rows), all(np.isfinite(value) for value in found.values()), sorted(barred & set(sys.modules)))
"""
DRAW = """
from focalcal import metrics, plots

count, confidence, correct = metrics.bin_sums([0.6, 0.9], [1, 0], metrics.equal_width_edges())
figure, (left, right) = plots.panels(2)
plots.reliability(left, count, confidence, correct, plots.style("focal3")["color"])
plots.estimate(right, "focal3", 0, 2.0, (1.5, 2.6), sd=0.4)
plots.open_and_full(right, ["focal3"])
figure.canvas.draw()
print("drawn", sorted(barred & set(sys.modules)))
"""


def installed_but_for(*distributions: str) -> list[str]:
    """Every package that can be imported here, but for those of some distributions and of all that they require."""
    wanted, pending = set(), [normal(name) for name in distributions]
    while pending:
        name = pending.pop()
        if name in wanted:
            continue
        wanted.add(name)
        try:
            needs = [line for line in requires(name) or [] if "extra ==" not in line]
        except PackageNotFoundError:  # for another machine
            continue
        pending += [normal(re.split(r"[^\w.-]", line)[0]) for line in needs]
    found = packages_distributions()
    barred = {package for package, owners in found.items() if not {normal(owner) for owner in owners} & wanted}
    return sorted(barred - {"focalcal"} | {"compendium"})


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(code: str, barred: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], input=json.dumps(barred), capture_output=True, text=True,
        env=os.environ | {"MPLBACKEND": "agg", "FOCALCAL_DEVICE": "cpu"},
    )  # fmt: skip


def test_the_method_works_with_four_packages():
    barred = installed_but_for(*NEEDED)
    assert set(barred) >= COMPENDIUMS and not set(barred) & {"numpy", "scipy", "sklearn", "torch", "focalcal"}
    done = run(WORK, barred)
    assert done.returncode == 0 and done.stdout == "2 True []\n", done.stderr
    assert "ModuleNotFoundError: No module named 'pandas'" in run("import pandas", barred).stderr


def test_drawing_adds_matplotlib():
    barred = installed_but_for(*NEEDED, "matplotlib")
    assert set(barred) >= COMPENDIUMS - {"matplotlib"}
    done = run(DRAW, barred)
    assert done.returncode == 0 and done.stdout == "drawn []\n", done.stderr


def imported(node: ast.AST) -> set[str]:
    """Top-level packages imported anywhere in a piece of code."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            found.add((part.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_of_the_method_import_what_it_may(path):
    allowed = {"focalcal", "numpy", "scipy", "sklearn", "torch"} | ({"matplotlib"} if path.stem == "plots" else set())
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in tree.body if not isinstance(node, functions)]
    assert set().union(*map(imported, top)) - set(sys.stdlib_module_names) <= allowed
    later = {"torchvision"} if path.stem in ("networks", "detection") else set()  # ResNets and boxes are its own
    assert imported(tree) - set(sys.stdlib_module_names) <= allowed | later


def test_the_method_is_small():
    lines = {path.stem: len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > (400 if name == "losses" else 300)} == {}
    assert sum(lines.values()) <= 2600
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 150
