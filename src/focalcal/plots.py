"""Drawing. Each function takes arrays or a table and an ``ax``; none computes a result, shows or restyles.

One look per loss everywhere: ``STYLE`` gives label, colour (safe for the common colour-vision deficiencies,
and told apart by dashes too) and line style.
"""

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

STYLE = {
    "cross_entropy": ("Cross-entropy", "#000000", "-"),
    "label_smoothing": ("Label smoothing", "#777777", "--"),
    "brier": ("Brier", "#44AA99", "-."),
    "mmce": ("MMCE", "#C2A83E", "--"),
    "focal1": ("Focal, γ = 1", "#66BBEE", "-"),
    "focal2": ("Focal, γ = 2", "#3377BB", "-"),
    "focal3": ("Focal, γ = 3", "#1A2A77", "-"),
    "focal4": ("Focal, γ = 4", "#5A3F9E", "--"),
    "focal5": ("Focal, γ = 5", "#7E57C2", "-"),
    "focal6": ("Focal, γ = 6", "#A98BE0", "--"),
    "focal7": ("Focal, γ = 7", "#C9B6F2", "-"),
    "flsd53": ("FLSD-53", "#117733", "-"),
    "flsc531": ("FLSc-531", "#999933", ":"),
    "adafocal": ("AdaFocal", "#D55E00", "-"),
    "dual_focal": ("Dual focal", "#AA4499", "--"),
    "inverse_focal": ("Inverse focal", "#882255", ":"),
    "detached_focal": ("Focal, γ = 3, detached", "#1A2A77", ":"),
    "focal_mdca": ("Focal + MDCA", "#66BBEE", "--"),
    "margin_label_smoothing": ("Margin smoothing", "#777777", ":"),
    "bsce_gra": ("BSCE-GRA", "#3377BB", "-."),
    "focal_brier": ("Focal + Brier", "#44AA99", ":"),
    "aurc": ("AURC", "#CC3311", "-"),
    "aurc_hard": ("AURC, hard ranks", "#CC3311", "--"),
    "focal_quality": ("Focal × quality", "#3377BB", "--"),  # of detectors, as all that follow
    "soft_focal": ("Focal, IoU as target", "#66BBEE", "-."),
    "quality_focal": ("QFL, β = 2", "#D55E00", "--"),
    "quality_bce": ("QFL, β = 0", "#117733", "--"),
    "no_dfl": ("QFL, β = 2, no DFL", "#D55E00", ":"),
}
SPARE = ("#661100", "#0077BB", "#EE3377", "#009988", "#AA7744", "#332288")  # for losses that users add

THEME = {  # for seaborn.set_theme(rc=THEME) in a notebook's set-up cell
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
}


def style(loss: str) -> dict:
    """Line keywords (label, color, linestyle) of a loss; one not in STYLE gets a spare colour and its name."""
    label, color, dashes = STYLE.get(loss, (loss, SPARE[sum(loss.encode()) % len(SPARE)], "-"))
    return {"label": label, "color": color, "linestyle": dashes}


def label(loss: str) -> str:
    """The name of a loss in legends and tables."""
    return style(loss)["label"]


def among(losses, *names: str) -> list[str]:
    """The names that are among the losses, in the order given, then those without a STYLE, a user's; all if none is."""
    own = [loss for loss in losses if loss not in (*STYLE, *names)]
    return [*(name for name in names if name in losses), *own] or list(losses)


def curves(ax, table, milestones=(), settled: int = 0, spread=None, bright=(), **axis) -> None:
    """A line per column (loss) of an epochs x losses table; dotted verticals where the learning rate drops.

    settled: the y axis is cut to 98 % of what happens after this many epochs; spread: half widths of a band around each
    line, such as standard deviations over seeds, where not NaN; bright: the losses in colour, the others are grey (by
    default all are in colour); axis: keywords of ax.set, such as ylabel.
    """
    for loss in table:
        look = style(loss) | {"linewidth": 1.6}
        if bright and loss not in bright:
            look |= {"color": "#CCCCCC", "linestyle": "-", "linewidth": 1, "zorder": 1, "label": "_other"}
        ax.plot(table.index, table[loss], **look)
        if spread is not None and spread[loss].notna().any():
            low, high = table[loss] - spread[loss], table[loss] + spread[loss]
            ax.fill_between(table.index, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if bright and set(table) - set(bright):
        ax.plot([], [], color="#CCCCCC", linewidth=1, label="the others")
    decays(ax, milestones)
    ax.set(xlabel="Epoch", **axis)
    ax.margins(x=0.01)
    if 0 < settled < len(table):
        low, high = table.min(axis=None), table.iloc[settled:].quantile(0.98).max()
        ax.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.1 * (high - low))


def decays(ax, milestones) -> None:
    """Mark the epochs where the learning rate drops."""
    for epoch in milestones:
        ax.axvline(epoch - 0.5, color="#999999", linestyle=":", linewidth=1, zorder=0)


def plain_log(axis) -> None:
    """Label a logarithmic axis with plain numbers, 1, 2, 5 and 10 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_right(figure, ax) -> None:
    """One legend for all panels, to the right of the figure, in the order of ``ax``."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)


def reliability(ax, count, confidence, correct, color: str, title: str = "", chance=None) -> None:
    """Reliability diagram from metrics.bin_sums: accuracy per bin as bars, the gap to confidence hatched.

    The bins are drawn with equal width, as they were made; empty ones are left blank, and those of fewer than twenty
    samples are pale. chance: how far a bin's accuracy may be from its confidence by chance, drawn as a grey span.
    """
    filled, width = count > 0, 1 / len(count)
    left, many = (np.arange(len(count)) * width)[filled], count[filled] >= 20
    total = np.maximum(count, 1)
    accuracy, confidence = (correct / total)[filled], (confidence / total)[filled]
    shades = [matplotlib.colors.to_rgba(color, 0.5 if enough else 0.15) for enough in many]
    ax.bar(left, accuracy, width, align="edge", color=shades, edgecolor="white", linewidth=0.5)
    gap = {"align": "edge", "fill": False, "edgecolor": "#CC3311", "hatch": "////", "linewidth": 0.6}
    ax.bar(left[many], (confidence - accuracy)[many], width, accuracy[many], **gap)
    if chance is not None:
        at, said, half = (values[many] for values in (left + width / 2, confidence, chance[filled]))
        ax.vlines(at, said - half, said + half, color="#555555", linewidth=1.5)
    ax.plot([0, 1], [0, 1], color="#444444", linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks((0, 0.5, 1), ("0", "0.5", "1"))


def panels(count: int, columns: int = 4):
    """A figure of square panels in rows of ``columns``, and its first ``count`` axes; the rest stay blank."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 2.75 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for place in range(count, rows * columns):
        axes.flat[place].set_axis_off()
        if place >= columns:
            axes.flat[place - columns].tick_params(labelbottom=True)
    return figure, axes.flat[:count]


def estimate(ax, loss: str, y: float, value: float, interval, sd: float = np.nan, full: bool = True) -> None:
    """A loss's value as a dot at height y: open or full, the thick line its interval (low, high).

    sd: where not NaN, a thin line with ends to either side, such as the standard deviation over seeds.
    """
    color = style(loss)["color"]
    ax.plot(interval, [y, y], color=color, linewidth=2)
    if not np.isnan(sd):
        ax.errorbar(value, y, xerr=sd, color=color, linewidth=0.8, capsize=2.5)
    ax.plot(value, y, "o", color=color, markersize=5, markerfacecolor=color if full else "white")


def open_and_full(ax, losses, opened: str = "as trained", full: str = "scaled by NLL") -> None:
    """Rows of ``estimate``: the losses' names down the y axis, and what an open and a full dot are in the legend."""
    ax.set_yticks(range(len(losses)), [label(loss) for loss in losses])
    ax.set_ylim(len(losses) - 0.5, -0.5)
    for name, inside in ((opened, "white"), (full, "#555555")):
        ax.plot([], [], "o", color="#555555", markersize=5, markerfacecolor=inside, label=name)


def verdict_map(ax, losses, pairs, factor: float = 1) -> None:
    """A square of losses: blue where the row's is better than the column's, red where worse, grey undecided.

    pairs: rows with columns one, other, difference and verdict (of one against other) and fragile (marked with a
    question mark). The differences, row minus column times ``factor``, are written into the squares.
    """
    colors = {"worse": "#CC6677", "not distinguishable": "#EEEEEE", "better": "#4477AA"}
    sign, grid = {"better": 1, "worse": -1}, np.full((len(losses), len(losses)), np.nan)
    for row in pairs.itertuples():
        i, j = losses.index(row.one), losses.index(row.other)
        value = sign.get(row.verdict, 0)
        grid[i, j], grid[j, i] = value, -value
        for x, y, gap in ((j, i, row.difference), (i, j, -row.difference)):
            text, ink = f"{factor * gap:+.1f}" + "?" * row.fragile, "white" if value else "#777777"
            ax.text(x, y, text, color=ink, ha="center", va="center", fontsize=7)
    ax.imshow(grid, cmap=matplotlib.colors.ListedColormap(list(colors.values())), vmin=-1, vmax=1)
    for name, color in reversed(colors.items()):
        ax.plot([], [], "s", color=color, label=f"row {name}")
    names = [label(loss) for loss in losses]
    ax.set_xticks(range(len(losses)), names, rotation=90)
    ax.set_yticks(range(len(losses)), names)
    ax.grid(visible=False)
