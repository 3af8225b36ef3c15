"""What pictures say, read off their axes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from focalcal import plots


@pytest.fixture
def ax():
    return Figure().subplots()


def test_a_map_of_verdicts_has_a_sign_for_each_order(ax):
    """focal1's ECE is 0.3 points below cross-entropy's, and fragile; of brier nothing is known."""
    pairs = pd.DataFrame({"one": ["cross_entropy", "cross_entropy", "focal1"], "other": ["focal1", "brier", "brier"]})
    pairs = pairs.assign(difference=[0.003, -0.001, 0.0], fragile=[True, False, False])
    pairs["verdict"] = ["worse", "not distinguishable", "not distinguishable"]
    plots.verdict_map(ax, ["cross_entropy", "focal1", "brier"], pairs, 100)
    grid = ax.images[0].get_array().filled(9)
    assert grid.tolist() == [[9, -1, 0], [1, 9, 0], [0, 0, 9]]
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert (written[1, 0], written[0, 1], written[2, 0]) == ("+0.3?", "-0.3?", "-0.1")
    colours = dict(zip((-1, 0, 1), ax.images[0].cmap.colors, strict=True))
    (_, better), *_, (_, worse) = [(line.get_label(), line.get_color()) for line in ax.lines]
    assert (better, worse) == (colours[1], colours[-1])


def test_reliability_bars_are_accuracies_and_gaps_reach_to_the_confidence(ax):
    """Two bins of forty: confidence 0.4 with a quarter right, 0.9 with all right."""
    plots.reliability(ax, np.array([40, 40]), np.array([16.0, 36.0]), np.array([10.0, 40.0]), "#117733")
    boxes = [(bar.get_x(), bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches]
    for x, right, sure in ((0.0, 0.25, 0.4), (0.5, 1.0, 0.9)):
        at = [sorted((low, high)) for left, low, high in boxes if left == pytest.approx(x, abs=0.02)]
        assert any(span == pytest.approx([0, right]) for span in at), (x, at)
        assert any(span == pytest.approx(sorted([right, sure])) for span in at), (x, at)


def test_of_many_losses_some_are_coloured(ax):
    table = pd.DataFrame({loss: [1.0, 2.0] for loss in ("cross_entropy", "focal3", "brier")})
    assert plots.among(list(table), "focal3", "adafocal") == ["focal3"]
    assert plots.among(["mine", *table], "focal3") == ["focal3", "mine"], "a user's own loss is always shown"
    plots.curves(ax, table, bright=["focal3"])
    colours = {line.get_label(): line.get_color() for line in ax.lines}
    assert colours[plots.label("focal3")] == plots.style("focal3")["color"]
    grey = {colour for label, colour in colours.items() if label != plots.label("focal3")}
    assert len(grey) == 1 and plots.style("brier")["color"] not in grey
