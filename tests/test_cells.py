"""Every published cell, and what became of it."""

import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import parameters, write_parameters

from compendium import cells, paths

PUBLISHED = """\
dataset,network,loss,metric,before_scaling,after_scaling,temperature,source,quality
digits,small_resnet,adafocal,ece_percent,4.1,2.0,1.2,somebody else,independent run
digits,small_resnet,adafocal,ece_percent,4.0,,1.1,the authors,copied
digits,small_resnet,focal1,ece_percent,5.0,1.0,1.5,the authors,copied
digits,small_resnet,focal1,error_percent,20.0,20.0,1.5,the authors,copied
digits,small_resnet,adafocal,error_percent,30.0,,,hearsay,recalled
digits,small_resnet,focal1,nll,0.5,,,the authors,copied
digits,small_resnet,focal1,auroc_percent_vs_svhn,90,91,,the authors,copied
cifar10,resnet50,focal1,ece_percent,3.0,,2.0,the authors,copied
cifar10,resnet50,focal1,auroc_percent_vs_svhn,90,,2.0,the authors,copied
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The published cells beside a study 'tiny' with two seeds of focal1 and one of adafocal."""
    monkeypatch.chdir(tmp_path)
    values = parameters()
    values["studies"]["tiny"]["data"]["test"] = 400
    values["shared"]["losses"] |= {"focal1": {}, "adafocal": {}}
    write_parameters(tmp_path, values)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/published.csv").write_text(PUBLISHED)
    rows = []
    for loss, seed, error, ece, scaled in (
        ("focal1", 0, 0.21, 0.06, 0.03),
        ("focal1", 1, 0.23, 0.07, 0.05),
        ("adafocal", 0, 0.1, 0.02, 0.02),
    ):
        for metric, scaling, value in (
            ("error", "none", error),
            ("error", "ece", error),
            ("ece", "none", ece),
            ("ece", "ece", scaled),
            ("nll", "none", 0.6),
        ):
            about = {"loss": loss, "seed": seed, "metric": metric, "scaling": scaling}
            rows += [about | {"split": "test", "value": value}, about | {"split": "val", "value": 9.0}]
    paths.study("tiny").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(paths.study("tiny") / "metrics.csv", index=False)
    return cells.compared().set_index(["dataset", "loss", "metric", "scaling"])


def test_one_row_a_cell_and_the_authors_first(table):
    assert len(table) == 11 and table.index.is_unique
    first = table.loc["digits", "adafocal", "ece_percent", "none"]
    assert first.paper == 4.0 and first.source == "the authors" and first.also == "4.1 (somebody else)"
    assert table.loc["digits", "adafocal", "ece_percent", "ece"].paper == 2.0  # only the other one gives it
    assert ("digits", "focal1", "error_percent", "ece") not in table.index  # scaling changes no error


def test_a_variant_does_not_stand_in_for_the_papers_own(table, tmp_path):
    values = parameters()
    values["studies"]["variant"] = values["studies"]["tiny"]
    values["active"] |= {"studies": ["variant", "tiny"]}
    shutil.copytree(paths.study("tiny"), paths.study("variant"))
    write_parameters(tmp_path, values)
    assert cells.repeated() == {("digits", "small_resnet"): "variant"}  # the first
    values["active"] |= {"repeats": {"papers": {"documents": "tiny", "trees": "tiny"}}}
    write_parameters(tmp_path, values)
    assert cells.repeated() == {("digits", "small_resnet"): "tiny"}


def test_ours_and_verdicts_by_hand(table):
    ece = table.loc["digits", "focal1", "ece_percent", "none"]
    assert (ece.ours, ece.seeds, ece.study) == (pytest.approx(6.5), 2, "tiny") and ece.difference == pytest.approx(1.5)
    assert ece.sd == pytest.approx(np.sqrt(0.5)) and ece.verdict == "partial"  # beyond a quarter of 5, within twice 5
    assert ece.agree == 1  # 7 is partial, too, but 6 is a match
    assert table.loc["digits", "focal1", "ece_percent", "ece"].verdict == "no match"  # 4 against 1
    error = table.loc["digits", "focal1", "error_percent", "none"]
    assert error.verdict == "match"  # 22 against 20 %: two standard errors of 400 samples are 4
    assert table.loc["digits", "focal1", "nll", "none"].verdict == ""  # no rule for it
    recalled = table.loc["digits", "adafocal", "error_percent", "none"]
    assert recalled.ours == pytest.approx(10) and recalled.verdict == ""
    assert table.loc["cifar10", "focal1", "ece_percent", "none"].verdict == "owed: needs a GPU"
    assert table.loc["digits", "focal1", "auroc_percent_vs_svhn", "none"].verdict == ""  # see chapter 9
    assert table.loc["cifar10", "focal1", "auroc_percent_vs_svhn", "none"].verdict == "owed: needs a GPU"


def test_errors_within_two_and_four_standard_errors_or_deviations():
    unit = 100 * np.sqrt(0.2 * 0.8 / 400)  # 2 points
    for gap, verdict in ((1.9, "match"), (2.1, "partial"), (3.9, "partial"), (4.1, "no match")):
        assert cells.error_verdict(20 + gap * unit, 20, 400, np.nan) == verdict
        assert cells.error_verdict(20 - gap * unit, 20, 400, 0.1) == verdict
        assert cells.error_verdict(20 + gap * 3, 20, 400, 3.0) == verdict  # seeds differ by more


def test_matches_of_shuffled_numbers(table):
    """ECE as trained: ours 6.5 and 2, published 5 and 4: both partial; the other way round 2 against 5 is none."""
    found = cells.by_chance(table.reset_index()).loc["digits", "ece_percent", "none"]
    assert found.to_dict() == {"Cells": 2, "Match": 0, "Match shuffled": 0, "No match": 0, "No match shuffled": 0.5}


def test_counts(table):
    counts = cells.counted(table.reset_index())
    assert counts.loc["digits", "small_resnet"].to_dict() == {
        **{"Cells": 9, "Match": 2, "Partial": 2, "No match": 1, "No verdict": 4, "Owed": 0}
    }
    assert counts.loc["cifar10", "resnet50"].Owed == 2
