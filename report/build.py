"""The report: a static site from executed notebooks and the tables behind the figures, built by `compendium report`.

Needs what `make results` or `make artifacts` leaves. Nothing is executed; no page asks another machine for anything.
"""

import json
import shutil
from pathlib import Path

import altair as alt
import itables
import nbformat
import numpy as np
import pandas as pd
import vl_convert
from sphinx.cmd.build import main as sphinx
from sphinx.util.osutil import ensuredir

from compendium import paths, runs, settings
from compendium.cells import METRICS as METRIC_NAMES
from focalcal import metrics, plots

HERE = Path(__file__).parent
BINS, TENTHS = (5, 10, 15, 30), range(5, 36)  # of the reliability diagram; temperatures 0.5 ... 3.5
METRICS = {"ece": "ECE %", "nll": "NLL", "error": "Error %", "adaece": "AdaECE %", "classwise_ece": "Classwise %"}
METRICS |= {"mce": "MCE %", "brier": "Brier"}
CURVES = {
    "test_nll": "Test NLL (nats)",
    "test_ece": "Test ECE",
    "test_error": "Test error",
    "train_nll": "Training NLL (nats)",
    "weight_norm": "Norm of the last layer",
}


def numbers(studies: list[str]) -> pd.DataFrame:
    """Every metric of every loss with its interval, one row each, beside the papers' numbers."""
    parts = []
    for study in studies:
        table = pd.read_csv(paths.existing(paths.root() / "figures" / study / "10_evidence" / "intervals.csv"))
        paper = runs.papers(study) / 100
        of_scaling = {"none": "before_scaling", "ece": "after_scaling"}
        found = [
            paper[of_scaling[row.scaling]].get(row.loss, np.nan)
            if row.metric == "ece" and row.scaling in of_scaling
            else np.nan
            for row in table.itertuples()
        ]
        parts.append(table.assign(study=study, loss=table.loss.map(plots.label), papers=found))
    table = pd.concat(parts).sort_values(["metric", "scaling"], key=_first, kind="stable")
    values = ["value", "low", "high", "sd", "papers"]
    percent = ~table.metric.isin(["nll", "brier"])
    table.loc[percent, values] *= 100
    table[values] = table[values].astype(float).round(3)
    table["metric"] = table.metric.map(METRICS)
    for column in ("sd", "papers"):  # empty where there is none
        table[column] = table[column].astype(object).where(table[column].notna(), "")
    return table[["loss", "metric", "scaling", *values, "study"]]


def _first(column: pd.Series) -> pd.Series:
    """What people look for first comes first."""
    order = ("ece", "nll", "error") if column.name == "metric" else ("none", "nll", "ece")
    return column.map({name: place for place, name in enumerate(order)}).fillna(9)


def cells(group: str) -> pd.DataFrame:
    """Every published cell with ours, as chapter 13 left them."""
    table = pd.read_csv(paths.existing(paths.root() / "figures" / group / "13_published_cells" / "cells.csv"))
    table = table.sort_values(
        "seeds", ascending=False, key=lambda seeds: seeds > 0, kind="stable"
    )  # what was run first
    names = table.metric.map({metric: name for metric, (name, _) in METRIC_NAMES.items()})
    shown = pd.DataFrame({"data set": table.dataset, "network": table.network, "loss": table.loss.map(plots.label)})
    shown["metric"], shown["scaling"], shown["papers"] = names, table.scaling, table.paper.round(2)
    for column in ("ours", "sd"):  # empty where there is none
        shown[column] = table[column].round(2).astype(object).where(table[column].notna(), "")
    return shown.assign(verdict=table.verdict.fillna("no verdict"), source=table.quality)


def scripts() -> str:
    """What the tables need, to be inlined once."""
    return itables.javascript.generate_init_offline_itables_html(Path(itables.__file__).parent / "html/dt_bundle.js")


def table_html(name: str, table: pd.DataFrame, filtered: list[int]) -> str:
    """A sortable table, with a filter for each of some columns, in an element called table-<name>."""
    filters = {"extend": "dropdown", "icon": "search", "text": "Filter", "content": ["searchList"]}
    shown = itables.to_html_datatable(
        table,
        connected=False,
        text_in_header_can_be_selected=False,  # a click on a heading sorts
        columnDefs=[{"targets": filtered, "columnControl": [filters]}],
        showIndex=False,
        maxBytes=0,
        lengthMenu=[12, 36, 400],
        pageLength=12,
    )
    return f'<div class="wide" id="table-{name}">{shown}</div>'


def chart_html(name: str, chart: alt.Chart, description: str) -> str:
    """A place for a chart, and the call that draws it; the libraries are inlined once by ``libraries``."""
    spec = json.dumps(chart.properties(description=description).to_dict(), separators=(",", ":"))
    return (
        f'<div class="chart" id="chart-{name}" role="group" aria-label="{description}"></div>'
        f'<script>vegaEmbed("#chart-{name}", {spec}, {{"actions": false, "renderer": "svg"}});</script>'
    )


def libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    return f"<script>(() => {{{vl_convert.javascript_bundle()}}})();</script>"


def reliability(study: str) -> str:
    """A reliability diagram of the first seed, its loss, bins and temperature to be chosen."""
    losses, seeds = runs.losses_and_seeds(study)
    lines = ["loss,bins,t,bin,n,confidence,correct"]
    for loss in losses:
        logits, *labels = runs.logits(study, loss, seeds[0])["test"]
        for tenths in TENTHS:
            confidence, correct = metrics.confidence_correct(logits * (10 / tenths), *labels)
            for bins in BINS:
                sums = metrics.bin_sums(confidence, correct, metrics.equal_width_edges(bins))
                for b, (n, c, right) in enumerate(zip(*sums, strict=True)):
                    if n:
                        lines.append(f'"{plots.label(loss)}",{bins},{tenths},{b},{n:.0f},{c:.1f},{right:.0f}')
    data = alt.InlineData(
        "\n".join(lines),
        format=alt.CsvDataFormat(
            type="csv", parse={name: "number" for name in ("bins", "t", "bin", "n", "confidence", "correct")}
        ),
    )
    names = [plots.label(loss) for loss in losses]
    loss = alt.param("loss", value=names[0], bind=alt.binding_select(options=names, name="Loss "))
    bins = alt.param("bins", value=15, bind=alt.binding_select(options=list(BINS), name="Bins "))
    t = alt.param("T", value=1, bind=alt.binding_range(min=0.5, max=3.5, step=0.1, name="Temperature "))
    chosen = alt.Chart(data).transform_filter(
        (alt.datum.loss == loss) & (alt.datum.bins == bins) & (alt.datum.t == alt.expr.round(10 * t))
    )
    bars = chosen.transform_calculate(
        low="datum.bin / datum.bins", high="(datum.bin + 1) / datum.bins",
        accuracy="datum.correct / datum.n", mean="datum.confidence / datum.n",
    )  # fmt: skip
    x = alt.X("low:Q", scale=alt.Scale(domain=[0, 1]), title="Confidence")
    tips = [alt.Tooltip("n:Q", title="samples"), alt.Tooltip("mean:Q", format=".3f", title="mean confidence")]
    tips += [alt.Tooltip("accuracy:Q", format=".3f", title="accuracy")]
    accuracy = bars.mark_bar(color="#3377BB", stroke="white").encode(
        x,
        alt.X2("high:Q"),
        alt.Y("accuracy:Q", scale=alt.Scale(domain=[0, 1]), title="Accuracy"),
        alt.Y2Datum(0),
        tooltip=tips,
    )
    mean = bars.mark_tick(color="#CC3311", thickness=3, width=14).encode(alt.X("mean:Q"), alt.Y("mean:Q"), tooltip=tips)
    diagonal = (
        alt.Chart(alt.InlineData([{"x": 0}, {"x": 1}]))
        .mark_line(color="#444", strokeDash=[4, 4])
        .encode(alt.X("x:Q"), alt.Y("x:Q"))
    )
    ece = (
        chosen.transform_calculate(gap="abs(datum.confidence - datum.correct)")
        .transform_aggregate(gap="sum(gap)", n="sum(n)")
        .transform_calculate(text="'ECE ' + format(100 * datum.gap / datum.n, '.2f') + ' %'")
        .mark_text(align="left", fontSize=20, fontWeight="bold")
        .encode(x=alt.value(14), y=alt.value(24), text="text:N")
    )
    chart = alt.layer(accuracy, mean, diagonal, ece).add_params(loss, bins, t).properties(width=300, height=300)
    return chart_html("reliability", chart, "Reliability diagram: accuracy over confidence, with the ECE")


def curves(study: str) -> str:
    """Training curves of every loss, mean over seeds, without the first tenth of the epochs, which dwarfs the rest."""
    history = runs.history(study).query("epoch > 0.1 * epoch.max()")
    table = history.melt(["loss", "seed", "epoch"], list(CURVES), "curve").dropna()
    table = table.groupby(["loss", "curve", "epoch"], sort=False).value.mean().reset_index().round(5)
    losses = list(history.loss.unique())
    table["loss"], table["curve"] = table.loss.map(plots.label), table.curve.map(CURVES)
    names, looks = [plots.label(loss) for loss in losses], [plots.style(loss) for loss in losses]
    dashes = {"-": [1, 0], "--": [6, 3], "-.": [6, 3, 1, 3], ":": [2, 2]}
    which = alt.param(
        "curve", value=CURVES["test_nll"], bind=alt.binding_select(options=list(CURVES.values()), name="Curve ")
    )
    single = alt.selection_point(fields=["loss"], bind="legend")
    only = alt.param("only", value="All", bind=alt.binding_select(options=["All", *names], name="Loss "))
    data = alt.InlineData(
        table.to_csv(index=False), format=alt.CsvDataFormat(type="csv", parse={"epoch": "number", "value": "number"})
    )
    legend = alt.Legend(
        title=None, orient="bottom", columns=3, symbolSize=200, symbolStrokeWidth=2, symbolType="stroke"
    )
    chart = (
        alt.Chart(data)
        .transform_filter(alt.datum.curve == which)
        .transform_filter((only == "All") | (alt.datum.loss == only))
        .mark_line(point=alt.OverlayMarkDef(size=14))
        .encode(
            alt.X("epoch:Q", title="Epoch", axis=alt.Axis(labelFlush=True)),
            alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            alt.Color("loss:N", scale=alt.Scale(domain=names, range=[look["color"] for look in looks]), legend=legend),
            alt.StrokeDash(
                "loss:N", scale=alt.Scale(domain=names, range=[dashes[look["linestyle"]] for look in looks])
            ),
            opacity=alt.condition(single, alt.value(1), alt.value(0.08)),
            tooltip=["loss:N", "epoch:Q", alt.Tooltip("value:Q", format=".4f")],
        )
        .add_params(which, only, single)
        .properties(width="container", height=320, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    )
    return chart_html("curves", chart, "Training curves of every loss over the epochs")


def answer(study: str) -> str:
    """Two sentences from the numbers."""
    table = pd.read_csv(paths.root() / "figures" / study / "10_evidence" / "intervals.csv").query("metric == 'ece'")
    raw, scaled = (table[table.scaling == s].set_index("loss") for s in ("none", "nll"))
    best, worst = raw.value.idxmin(), raw.value.idxmax()

    def with_interval(row):
        return f"{100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"

    differences = pd.read_csv(paths.root() / "figures" / study / "10_evidence" / "differences.csv")
    after = differences.query("metric == 'ece' and scaling == 'nll'").verdict
    real = (after != "not distinguishable").sum()
    return (
        "as trained, with one seed, the expected calibration error runs from "
        f"{with_interval(raw.loc[best])} ({plots.label(best)}) to {with_interval(raw.loc[worst])} "
        f"({plots.label(worst)}). After dividing the logits by one temperature (of lowest validation NLL), all lie "
        f"between {100 * scaled.value.min():.1f} and {100 * scaled.value.max():.1f} %, "
        f"and {real or 'none'} of {len(after)} pairs of losses can be told apart."
    )


def notebooks(source: Path, studies: list[str]) -> list[str]:
    """Copy the executed notebooks into the site's sources; their names there."""
    found = []
    for study in studies:
        folder = paths.study(study) / "notebooks"
        for path in sorted(
            [*folder.glob("*.ipynb"), *folder.glob("02_train/cross_entropy-0.ipynb")],
            key=lambda p: p.parent.name if "02" in p.parent.name else p.name,
        ):
            name = f"{study}-{'02_train' if path.parent.name == '02_train' else path.stem}"
            page = nbformat.read(path, 4)
            if study != studies[0] and (paths.study(study) / "metrics.csv").is_file():
                page.cells[0].source = page.cells[0].source.replace("# ", f"# {study}: ", 1)
                note = f"Tables and figures are of `{study}`; what is written about them is of `{studies[0]}`."
                page.cells[0].source += f"\n\n{note}" if "Reading, for the study" in str(page) else ""
            nbformat.write(page, source / f"{name}.ipynb")
            found.append(name)
    return found


def provenance(studies: list[str]) -> str:
    """Where, with what and in how long every training ran."""
    rows = []
    for study in studies:
        for folder in (paths.study(study) / "provenance", paths.root() / "published" / study / "provenance"):
            for path in sorted(folder.glob("*.json")):
                rows.append({"study": study, "run": path.stem} | json.loads(path.read_text()))
    table = pd.DataFrame(rows)
    table["commit"] = table.commit.str[:7]
    table = table.drop(columns=["settings", "loss_settings"], errors="ignore")
    text = "# Provenance\n\nEvery training: code, versions, device, time, memory.\n\n"
    return text + table.to_markdown(index=False) + "\n"


def downloads(source: Path) -> str:
    """Copies of the tables behind the figures, and links to them."""
    lines, target = ["# Downloads\n\nThe numbers behind every figure and table."], source / "tables"
    for folder in sorted(path for path in (paths.root() / "figures").glob("*/*") if path.is_dir()):
        tables = sorted(folder.glob("*.csv"))
        if tables:
            lines.append(f"\n## {folder.parent.name}, {folder.name}\n")
        for path in tables:
            copied = target / f"{folder.parent.name}-{folder.name}-{path.name}"
            ensuredir(target)
            shutil.copy(path, copied)
            lines.append(f"- {{download}}`{path.name} <tables/{copied.name}>`")
    return "\n".join(lines) + "\n"


def raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```"


def build(out: Path) -> None:
    """Build the site into ``out``."""
    chosen = settings.active()
    studies = [*chosen["studies"], *chosen["analysed"]]
    work = paths.root() / "artifacts" / "report"  # MyST-NB leaves copies of the notebooks beside what it builds
    source, built = work / "source", work / "html"
    shutil.rmtree(work, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("conf.py", "report.css"):
        shutil.copy(HERE / name, source)
    repeats = list(settings.params()["active"].get("repeats") or {})
    names = notebooks(source, [*studies, *chosen["sweeps"], *repeats])
    note = "The numbers are those of " + " and ".join(f"`{study}`" for study in studies) + "."
    parts = {
        "answer": answer(studies[0]), "note": note, "study": studies[0], "chapters": "\n".join(names),
        "table": raw(scripts() + table_html("numbers", numbers(studies), [0, 1, 2, -1])),
        "cells": raw(table_html("cells", cells(repeats[0]), [0, 1, 2, 3, 4, -2, -1])) if repeats else "None was run.",
        "reliability": raw(libraries() + reliability(studies[0])), "curves": raw(curves(studies[0])),
    }  # fmt: skip
    page = (HERE / "index.md").read_text()
    for name, text in parts.items():
        page = page.replace("{{ " + name + " }}", text)
    (source / "index.md").write_text(page)
    (source / "provenance.md").write_text(provenance(studies))
    (source / "downloads.md").write_text(downloads(source))
    if sphinx(["-q", "-b", "html", "-d", str(work / "doctrees"), str(source), str(built)]):
        raise RuntimeError("Sphinx stopped; its message is above.")
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(built, out)
    print(f"Open {out / 'index.html'}")
