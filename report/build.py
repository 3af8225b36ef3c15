"""The report: a static site from executed notebooks and the tables behind the figures, built by `compendium report`.

Needs what `make results` or `make artifacts` leaves. Nothing is executed; no page asks another machine for anything.
"""

import json
import pkgutil
import shutil
from pathlib import Path

import altair as alt
import itables
import nbformat
import numpy as np
import pandas as pd
import vl_convert
from sphinx.cmd.build import main as sphinx

import focalcal
from compendium import paths, runs, settings
from compendium.cells import METRICS as METRIC_NAMES
from focalcal import metrics, plots

HERE = Path(__file__).parent
BINS, TENTHS = (5, 10, 15, 30), range(5, 36)  # of the reliability diagram; temperatures 0.5 ... 3.5
FEW = 20  # samples; bins of fewer are pale
POINTS = 175  # at most, of a training curve
METRICS = {"ece": "ECE %", "nll": "NLL", "error": "Error %", "adaece": "AdaECE %", "classwise_ece": "Classwise %"}
METRICS |= {"mce": "MCE %", "brier": "Brier"}
CURVES = {
    "test_nll": "Test NLL (nats)",
    "test_ece": "Test ECE",
    "test_error": "Test error",
    "train_nll": "Training NLL (nats)",
    "weight_norm": "Norm of the last layer",
}
DATASETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "sst": "SST"}
DATASETS |= {"tiny_imagenet": "Tiny-ImageNet", "20newsgroups": "20 Newsgroups"}
OVER, UNDER = "over-confident", "under-confident"


def headline() -> str:
    """The study that leads: active.headline, or the first of active.studies and active.analysed if it is in neither."""
    chosen = settings.active()
    there = (*chosen["studies"], *chosen["analysed"])
    if not there:
        raise ValueError("No study to report on; name one under active.studies in params.yaml.")
    return chosen["headline"] if chosen["headline"] in there else there[0]


def title(study: str) -> str:
    """What a study is, for people."""
    own, dataset, seeds = settings.study(study).training, settings.data(study).dataset, runs.losses_and_seeds(study)[1]
    epochs = own.get("epochs", settings.params()["shared"]["protocol"]["epochs"])
    several = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f"{DATASETS.get(dataset, dataset)}, {epochs} epochs{several}"


def results(study: str) -> str:
    """The table of a study, as chapter 8 left it."""
    return paths.existing(paths.root() / "figures" / study / "08_results" / "results.md").read_text()


def several(seeds: pd.Series) -> str:
    """Numbers of seeds, one for each loss, in words."""
    return f"{'up to ' if seeds.min() < seeds.max() else ''}{seeds.max()} seeds"


def how(study: str) -> str:
    """What the table of a study is of, in three sentences."""
    data, own = settings.data(study), settings.study(study).training
    seeds = runs.temperatures(study).reset_index().groupby("loss").seed.nunique()
    whole = "" if set(own) - {"network", "threads", "evaluate_train_every"} else ", with the papers' whole protocol"
    many = f"mean ± standard deviation over {several(seeds)}"
    one = "one seed, so only large differences mean anything"
    papers = "the same data and network" if runs.repeats_papers(study) else "ResNet-50 on CIFAR-10"
    return (
        f"{len(seeds)} losses{whole}, {data.train:,} training and {data.test:,} test samples; "
        f"{one if seeds.max() == 1 else many}. *papers*: {papers}. "
        "*scaled*: at the temperature T of lowest validation ECE."
    )


def further(study: str) -> str:
    """What more trainings of a loss, in a study that differs in seed or CPU only, make of its ECE: a line each."""
    lines = []
    for name, group in settings.active()["comparisons"].items():
        beside, chapter = group["beside"], group["notebook"]
        there, page = (paths.study(name) / "notebooks" / f"{chapter}.ipynb").is_file(), f"{name}-{chapter}.ipynb"
        if group["study"] == study and settings.study(beside) == settings.study(study) and there:
            tables = [runs.metrics(one).query("split == 'test'") for one in (study, beside)]
            both = pd.concat(tables).query("metric == 'ece' and scaling == 'none'")
            for loss in sorted(set(tables[0].loss) & set(tables[1].loss)):
                ece = 100 * both.value[both.loss == loss]
                spread = f"{ece.mean():.2f} ± {ece.std():.2f} % over {len(ece)} ([chapter {chapter[:2]}]({page}))"
                lines.append(f"With further trainings {plots.label(loss)} has an ECE of {spread}.")
    return "\n\n".join(lines)


def intervals(study: str) -> Path:
    """Where chapter 10 leaves every metric of a study with its interval."""
    return paths.root() / "figures" / study / "10_evidence" / "intervals.csv"


def numbers(studies: list[str]) -> pd.DataFrame:
    """Every metric of every loss with its interval, one row each, beside the papers' numbers."""
    parts = []
    for study in studies:
        table = pd.read_csv(intervals(study))
        paper = runs.papers(study) / 100
        known = {("ece", "none"): paper.before_scaling, ("ece", "ece"): paper.after_scaling}
        keys = zip(table.loss, table.metric, table.scaling, strict=True)
        found = [known.get((metric, scaling), {}).get(loss, np.nan) for loss, metric, scaling in keys]
        parts.append(table.assign(study=study, loss=table.loss.map(plots.label), papers=found))
    table = pd.concat(parts).sort_values(["metric", "scaling"], key=_first, kind="stable")
    values = ["value", "low", "high", "sd", "papers"]
    percent = ~table.metric.isin(["nll", "brier"])
    table.loc[percent, values] *= 100
    table[values] = table[values].astype(float).round(3)
    table["metric"] = table.metric.map(METRICS)
    for column, digits in (("sd", 3), ("papers", 2)):  # empty where there is none
        table[column] = ["" if np.isnan(value) else f"{value:.{digits}f}" for value in table[column]]
    return table[["loss", "metric", "scaling", *values, "study"]]


def _first(column: pd.Series) -> pd.Series:
    """What people look for first comes first."""
    order = ("ece", "nll", "error") if column.name == "metric" else ("none", "nll", "ece")
    return column.map({name: place for place, name in enumerate(order)}).fillna(9)


def cells(group: str) -> pd.DataFrame:
    """Every published cell with ours, as chapter 13 left them."""
    table = pd.read_csv(paths.existing(paths.root() / "figures" / group / "13_published_cells" / "cells.csv"))
    # What was run comes before what is owed.
    table = table.sort_values("seeds", ascending=False, key=lambda seeds: seeds > 0, kind="stable")
    names = table.metric.map({metric: name for metric, (name, _) in METRIC_NAMES.items()})
    shown = pd.DataFrame({"data set": table.dataset, "network": table.network, "loss": table.loss.map(plots.label)})
    shown["metric"], shown["scaling"], shown["papers"] = names, table.scaling, table.paper.round(2)
    text = {name: ["" if np.isnan(value) else f"{value:.2f}" for value in table[name]] for name in ("ours", "sd")}
    verdict = table.verdict.fillna("no verdict")
    return shown.assign(ours=text["ours"], verdict=verdict, sd=text["sd"], obtained=table.quality)


def scripts(source: Path) -> str:
    """Write the libraries of tables and charts into files of their own; what loads them, and follows the theme."""
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    tables = itables.javascript.generate_init_offline_itables_html(bundle)
    (source / "tables.js").write_text(tables.partition("<script>")[2].partition("</script>")[0])
    (source / "charts.js").write_text(f"(() => {{{vl_convert.javascript_bundle()}}})();")
    return "\n".join(f'<script defer src="_static/{name}.js"></script>' for name in ("theme", "tables", "charts"))


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
    """A place for a chart, and the call that draws it. Its data called <x> is the script's variable data_<x>."""
    spec = json.dumps(chart.properties(description=description).to_dict(), separators=(",", ":"))
    return (
        f'<div class="chart" id="chart-{name}" role="group" aria-label="{description}"></div>'
        f'<script type="module">{drawn(f"chart-{name}", spec, chart.data.name)}</script>'
    )


def drawn(place: str, spec: str, data: str) -> str:
    """The call that draws a specification, to be made when the page is whole and its columns have their width."""
    return (
        f'vegaEmbed("#{place}", {{...{spec}, datasets: {{{data}: data_{data}}}}}, '
        '{"actions": false, "renderer": "svg"});'
    )


def data_html(name: str, rows: list[dict]) -> str:
    """Rows, each of them with lists that a chart flattens, as the variable data_<name>."""
    return f"<script>const data_{name} = {json.dumps(rows, separators=(',', ':'))};</script>"


def binned(study: str) -> list[dict]:
    """What every loss's reliability diagram is made of: test samples of its first seed in the finest bins.

    n, correct: counts per bin; confidence: its sum. For the temperatures of TENTHS.
    """
    rows, first = [], dict(reversed(runs.pairs(study)))
    for loss in runs.losses_and_seeds(study)[0]:
        logits, *labels = runs.logits(study, loss, first[loss])["test"]
        for tenths in TENTHS:
            confidence, correct = metrics.confidence_correct(logits * (10 / tenths), *labels)
            n, summed, right = metrics.bin_sums(confidence, correct, metrics.equal_width_edges(max(BINS)))
            row = {"loss": plots.label(loss), "t": tenths, "n": n.astype(int).tolist()}
            rows.append(row | {"confidence": summed.round(2).tolist(), "correct": right.astype(int).tolist()})
    return rows


def reliability(study: str) -> str:
    """A reliability diagram, its loss, bins and temperature to be chosen, and another loss's beside it."""
    names = [plots.label(loss) for loss in runs.losses_and_seeds(study)[0]]

    def options(values, chosen):
        return "".join(f"<option{' selected' * (value == chosen)}>{value}</option>" for value in values)

    controls = (
        f'<label>Loss <select id="loss-1">{options(names, names[0])}</select></label>'
        f'<label>Beside it <select id="loss-2"><option value="">none</option>{options(names, None)}</select></label>'
        f'<label>Bins <select id="bins">{options(BINS, metrics.BINS)}</select></label>'
        f'<label>Temperature <input id="temperature" type="range" min="{TENTHS[0] / 10}" max="{TENTHS[-1] / 10}" '
        'step="0.1" value="1"> <output>1</output></label>'
    )
    places = "".join(
        f'<div id="reliability-{i}" role="group" aria-label="Reliability diagram: accuracy over confidence, the ECE, '
        f'its sign, and the samples in each bin"{" hidden" * (i > 1)}></div>'
        for i in (1, 2)
    )
    draw = "".join(
        drawn(f"reliability-{i}", json.dumps(diagram(f"#loss-{i}", loss).to_dict(), separators=(",", ":")), "bins")
        for i, loss in ((1, names[0]), (2, ""))
    )
    moves = """
document.getElementById("loss-2").onchange = event => {
  document.getElementById("reliability-2").hidden = !event.target.value;
  dispatchEvent(new Event("resize"));
};
document.getElementById("temperature").oninput = event => event.target.nextElementSibling.value = event.target.value;
"""
    return (
        f'<div class="chart" id="chart-reliability"><div class="controls">{controls}</div>'
        f'<div class="pair">{places}</div></div>{data_html("bins", binned(study))}'
        f'<script type="module">{draw}{moves}</script>'
    )


def diagram(choice: str, first: str) -> alt.LayerChart:
    """A reliability diagram of the loss that is chosen in the element ``choice``, at first ``first``.

    Bars are the accuracy, a line the mean confidence of a bin, the gap between them coloured by its sign. Below zero
    hang the samples of each bin.
    """
    loss = alt.param("loss", bind=alt.BindDirect(element=choice, event="input"), value=first)
    bins = alt.param("bins", bind=alt.BindDirect(element="#bins", event="input"), value=metrics.BINS)
    t = alt.param("T", bind=alt.BindDirect(element="#temperature", event="input"), value=1)
    chosen = alt.Chart()
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], format=".1f", labelFlush=False)
    x = alt.X("low:Q", scale=alt.Scale(domain=[0, 1]), title="Confidence", axis=axis)
    y = {"scale": alt.Scale(domain=[-0.3, 1]), "axis": axis}
    side = alt.Color(
        "side:N",
        scale=alt.Scale(domain=[OVER, UNDER], range=["#CC3311", "#009988"]),
        legend=alt.Legend(title=None, orient="top", symbolType="square"),
    )
    pale = alt.condition(alt.datum.n < FEW, alt.value(0.3), alt.value(1))
    accuracy = chosen.mark_bar(color="#9DB9D6", stroke="white").encode(
        x, alt.X2("high:Q"), alt.Y("accuracy:Q", title="Accuracy", **y), alt.Y2Datum(0), opacity=pale
    )
    gap = chosen.mark_bar(stroke="white", fillOpacity=0.6).encode(
        x, alt.X2("high:Q"), alt.Y("accuracy:Q"), alt.Y2("mean:Q"), color=side, opacity=pale
    )
    mean = chosen.mark_rule(strokeWidth=3).encode(x, alt.X2("high:Q"), alt.Y("mean:Q"), color=side, opacity=pale)
    hanging = chosen.mark_bar(color="#888").encode(x, alt.X2("high:Q"), alt.Y("zero:Q"), alt.Y2("hang:Q"), opacity=pale)
    counts = (
        chosen.transform_filter("bins <= 15")
        .mark_text(fontSize=alt.ExprRef("width < 450 ? 8 : 10"), color="#444")
        .encode(alt.X("middle:Q"), alt.YDatum(-0.04), text="n:Q")
    )
    whole = [("range", "confidence"), ("n", "samples"), ("error", "error")]
    tips = [alt.Tooltip(f"{field}:N", title=name) for field, name in whole]
    tips[2:2] = [
        alt.Tooltip("mean:Q", format=".3f", title="mean confidence"),
        alt.Tooltip("accuracy:Q", format=".3f", title="accuracy"),
    ]
    hover = chosen.mark_bar(opacity=0).encode(x, alt.X2("high:Q"), alt.YDatum(-0.3), alt.Y2Datum(1), tooltip=tips)
    ends = alt.Chart(alt.sequence(0, 2, as_="x"))
    diagonal = ends.mark_line(color="#444", strokeDash=[4, 4]).encode(alt.X("x:Q"), alt.Y("x:Q"))
    zero = ends.mark_line(color="#444", strokeWidth=1).encode(alt.X("x:Q"), alt.YDatum(0))
    total = chosen.transform_calculate(absolute="abs(datum.confidence - datum.correct)").transform_aggregate(
        absolute="sum(absolute)", confidence="sum(confidence)", correct="sum(correct)", n="sum(n)"
    ).transform_filter("datum.n > 0").transform_calculate(
        ece="'ECE ' + format(100 * datum.absolute / datum.n, '.2f') + ' %'",
        gap="100 * (datum.confidence - datum.correct) / datum.n",
        sign=f"(datum.gap > 0 ? '{OVER}' : '{UNDER}') + ' by ' + format(abs(datum.gap), '.2f') + ' points'",
    )  # fmt: skip
    ece = total.mark_text(align="left", fontSize=20, fontWeight="bold")
    sign = total.mark_text(align="left", fontSize=13)
    texts = [ece.encode(x=alt.value(12), y=alt.value(18), text="ece:N")]
    texts.append(sign.encode(x=alt.value(12), y=alt.value(40), text="sign:N"))
    below = alt.Chart(alt.sequence(0, 1)).mark_text(align="left", fontSize=11, color="#444", text="samples in each bin")
    texts.append(below.encode(x=alt.value(4), y=alt.YDatum(-0.2)))
    return (
        alt.layer(accuracy, gap, mean, hanging, counts, diagonal, zero, *texts, hover, data=alt.NamedData("bins"))
        .transform_filter("datum.loss == loss && datum.t == round(10 * T)")
        .transform_calculate(fine=f"sequence({max(BINS)})")
        .transform_flatten(["fine", "n", "confidence", "correct"])
        .transform_calculate(bin=f"floor(datum.fine * bins / {max(BINS)})")
        .transform_aggregate(groupby=["bin"], n="sum(n)", confidence="sum(confidence)", correct="sum(correct)")
        .transform_filter("datum.n > 0")
        .transform_joinaggregate(most="max(n)")
        .transform_calculate(
            low="datum.bin / bins",
            high="(datum.bin + 1) / bins",
            middle="(datum.bin + 0.5) / bins",
            accuracy="datum.correct / datum.n",
            mean="datum.confidence / datum.n",
            gap="datum.mean - datum.accuracy",
            side=f"datum.gap > 0 ? '{OVER}' : '{UNDER}'",
            range="format(datum.low, '.2f') + ' to ' + format(datum.high, '.2f')",
            error="format(abs(datum.gap), '.3f') + ' ' + datum.side",
            zero="-0.08",
            hang="-0.08 - 0.2 * datum.n / datum.most",
        )
        .add_params(loss, bins, t)
        .properties(
            width="container",
            height=420,
            title=alt.TitleParams(alt.ExprRef("loss"), anchor="start"),
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        )
    )


def courses(history: pd.DataFrame) -> list[dict]:
    """Training curves of every loss: mean and, with several seeds, standard deviation; of long trainings not every
    epoch."""
    rows = []
    for loss, table in history.groupby("loss", sort=False):
        step = -(-table.epoch.nunique() // POINTS)
        table = table[(table.epoch.max() - table.epoch) % step == 0]
        for column, name in CURVES.items():
            by_epoch = table.groupby("epoch")[column]
            row = {"loss": plots.label(loss), "curve": name, "first": int(table.epoch.min()), "step": step}
            row["value"], sd = by_epoch.mean(), by_epoch.std()
            row["sd"] = sd if sd.notna().any() else []
            rows.append(row | {kind: [_short(value) for value in row[kind]] for kind in ("value", "sd")})
    return rows


def _short(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.4g}")


def curves(study: str) -> str:
    """Training curves of every loss, with a band of one standard deviation where there are several seeds."""
    losses = runs.losses_and_seeds(study)[0]
    names, looks = [plots.label(loss) for loss in losses], [plots.style(loss) for loss in losses]
    dashes = {"-": [1, 0], "--": [6, 3], "-.": [6, 3, 1, 3], ":": [2, 2]}
    first = CURVES["test_nll"]
    which = alt.param("curve", value=first, bind=alt.binding_select(options=list(CURVES.values()), name="Curve "))
    single = alt.selection_point(name="single", fields=["loss"], bind="legend")
    only = alt.param("only", value="All", bind=alt.binding_select(options=["All", *names], name="Loss "))
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=3,
        symbolSize=200,
        symbolStrokeWidth=2,
        symbolType="stroke",
        symbolOpacity=1,
    )
    color = alt.Color("loss:N", scale=alt.Scale(domain=names, range=[look["color"] for look in looks]), legend=legend)
    chosen = (
        alt.Chart(alt.NamedData("courses"))
        .transform_filter("datum.curve == curve && (only == 'All' || datum.loss == only)")
        .transform_calculate(number="sequence(length(datum.value))")
        .transform_flatten(["number", "value", "sd"])
        .transform_filter("isValid(datum.value)")
        .transform_calculate(
            epoch="datum.first + datum.step * datum.number",
            low="datum.value - datum.sd",
            high="datum.value + datum.sd",
        )
    )
    x = alt.X("epoch:Q", title="Epoch", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(labelFlush=True))
    history = runs.history(study).query("epoch > 0.1 * epoch.max()")  # the first tenth dwarfs the rest
    late = history[history.epoch > history.epoch.max() / 2]
    ends = {name: 1.02 * max(history[column].quantile(0.98), late[column].max()) for column, name in CURVES.items()}
    tops = json.dumps({name: _short(end) for name, end in ends.items()})
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, domainMax=alt.ExprRef(f"({tops})[curve]")))
    band = chosen.transform_filter("isValid(datum.sd)").mark_area(clip=True)
    band = band.encode(
        x,
        alt.Y("low:Q", title=None),
        alt.Y2("high:Q"),
        alt.Color("loss:N"),
        fillOpacity=alt.condition(single, alt.value(0.15), alt.value(0.02)),
    )
    looks = [dashes[look["linestyle"]] for look in looks]
    line = chosen.mark_line(strokeWidth=1.5, clip=True).encode(
        x,
        y,
        color,
        alt.StrokeDash("loss:N", scale=alt.Scale(domain=names, range=looks)),
        opacity=alt.condition(single, alt.value(1), alt.value(0.15)),
    )
    tips = ["loss:N", "epoch:Q", alt.Tooltip("value:Q", format=".4f")]
    points = chosen.mark_point(size=60, opacity=0, filled=True, clip=True).encode(x, y, color, tooltip=tips)
    rows = courses(history)
    bands = [band] if any(row["sd"] for row in rows) else []
    chart = (
        alt.layer(*bands, line.add_params(single), points, data=alt.NamedData("courses"))
        .add_params(which, only)
        .properties(width="container", height=360, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    )
    drawing = chart_html("curves", chart, "Training curves of every loss over the epochs")
    return data_html("courses", rows) + drawing


def answer(study: str) -> str:
    """Two sentences from the numbers."""
    table = pd.read_csv(intervals(study)).query("metric == 'ece'")
    raw, scaled = (table[table.scaling == s].set_index("loss") for s in ("none", "nll"))
    best, worst = raw.value.idxmin(), raw.value.idxmax()

    def with_interval(row):
        return f"{100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"

    averaged = pd.read_csv(paths.root() / "figures" / study / "10_evidence" / "ten-sets.csv").query("scaling == 'nll'")
    more = (averaged.verdict != "not distinguishable").sum()
    on_average = f", {more or 'none'} on average over several" if len(averaged) else ""
    differences = pd.read_csv(paths.root() / "figures" / study / "10_evidence" / "differences.csv")
    after = differences.query("metric == 'ece' and scaling == 'nll'").verdict
    real = (after != "not distinguishable").sum()
    seeds = "one seed" if raw.seeds.max() == 1 else several(raw.seeds)
    return (
        f"as trained, with {seeds}, the expected calibration error (ECE) runs from "
        f"{with_interval(raw.loc[best])} ({plots.label(best)}) to {with_interval(raw.loc[worst])} "
        f"({plots.label(worst)}). After dividing the logits by one temperature (of lowest validation NLL), all lie "
        f"between {100 * scaled.value.min():.1f} and {100 * scaled.value.max():.1f} %, "
        f"and {real or 'none'} of {len(after)} pairs of losses can be told apart with one validation set{on_average}."
    )


def counts(group: str) -> str:
    """The table of published cells, as chapter 13 left it."""
    return paths.existing(paths.root() / "figures" / group / "13_published_cells" / "counts.md").read_text()


def chapters(source: Path, groups: dict[str, str]) -> str:
    """Copy the executed notebooks into the site's sources; their tables of contents, one for each study or group.

    groups: study -> caption. A chapter's page names its study, unless that is the first; entries do not.
    """
    found = []
    for study, caption in groups.items():
        folder, entries = paths.study(study) / "notebooks", []
        pages = {path.stem: path for path in folder.glob("[!.]*.ipynb")}  # none of a stopped stage
        for loss in ("cross_entropy", "focal3"):  # its text is about the second
            if (one := folder / "02_train" / f"{loss}-0.ipynb").is_file():
                pages["02_train"] = one
        for chapter, path in sorted(pages.items()):
            name = f"{study}-{chapter}"
            page = nbformat.read(path, 4)
            tags = [cell.metadata.get("tags", []) for cell in page.cells]
            if ["injected-parameters"] in tags:  # what it was executed with; the defaults would stand beside it
                page.cells = [cell for cell, of in zip(page.cells, tags, strict=True) if "parameters" not in of]
            heading, _, rest = page.cells[0].source.partition("\n")
            entries.append(f"{heading.removeprefix('# ')} <{name}>")
            if study != next(iter(groups)) and (paths.study(study) / "metrics.csv").is_file():
                heading = heading.replace("# ", f"# {study}: ", 1)
            page.cells[0].source = f"{heading}\n{rest}"
            nbformat.write(page, source / f"{name}.ipynb")
        if entries:
            lines = "\n".join(entries)
            found.append(f'```{{toctree}}\n:caption: "{caption}"\n:maxdepth: 1\n\n{lines}\n```')
    return "\n\n".join(found)


def reference() -> str:
    """A page with every public function and class of focalcal, from its docstrings."""
    parts = [(HERE / "reference.md").read_text()]
    for module in sorted(module.name for module in pkgutil.iter_modules(focalcal.__path__)):
        parts.append(f"## focalcal.{module}\n\n```{{eval-rst}}\n.. automodule:: focalcal.{module}\n   :members:\n```")
    return "\n\n".join(parts) + "\n"


def provenance() -> str:
    """Where and with what every training ran, and how long since its (last) start."""
    rows = []
    for top in ("artifacts", "published"):
        for path in sorted((paths.root() / top).glob("*/provenance/*.json")):
            rows.append({"study": path.parts[-3], "run": path.stem} | json.loads(path.read_text()))
    table = pd.DataFrame(rows)
    table["commit"] = table.commit.str.replace(r"^(\w{7})\w*", r"\1", regex=True)  # ", with changes" stays
    table = table.drop(columns=["settings", "loss_settings"], errors="ignore")
    text = "# Provenance\n\nEvery training: code, versions, device, seconds since its (last) start, memory.\n\n"
    return text + table.to_markdown(index=False) + "\n"


def downloads(source: Path) -> str:
    """Copies of the tables behind the figures, and links to them."""
    lines, target = ["# Downloads\n\nThe numbers behind every figure and table."], source / "tables"
    for folder in sorted(path for path in (paths.root() / "figures").glob("*/*") if path.is_dir()):
        tables = sorted(folder.glob("[!.]*.csv"))
        if tables:
            lines.append(f"\n## {folder.parent.name}, {folder.name}\n")
        for path in tables:
            copied = target / f"{folder.parent.name}-{folder.name}-{path.name}"
            target.mkdir(exist_ok=True)
            shutil.copy(path, copied)
            lines.append(f"- {{download}}`{path.name} <tables/{copied.name}>`")
    return "\n".join(lines) + "\n"


def raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```"


def build(out: Path) -> None:
    """Build the site into ``out``."""
    if (out.is_file() or out.is_dir() and any(out.iterdir())) and not (out / "objects.inv").is_file():
        raise ValueError(f"{out} is there and holds no report; name another folder, or delete it first.")
    chosen, first = settings.active(), headline()
    here = [name for name in (*chosen["studies"], *chosen["analysed"]) if intervals(name).is_file()]
    here = [name for name in here if (paths.study(name) / "temperatures.csv").is_file()]
    if first not in here:
        advice = "`make artifacts` fetches what is committed, `make results` makes it"
        raise ValueError(f"Study '{first}' leads the report, and has not been analysed yet; {advice}.")
    studies = list(dict.fromkeys([first, *here]))  # `make results` leaves two of them
    work = paths.root() / "artifacts" / "report"  # MyST-NB leaves copies of the notebooks beside what it builds
    source, built = work / "source", work / "html"
    shutil.rmtree(work, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("conf.py", "report.css", "theme.js"):
        shutil.copy(HERE / name, source)
    repeats = list(chosen["repeats"])
    groups = {study: f"{study}: {title(study)}" for study in studies}
    groups |= {name: f"{name}: sweep over sizes of training set" for name in chosen["sweeps"]}
    groups |= {name: f"{name}: their own data and networks" for name in repeats}
    groups |= {name: f"{name}: two studies compared" for name in chosen["comparisons"]}
    groups |= {name: f"{name}: the generalized focal loss" for name in chosen["detectors"]}
    others = [name for name in chosen["studies"] if name in here and name != first]
    verdicts = [name for name in repeats if (paths.study(name) / "notebooks" / "13_published_cells.ipynb").is_file()]
    quick = [f"## The quick study: {title(name)}\n\n{how(name)}\n\n{results(name)}" for name in others]
    parts = {
        "answer": answer(first), "study": first, "title": title(first), "how": how(first), "results": results(first),
        "further": further(first),
        "counts": counts(repeats[0]) if repeats else "None was run.",
        "cells": raw(table_html("cells", cells(repeats[0]), [0, 1, 2, 3, 4, 7, -1])) if repeats else "",
        "quick": "\n\n".join(quick),
        "rules": f"[chapter 13]({verdicts[0]}-13_published_cells.ipynb)" if verdicts else "chapter 13",
        "scripts": raw(scripts(source)), "table": raw(table_html("numbers", numbers(studies), [0, 1, 2, -1])),
        "reliability": raw(reliability(first)), "curves": raw(curves(first)), "chapters": chapters(source, groups),
    }  # fmt: skip
    page = (HERE / "index.md").read_text()
    for name, text in parts.items():
        page = page.replace("{{ " + name + " }}", text)
    (source / "index.md").write_text(page)
    (source / "reference.md").write_text(reference())
    (source / "provenance.md").write_text(provenance())
    (source / "downloads.md").write_text(downloads(source))
    if sphinx(["-q", "-b", "html", "-d", str(work / "doctrees"), str(source), str(built)]):
        raise RuntimeError("Sphinx stopped; its message is above.")
    shutil.rmtree(out := out.resolve(), ignore_errors=True)  # not a link to it, which would stay
    shutil.move(built, out)
    print(f"Open {out / 'index.html'}")
