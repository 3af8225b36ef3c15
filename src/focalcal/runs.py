"""Reading what the pipeline left: histories, logits, temperatures and metrics of a study, without training."""

import numpy as np
import pandas as pd

from focalcal import metrics, paths, settings

SPLITS = ("val", "test")


def active() -> tuple[list[str], list[int]]:
    """The losses and seeds that params.yaml names as active."""
    chosen = settings.params()["active"]
    return chosen["losses"], chosen["seeds"]


def history(study: str, losses=None, seeds=None) -> pd.DataFrame:
    """history.csv of the given (by default all active) losses and seeds, one below the other.

    Columns loss and seed come first; the others are described in train.train.
    """
    active_losses, active_seeds = active()
    tables = []
    for loss in active_losses if losses is None else losses:
        for seed in active_seeds if seeds is None else seeds:
            table = pd.read_csv(paths.existing(paths.run(study, loss, seed) / "history.csv"))
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
    file = paths.read_npz(path)
    try:
        return {split: metrics.check(file[f"{split}_logits"], file[f"{split}_labels"]) for split in SPLITS}
    except (KeyError, ValueError) as problem:
        raise ValueError(f"{path}: {problem}") from problem


def scaled(study: str, name: str) -> pd.DataFrame:
    """temperatures.csv (loss, seed, scaling, temperature) or metrics.csv (loss, seed, split, scaling, metric,
    value), by ``name`` without the ending; rows of active losses and seeds."""
    table = pd.read_csv(paths.existing(paths.study(study) / f"{name}.csv"), keep_default_na=False)
    losses, seeds = active()
    return table[table.loss.isin(losses) & table.seed.isin(seeds)].reset_index(drop=True)


def results(study: str, how: str = "mean") -> pd.DataFrame:
    """metrics.csv of the test split, wide: a row per loss, columns (metric, scaling); mean or std over seeds."""
    table = scaled(study, "metrics").query("split == 'test'")
    return table.pivot_table("value", "loss", ["metric", "scaling"], aggfunc=how, sort=False)


def gradients(study: str, loss: str, seed: int) -> tuple[list[int], np.ndarray]:
    """Epochs, and per-sample norms of the head's gradient at each: (epochs, N), see train.head_gradient_norms."""
    file = paths.read_npz(paths.run(study, loss, seed) / "gradients.npz")
    return file["epochs"].tolist(), file["norms"]


def beside_papers(table: pd.DataFrame, dataset: str = "cifar10", network: str = "resnet50") -> pd.DataFrame:
    """A table of losses with the papers' numbers inserted after the columns "ECE %", "ECE % scaled" and "T".

    The first source in papers/published.csv that copies the authors' own number is taken; NaN where there is none.
    """
    paper = published(dataset, network).query("metric == 'ece_percent' and quality == 'copied'")
    paper, table = paper.drop_duplicates("loss").set_index("loss"), table.copy()
    for ours, theirs in (("ECE %", "before_scaling"), ("ECE % scaled", "after_scaling"), ("T", "temperature")):
        table.insert(table.columns.get_loc(ours) + 1, f"{ours} (papers)", paper[theirs])
    return table


def published(dataset: str = "cifar10", network: str = "resnet50") -> pd.DataFrame:
    """The papers' numbers: loss, metric, before_scaling, after_scaling, temperature, source, quality.

    Metrics are in per cent where their name says so. Where several sources give a number, all are there.
    """
    table = pd.read_csv(paths.root() / "papers" / "published.csv")
    chosen = (table.dataset == dataset) & (table.network == network)
    return table[chosen].drop(columns=["dataset", "network"]).reset_index(drop=True)
