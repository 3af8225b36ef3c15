"""Reading what the pipeline left: histories, logits, temperatures and metrics of a study, without training."""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from focalcal import metrics, paths, settings

SPLITS = ("val", "test")


def active() -> tuple[list[str], list[int]]:
    """The losses and seeds that params.yaml names as active."""
    chosen = settings.params()["active"]
    return chosen["losses"], chosen["seeds"]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `dvc repro` makes it, `make artifacts` fetches the published one.")
    return path


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; ValueError, naming the file, if it is truncated or damaged."""
    try:
        with np.load(_existing(path)) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as problem:
        advice = f"delete it and run `dvc checkout {path}` or `dvc repro`"
        raise ValueError(f"{path} is truncated or damaged ({problem}); {advice}.") from problem


def history(study: str, losses=None, seeds=None) -> pd.DataFrame:
    """history.csv of the given (by default all active) losses and seeds, one below the other.

    Columns loss and seed come first; the others are described in train.train.
    """
    active_losses, active_seeds = active()
    tables = []
    for loss in active_losses if losses is None else losses:
        for seed in active_seeds if seeds is None else seeds:
            table = pd.read_csv(_existing(paths.run(study, loss, seed) / "history.csv"))
            table.insert(0, "loss", loss)
            table.insert(1, "seed", seed)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def curves(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column of a history as a table of epochs x losses, the mean over seeds."""
    return history.pivot_table(column, "epoch", "loss", sort=False)


def logits(study: str, loss: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Checked (logits, labels) of the val and test split: shapes (N, K) and (N,), as metrics.check gives them."""
    path = paths.run(study, loss, seed) / "logits.npz"
    file = read_npz(path)
    try:
        return {split: metrics.check(file[f"{split}_logits"], file[f"{split}_labels"]) for split in SPLITS}
    except (KeyError, ValueError) as problem:
        raise ValueError(f"{path}: {problem}") from problem


def scaled(study: str, name: str) -> pd.DataFrame:
    """temperatures.csv (loss, seed, scaling, temperature) or metrics.csv (loss, seed, split, scaling, metric,
    value), by ``name`` without the ending; rows of active losses and seeds."""
    table = pd.read_csv(_existing(paths.study(study) / f"{name}.csv"), keep_default_na=False)
    losses, seeds = active()
    return table[table.loss.isin(losses) & table.seed.isin(seeds)].reset_index(drop=True)


def results(study: str, split: str = "test") -> pd.DataFrame:
    """metrics.csv of one split, wide: a row per loss, columns (metric, scaling), the mean over seeds."""
    table = scaled(study, "metrics")
    wide = table[table.split == split].pivot_table("value", "loss", ["metric", "scaling"], sort=False)
    return wide


def gradients(study: str, loss: str, seed: int) -> tuple[list[int], np.ndarray]:
    """Epochs, and per-sample norms of the head's gradient at each: (epochs, N), see train.head_gradient_norms."""
    file = read_npz(paths.run(study, loss, seed) / "gradients.npz")
    return file["epochs"].tolist(), file["norms"]


def published(dataset: str = "cifar10", network: str = "resnet50") -> pd.DataFrame:
    """The papers' numbers: loss, metric, before_scaling, after_scaling, temperature, source, quality.

    Metrics are in per cent where their name says so. Where several sources give a number, all are there.
    """
    table = pd.read_csv(paths.root() / "papers" / "published.csv")
    chosen = (table.dataset == dataset) & (table.network == network)
    return table[chosen].drop(columns=["dataset", "network"]).reset_index(drop=True)
