"""Every published cell of the papers' tables, with ours beside it."""

from itertools import product

import numpy as np
import pandas as pd

from compendium import paths, runs, settings

METRICS = {  # in published.csv -> name, in metrics.csv
    "error_percent": ("Error %", "error"),
    "ece_percent": ("ECE %", "ece"),
    "adaptive_ece_percent": ("AdaECE %", "adaece"),
    "classwise_ece_percent": ("Classwise ECE %", "classwise_ece"),
    "nll": ("NLL", "nll"),
    "auroc_percent_vs_svhn": ("AUROC % against SVHN", None),  # see chapter 9
    "auroc_percent_vs_cifar10c_gauss5": ("AUROC % against noise", None),
}
QUALITY = ("copied", "read by eye", "from figure", "independent run", "recalled")  # the authors' own numbers first
KEYS = ["dataset", "network", "loss", "metric"]


def published() -> pd.DataFrame:
    """One row for each dataset, network, loss, metric and scaling (none or ece) that has been published.

    Columns: those, paper, temperature, source, quality, and also: what other sources say, "" if there are none. Where
    several sources give a number, the authors' own comes first.
    """
    table = pd.read_csv(paths.root() / "papers" / "published.csv")
    rank = table.quality.map(lambda quality: next(i for i, kind in enumerate(QUALITY) if quality.startswith(kind)))
    table = table.assign(rank=rank).sort_values("rank", kind="stable")
    rows = []
    for key, group in table.groupby(KEYS, sort=False):
        for column, scaling in (("before_scaling", "none"), ("after_scaling", "ece")):
            given = group.dropna(subset=column)
            if given.empty or (key[3] == "error_percent" and scaling == "ece"):  # scaling changes no error
                continue
            first, others = given.iloc[0], given.iloc[1:]
            also = "; ".join(
                f"{value:g} ({source})" for value, source in zip(others[column], others.source, strict=True)
            )
            about = {"temperature": first.temperature, "source": first.source, "quality": first.quality, "also": also}
            rows.append(dict(zip(KEYS, key, strict=True)) | {"scaling": scaling, "paper": first[column]} | about)
    order = {name: place for place, name in enumerate(settings.params()["shared"]["losses"])}
    places = {key: place for place, key in enumerate(dict.fromkeys(zip(table.dataset, table.network, strict=True)))}
    found = pd.DataFrame(rows)
    found["place"] = [places[key] for key in zip(found.dataset, found.network, strict=True)]
    found["order"], found["kind"] = found.loss.map(order), found.metric.map(list(METRICS).index)
    found = found.sort_values(["place", "kind", "scaling", "order"], ascending=[True, True, False, True], kind="stable")
    return found.drop(columns=["place", "order", "kind"]).reset_index(drop=True)


def error_verdict(ours: float, paper: float, samples: int, sd: float) -> str:
    """How an error in per cent compares: match within two standard errors of a test set of so many samples (or two
    standard deviations over seeds, if that is more), partial within four, else no match."""
    unit = max(100 * np.sqrt(paper / 100 * (1 - paper / 100) / samples), 0 if np.isnan(sd) else sd)
    gap = abs(ours - paper) / unit
    return "match" if gap <= 2 else "partial" if gap <= 4 else "no match"


def _verdict(cell, ours: float, paper: float, sd: float = np.nan) -> str:
    """By the rule of the cell's metric."""
    if cell.metric == "error_percent":
        return error_verdict(ours, paper, settings.data(cell.study).test, sd)
    return runs.verdict(ours, paper)


def repeated() -> dict[tuple[str, str], str]:
    """The active studies that repeat a published data set and network and have results: (dataset, network) -> study.

    Of several, variants among them, that which active.repeats names as documents or trees, or else the first.
    """
    found, chosen = {}, settings.active()
    papers = [group[kind] for group in chosen["repeats"].values() for kind in ("documents", "trees") if kind in group]
    for study in [*papers, *chosen["studies"], *chosen["published"]]:
        if runs.repeats_papers(study) and (paths.study(study) / "metrics.csv").is_file():
            found.setdefault(runs.data_and_network(study), study)
    return found


def compared() -> pd.DataFrame:
    """``published`` with ours: study, ours (mean over seeds), sd, seeds, difference, verdict; what is owed has none.

    Also agree: how many seeds would have that verdict, each taken alone. Per cent, but for the NLL. Ours under scaling
    ece is at the temperature of lowest validation ECE, as the papers'. A number whose source is lost (quality recalled)
    gets no verdict, and neither does a metric without a rule (NLL, AUROC).
    """
    table, studies = published(), repeated()
    table["study"] = [studies.get(key, "") for key in zip(table.dataset, table.network, strict=True)]
    tested = {study: runs.metrics(study).query("split == 'test'") for study in studies.values()}
    rows = []
    for cell in table.itertuples():
        metric, row = METRICS[cell.metric][1], {"ours": np.nan, "sd": np.nan, "seeds": 0, "verdict": "", "agree": 0}
        if cell.study and metric:
            here = tested[cell.study].query("loss == @cell.loss and metric == @metric and scaling == @cell.scaling")
            values = here.value * (100 if "percent" in cell.metric else 1)
            row |= {"ours": values.mean(), "sd": values.std(), "seeds": len(values)}
        if row["seeds"] and cell.quality != "recalled" and metric != "nll":
            row["verdict"] = _verdict(cell, row["ours"], cell.paper, row["sd"])
            row["agree"] = sum(_verdict(cell, value, cell.paper) == row["verdict"] for value in values)
        rows.append(row)
    table = table.join(pd.DataFrame(rows))
    table["difference"] = table.ours - table.paper
    images = table.dataset.isin(["cifar10", "cifar100", "tiny_imagenet"])
    owed = np.where(images, "owed: needs a GPU", "owed: not trained yet")
    elsewhere = table.metric.map(lambda metric: METRICS[metric][1] is None) & (table.study != "")
    table["verdict"] = np.where((table.seeds == 0) & ~elsewhere, owed, table.verdict)
    return table


def by_chance(table: pd.DataFrame) -> pd.DataFrame:
    """How many cells match, by data set, metric and scaling, and how many would if the losses' numbers were shuffled.

    Shuffled: the mean over all orders in which the published numbers may stand beside ours, of all losses that have a
    verdict there. Columns Cells, Match, Match shuffled, No match, No match shuffled.
    """
    judged, rows = table[table.verdict.isin(["match", "partial", "no match"])], {}
    for key, group in judged.groupby(["dataset", "metric", "scaling"], sort=False):
        pairs = product(group.itertuples(), group.paper)
        found = pd.Series([_verdict(cell, cell.ours, paper, cell.sd) for cell, paper in pairs])
        rows[key] = {"Cells": len(group)}
        for name, verdict in (("Match", "match"), ("No match", "no match")):
            rows[key] |= {
                name: (group.verdict == verdict).sum(),
                f"{name} shuffled": (found == verdict).mean() * len(group),
            }
    return pd.DataFrame.from_dict(rows, "index").rename_axis(["dataset", "metric", "scaling"])


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """How many cells of each data set and network there are, and what became of them."""
    kinds = {"match": "Match", "partial": "Partial", "no match": "No match", "": "No verdict", "owed": "Owed"}
    named = table.assign(kind=table.verdict.str.split(":").str[0].map(kinds))
    counts = named.groupby(["dataset", "network"], sort=False).kind.value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=list(kinds.values()), fill_value=0)
    counts.insert(0, "Cells", counts.sum(axis=1))
    return counts
