"""Reading what the pipeline left: histories, logits, temperatures and metrics of a study, without training."""

from pathlib import Path

import numpy as np
import pandas as pd

from compendium import paths, settings
from focalcal.metrics import check


def finished(study: str) -> list[tuple[str, int]]:
    """The (loss, seed) that chapter 3 scales: those that params.yaml names if the study is trained here, else all there
    are. FileNotFoundError if there is none."""
    chosen, top = settings.active(), paths.study(study) / "runs"
    if study in chosen["studies"]:
        return [(loss, seed) for loss in chosen["losses"] for seed in chosen["seeds"]]
    order = list(settings.params()["shared"]["losses"])
    found = [(path.parent.name, int(path.name)) for path in top.glob("*/*") if path.name.isdigit()]
    if not found:
        raise FileNotFoundError(f"No runs of study '{study}' in {top}; `dvc repro` takes published ones there.")
    return sorted(found, key=lambda run: (order.index(run[0]) if run[0] in order else len(order), *run))


def pairs(study: str, only=()) -> list[tuple[str, int]]:
    """The (loss, seed) of a study that chapter 3 has scaled, in the order of every table.

    only: some of the losses; ValueError, which names those there are, if the study lacks one.
    """
    table = _read(study, "temperatures.csv")
    found = list(dict.fromkeys(zip(table.loss, table.seed.tolist(), strict=True)))
    there = list(dict.fromkeys(loss for loss, _ in found))
    if missing := [loss for loss in only if loss not in there]:
        raise ValueError(f"Study '{study}' has no run of '{missing[0]}'; it has: {', '.join(there)}.")
    return [run for run in found if not only or run[0] in only]


def losses_and_seeds(study: str, only=()) -> tuple[list[str], list[int]]:
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
            table = pd.read_csv(paths.existing(paths.run(study, loss, seed) / "history.csv"))
            table.insert(0, "loss", loss)
            table.insert(1, "seed", seed)
            tables.append(table)
    if not tables:
        raise ValueError(f"Study '{study}' has no run with seeds {list(seeds)}.")
    return pd.concat(tables, ignore_index=True)


def milestones(history: pd.DataFrame) -> list[int]:
    """The epochs of a history from which on the learning rate is lower than before."""
    rates = history.groupby("epoch").learning_rate.max()
    return rates.index[rates.diff() < 0].tolist()


def curves(history: pd.DataFrame, column: str, how: str = "mean") -> pd.DataFrame:
    """One column of a history as a table of epochs x losses, mean or std over seeds (of a single one NaN)."""
    return history.pivot_table(column, "epoch", "loss", aggfunc=how, sort=False).reindex(columns=history.loss.unique())


def training_side(study: str, only=()) -> pd.DataFrame:
    """Overconfidence, mean confidence less accuracy, after the epoch that is kept: train, test and gap, the difference.

    A row per loss and seed. Where the training set was not evaluated then, train is of the last time before. Histories
    of older code have no mean confidence; minus the ECE of the training set stands in: the same where every bin is
    right more often than it says. only: as for ``pairs``.
    """
    table, kept = history(study, only), {}
    for run in pairs(study, only):
        kept[run] = paths.read_npz(paths.run(study, *run) / "logits.npz").get("epoch", np.inf)  # older: the last
    until = [kept[run] for run in zip(table.loss, table.seed, strict=True)]
    ends = table[table.epoch <= until].groupby(["loss", "seed"], sort=False).last()
    tested = metrics(study, only).query("split == 'test' and scaling == 'none'")
    tested = tested.pivot_table("value", ["loss", "seed"], "metric", sort=False)
    table = pd.DataFrame({"train": -ends.train_ece, "test": tested.confidence - 1 + tested.error}, index=ends.index)
    if "train_confidence" in ends:
        known = {side: ends[f"{side}_confidence"] - 1 + ends[f"{side}_error"] for side in table}
        table = pd.DataFrame(known).fillna(table)
    return table.assign(gap=table.test - table.train)


def logits(study: str, loss: str, seed: int) -> dict[str, tuple]:
    """What ``read_logits`` gives of a run."""
    return read_logits(paths.run(study, loss, seed) / "logits.npz")


def read_logits(path: Path) -> dict[str, tuple]:
    """Checked (logits, labels, masked) of the val and test split, as every metric takes them; see focalcal.metrics.

    ValueError, naming the file, if they are not there or no logits.
    """
    file = paths.read_npz(path)
    try:
        masked = tuple(file["masked"].tolist()) if "masked" in file else ()
        return {split: (*check(file[f"{split}_logits"], file[f"{split}_labels"]), masked) for split in ("val", "test")}
    except KeyError as problem:
        raise ValueError(f"{path} lacks the array {problem}.") from problem
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem


def temperatures(study: str, only=()) -> pd.Series:
    """temperatures.csv, by loss, seed and scaling (none, nll, ece); only: as for ``pairs``."""
    return _table(study, "temperatures.csv", only).set_index(["loss", "seed", "scaling"]).temperature


def metrics(study: str, only=()) -> pd.DataFrame:
    """metrics.csv: loss, seed, split, scaling, metric, value (fractions; NLL in nats); only: as for ``pairs``.

    metric: a name in metrics.METRICS, or confidence, its mean.
    """
    return _table(study, "metrics.csv", only)


def _read(study: str, name: str) -> pd.DataFrame:
    if not paths.study(study).is_dir():
        settings.study(study)  # ValueError, which names those there are, if it is none of them
    return pd.read_csv(paths.existing(paths.study(study) / name), keep_default_na=False, dtype={"loss": str})


def _table(study: str, name: str, only) -> pd.DataFrame:
    table = _read(study, name)
    return table[table.loss.isin(losses_and_seeds(study, only)[0])].reset_index(drop=True) if only else table


def results(study: str, how: str = "mean", only=()) -> pd.DataFrame:
    """metrics.csv of the test split, wide: a row per loss, columns (metric, scaling); mean or std over seeds."""
    table = metrics(study, only).query("split == 'test'")
    return table.pivot_table("value", "loss", ["metric", "scaling"], aggfunc=how, sort=False)


def gradients(study: str, loss: str, seed: int) -> tuple[list[int], np.ndarray]:
    """Epochs, and per-sample norms of the head's gradient at each: (epochs, N), see networks.head_gradient_norms."""
    file = paths.read_npz(paths.run(study, loss, seed) / "gradients.npz")
    return file["epochs"].tolist(), file["norms"].astype(np.float32)


def shifted(study: str, loss: str, seed: int) -> dict[str, np.ndarray]:
    """Logits (N, K) of images from elsewhere, by name, see trainings.predict_shifted; of a study of texts, none."""
    if settings.data(study).vectors:
        return {}
    file = paths.read_npz(paths.run(study, loss, seed) / "shifted.npz")
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


def published(dataset: str, network: str) -> pd.DataFrame:
    """The papers' numbers: loss, metric, before_scaling, after_scaling, temperature, source, quality.

    Metrics are in per cent where their name says so. Where several sources give a number, all are there.
    """
    table = pd.read_csv(paths.root() / "papers" / "published.csv")
    chosen = (table.dataset == dataset) & (table.network == network)
    return table[chosen].drop(columns=["dataset", "network"]).reset_index(drop=True)


def repeats_papers(study: str) -> bool:
    """Whether a study has a data set and network of which the papers' numbers are known."""
    return study in settings.params()["studies"] and not published(*data_and_network(study)).empty


def data_and_network(study: str) -> tuple[str, str]:
    """As published.csv names them."""
    training = settings.params()["shared"]["protocol"] | settings.study(study).training
    return settings.data(study).dataset, training["network"].removesuffix("_tiny_imagenet")


def papers(study: str) -> pd.DataFrame:
    """The papers' ECE in per cent that goes beside a study's: before_scaling, after_scaling and temperature, by loss.

    Of its own data set and network, if they have been published, else of CIFAR-10 and ResNet-50; empty for models from
    elsewhere. The first source in papers/published.csv that has the authors' own number is taken.
    """
    own = data_and_network(study) if repeats_papers(study) else ("cifar10", "resnet50")
    table = published(*own).query("metric == 'ece_percent' and quality in ('copied', 'read by eye')")
    table = table.drop_duplicates("loss").set_index("loss")[["before_scaling", "after_scaling", "temperature"]]
    return table if study in settings.params()["studies"] else table.head(0)


def beside_papers(table: pd.DataFrame, study: str) -> pd.DataFrame:
    """A table of losses with the papers' numbers inserted after the columns "ECE %", "ECE % scaled" and "T"."""
    paper, table = papers(study), table.copy()
    for ours, theirs in (("ECE %", "before_scaling"), ("ECE % scaled", "after_scaling"), ("T", "temperature")):
        table.insert(table.columns.get_loc(ours) + 1, f"{ours} (papers)", paper[theirs])
    return table


def against_papers(study: str, only=()) -> pd.DataFrame:
    """ECE in per cent before and after scaling by ECE beside the papers', with verdicts; see ``verdict``.

    A row per loss: mean and, with several seeds, their standard deviation, the papers' number, difference, verdict.
    """
    mean, deviation, paper = 100 * results(study, only=only), 100 * results(study, "std", only), papers(study)
    table = pd.DataFrame(index=mean.index)
    for suffix, scaling, theirs in (("", "none", "before_scaling"), (" scaled", "ece", "after_scaling")):
        table[f"ECE %{suffix}"] = mean["ece", scaling]
        if deviation.notna().any(axis=None):
            table[f"sd{suffix}"] = deviation["ece", scaling]
        table[f"ECE %{suffix} (papers)"] = paper[theirs]
        table[f"difference{suffix}"] = table[f"ECE %{suffix}"] - table[f"ECE %{suffix} (papers)"]
        judged = zip(table[f"ECE %{suffix}"], table[f"ECE %{suffix} (papers)"], strict=True)
        table[f"verdict{suffix}"] = [verdict(*pair) for pair in judged]
    return table
