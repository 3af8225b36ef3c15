"""Reading what the pipeline left: histories, logits, temperatures and metrics of a study, without training.

A study's runs lie in artifacts/<study>/runs if it is trained here, in published/<study>/runs if it is published.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from focalcal import metrics, paths, settings

SPLITS = ("val", "test")


def folder(study: str, loss: str, seed: int) -> Path:
    """Where the files of a run lie."""
    return _runs(study) / loss / str(seed)


def _runs(study: str) -> Path:
    """The folder of a study's runs."""
    trained, published = paths.study(study) / "runs", paths.root() / "published" / study / "runs"
    chosen = settings.params()["active"]
    if study in chosen["published"] or (study not in chosen["studies"] and not trained.is_dir()):
        return published
    return trained


def pairs(study: str, only=()) -> list[tuple[str, int]]:
    """The (loss, seed) of a study's runs: the active ones of params.yaml if the study is, else all that there are.

    only: some of the losses; ValueError, which names those there are, if the study lacks one.
    """
    chosen, top = settings.params(), _runs(study)
    order = list(chosen["shared"]["losses"])
    if study in chosen["active"]["studies"] and study not in chosen["active"]["published"]:
        found = [(loss, seed) for loss in chosen["active"]["losses"] for seed in chosen["active"]["seeds"]]
    elif top.is_dir():
        found = [(path.parent.name, int(path.name)) for path in top.glob("*/*") if path.name.isdigit()]
        found.sort(key=lambda run: (order.index(run[0]) if run[0] in order else len(order), *run))
    else:
        fetch = f"`dvc pull published/{study}.dvc` fetches it, if it is published"
        raise FileNotFoundError(f"No runs of study '{study}': {top} is missing; {fetch}.")
    there = list(dict.fromkeys(loss for loss, _ in found))
    if missing := [loss for loss in only if loss not in there]:
        known = ", ".join(there) or "none"
        raise ValueError(f"Study '{study}' has no active or published run of '{missing[0]}'; it has: {known}.")
    return [run for run in found if not only or run[0] in only]


def active(study: str, only=()) -> tuple[list[str], list[int]]:
    """The losses and the seeds of a study's runs; only: as for ``pairs``."""
    losses, seeds = zip(*pairs(study, only), strict=True)
    return list(dict.fromkeys(losses)), sorted(set(seeds))


def history(study: str, only=(), seeds=()) -> pd.DataFrame:
    """history.csv of the study's runs, or of some losses (as for ``pairs``) and seeds, one below the other.

    Columns loss and seed come first; the others are described in train.train.
    """
    tables = []
    for loss, seed in pairs(study, only):
        if not seeds or seed in seeds:
            table = pd.read_csv(paths.existing(folder(study, loss, seed) / "history.csv"))
            table.insert(0, "loss", loss)
            table.insert(1, "seed", seed)
            tables.append(table)
    if not tables:
        raise ValueError(f"Study '{study}' has no active or published run with seeds {list(seeds)}.")
    return pd.concat(tables, ignore_index=True)


def sweep(name: str) -> list[str]:
    """The studies of a sweep in params.yaml."""
    known = settings.params()["sweeps"]
    if name not in known:
        raise ValueError(f"Unknown sweep '{name}'; params.yaml lists under sweeps: {', '.join(known) or 'none'}.")
    return known[name]


def curves(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column of a history as a table of epochs x losses, the mean over seeds."""
    return history.pivot_table(column, "epoch", "loss", sort=False)


def logits(study: str, loss: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Checked (logits, labels) of the val and test split: shapes (N, K) and (N,), as metrics.check gives them."""
    path = folder(study, loss, seed) / "logits.npz"
    file = paths.read_npz(path)
    try:
        return {split: metrics.check(file[f"{split}_logits"], file[f"{split}_labels"]) for split in SPLITS}
    except (KeyError, ValueError) as problem:
        raise ValueError(f"{path}: {problem}") from problem


def scaled(study: str, name: str, only=()) -> pd.DataFrame:
    """temperatures.csv (loss, seed, scaling, temperature) or metrics.csv (loss, seed, split, scaling, metric,
    value), by ``name`` without the ending; rows of active losses and seeds. only: as for ``pairs``."""
    table = pd.read_csv(paths.existing(paths.study(study) / f"{name}.csv"), keep_default_na=False)
    losses, seeds = active(study, only)
    return table[table.loss.isin(losses) & table.seed.isin(seeds)].reset_index(drop=True)


def results(study: str, how: str = "mean", only=()) -> pd.DataFrame:
    """metrics.csv of the test split, wide: a row per loss, columns (metric, scaling); mean or std over seeds."""
    table = scaled(study, "metrics", only).query("split == 'test'")
    return table.pivot_table("value", "loss", ["metric", "scaling"], aggfunc=how, sort=False)


def gradients(study: str, loss: str, seed: int) -> tuple[list[int], np.ndarray]:
    """Epochs, and per-sample norms of the head's gradient at each: (epochs, N), see train.head_gradient_norms."""
    file = paths.read_npz(folder(study, loss, seed) / "gradients.npz")
    return file["epochs"].tolist(), file["norms"].astype(np.float32)


def shifted(study: str, loss: str, seed: int) -> dict[str, np.ndarray]:
    """Logits (N, K) of images the network was not trained on, by name, see train.predict_shifted."""
    file = paths.read_npz(folder(study, loss, seed) / "shifted.npz")
    return {name: logits.astype(np.float64) for name, logits in file.items()}


def verdict(ours: float, paper: float) -> str:
    """How a number in per cent compares with the papers'; empty where there is none.

    match: within half a point or a quarter of the papers' number, whichever is more; partial: within a factor of
    two; else no match.
    """
    if np.isnan(paper):
        return ""
    if abs(ours - paper) <= max(0.5, 0.25 * paper):
        return "match"
    return "partial" if max(ours, paper) <= 2 * min(ours, paper) else "no match"


def papers_of(study: str) -> dict[str, str]:
    """Data set and network whose published numbers go beside a study's; nothing for models from elsewhere."""
    return settings.study(study).papers if study in settings.params()["studies"] else {"dataset": "", "network": ""}


def repeats_papers(study: str) -> bool:
    """Whether a study has the very data set and network of the published numbers beside it."""
    papers = papers_of(study)
    if not papers["dataset"]:
        return False
    network = settings.training(study, pairs(study)[0][0])[0].network.removesuffix("_tiny_imagenet")
    return (settings.data(study).dataset, network) == (papers["dataset"], papers["network"])


def against_papers(study: str, only=()) -> pd.DataFrame:
    """ECE in per cent before and after scaling by ECE beside the papers', with verdicts; see ``verdict``.

    A row per loss: mean and standard deviation over seeds, the papers' number, the difference, the verdict.
    """
    scaling = {"ECE %": ("ece", "none"), "ECE % scaled": ("ece", "ece")}
    mean, deviation = 100 * results(study, only=only), 100 * results(study, "std", only)
    table = beside_papers(pd.DataFrame({name: mean[column] for name, column in scaling.items()}), **papers_of(study))
    for at, (name, column) in reversed(list(enumerate(scaling.items()))):
        ours, theirs = table[name], table[f"{name} (papers)"]
        if deviation.notna().any(axis=None):
            table.insert(2 * at + 1, f"sd{at * ' scaled'}", deviation[column])
        place = table.columns.get_loc(f"{name} (papers)") + 1
        table.insert(place, f"difference{at * ' scaled'}", ours - theirs)
        verdicts = [verdict(*pair) for pair in zip(ours, theirs, strict=True)]
        table.insert(place + 1, f"verdict{at * ' scaled'}", verdicts)
    return table


def beside_papers(table: pd.DataFrame, dataset: str = "cifar10", network: str = "resnet50") -> pd.DataFrame:
    """A table of losses with the papers' numbers inserted after the columns "ECE %", "ECE % scaled" and "T".

    The first source in papers/published.csv that copies the authors' own number is taken; NaN where there is none.
    """
    paper = published(dataset, network).query("metric == 'ece_percent' and quality == 'copied'")
    paper, table = paper.drop_duplicates("loss").set_index("loss"), table.copy()
    for ours, theirs in (("ECE %", "before_scaling"), ("ECE % scaled", "after_scaling"), ("T", "temperature")):
        if ours not in table:
            continue
        table.insert(table.columns.get_loc(ours) + 1, f"{ours} (papers)", paper[theirs])
    return table


def published(dataset: str = "cifar10", network: str = "resnet50") -> pd.DataFrame:
    """The papers' numbers: loss, metric, before_scaling, after_scaling, temperature, source, quality.

    Metrics are in per cent where their name says so. Where several sources give a number, all are there.
    """
    table = pd.read_csv(paths.root() / "papers" / "published.csv")
    chosen = (table.dataset == dataset) & (table.network == network)
    return table[chosen].drop(columns=["dataset", "network"]).reset_index(drop=True)
