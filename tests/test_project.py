"""What has to agree across files."""

import ast
import dataclasses
import inspect
import re
import subprocess
import tomllib
from contextlib import chdir
from itertools import product
from pathlib import Path

import nbformat
import pytest
import yaml

from compendium import settings, stages, trainings
from compendium.settings import Data
from focalcal import losses, networks, plots
from focalcal.train import Training

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in STAGES.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert [re.split("=", name)[0] for name in conda] == ["python", "pip"]
    python = float(conda[0].split("=")[1].replace("3.", ""))
    assert python >= 11 and PROJECT["requires-python"] == ">=3.11"


def test_requirements_are_pinned_hashed_and_name_no_host():
    text = (ROOT / "requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)
    assert len(pinned) > 100 and text.count("--hash=sha256:") > len(pinned)
    assert "://" not in text
    extras = PROJECT["optional-dependencies"]
    named = {re.split("[>=]", need)[0] for needs in (PROJECT["dependencies"], *extras.values()) for need in needs}
    assert {"torch", "torchvision", "dvc", "papermill"} <= named <= {name for name, _ in pinned}
    locked = re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text())
    again = {re.split("[>=]", need)[0] for name in locked for need in extras[name]}
    assert again | {re.split("[>=]", need)[0] for need in PROJECT["dependencies"]} == named  # what make lock would pin


def test_the_parameters_name_what_exists():
    active, shared, studies = PARAMS["active"], PARAMS["shared"], PARAMS["studies"]
    drawn = {loss for loss in shared["losses"] if not re.fullmatch(r"flsd\d\d", loss)}  # pairs: cells of a heat map
    assert set(active["losses"]) <= set(shared["losses"])
    assert drawn | {"flsd53"} <= set(plots.STYLE), "each loss of params.yaml needs a line in plots.STYLE"

    assert {special.get("function", name) for name, special in shared["losses"].items()} == set(losses.LOSSES)
    groups = [group for kind in ("sweeps", "comparisons") for group in active[kind].values()]
    named = [study for group in groups for name, study in group.items() if name != "notebook"]
    repeated = [study for group in active["repeats"].values() for study in group.values()]
    assert {*active["studies"], *active["published"]} <= set(studies)
    assert {*active["analysed"], *named} <= set(active["published"])
    assert {*repeated, shared["beside"]} <= {*active["studies"], *active["published"]}

    assert all((ROOT / "published" / f"{study}.dvc").is_file() for study in active["published"])
    assert set(active["detectors"]) <= set(PARAMS["detectors"])
    looks = [(color, dashes) for _, color, dashes in plots.STYLE.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("study", PARAMS["studies"])
def test_every_study_can_be_trained(monkeypatch, study):
    monkeypatch.setattr(settings, "params", lambda: PARAMS)
    settings.data(study)
    for loss in PARAMS["shared"]["losses"]:
        training, special = settings.training(study, loss)
        assert training.network in networks.NETWORKS
        assert callable(losses.make(loss, **special))


def defaults(thing) -> dict:
    """The defaults of a function or class."""
    parameters = inspect.signature(thing).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_no_default_stands_twice():
    """A value that equals the one beneath it would have to be changed in two places."""
    of_training, shared = defaults(Training), PARAMS["shared"]
    assert not set(shared["protocol"]) & set(of_training)
    assert set(shared["protocol"]) | set(of_training) | {"network"} == {f.name for f in dataclasses.fields(Training)}
    protocol = of_training | shared["protocol"]
    of_loss = {}
    for loss, special in shared["losses"].items():
        beneath = protocol | defaults(losses.LOSSES[special.get("function", loss)])
        assert repeated(special, beneath) == {}, loss
        of_loss[loss] = beneath | special
    of_data = {name: field.default for name, field in Data.model_fields.items()}
    for dataset, common in shared["datasets"].items():
        assert repeated(common, of_data) == {}, dataset
    for name, study in PARAMS["studies"].items():
        assert repeated(study["training"], protocol) == {}, name
        beneath = of_data | shared["datasets"].get(study["data"]["dataset"], {})
        assert repeated(study["data"], beneath) == {}, name
        for loss, special in study.get("exceptions", {}).items():
            own = {k: v for k, v in study["training"].items() if k not in shared["losses"][loss]}
            assert repeated(special, of_loss[loss] | own) == {}, f"{name}, {loss}"


def repeated(values: dict, beneath: dict) -> dict:
    """Those of the values that say what holds without them."""
    beneath = {name: list(value) if isinstance(value, tuple) else value for name, value in beneath.items()}
    return {name: value for name, value in values.items() if name in beneath and value == beneath[name]}


def imports(source: str) -> set[str]:
    """Modules of this project that a Python source imports anywhere, such as focalcal.metrics."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("focalcal", "compendium"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if (node.module or "").startswith(("focalcal.", "compendium.")) else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(("focalcal.", "compendium."))}
    return found


def code(notebook: str) -> str:
    return "\n".join(c.source for c in nbformat.read(NOTEBOOKS[notebook], 4).cells if c.cell_type == "code")


def uses(notebook: str) -> set[str]:
    """Modules that a chapter imports, and those that they import; of the engine, settings takes only the names."""
    pending, seen = imports(code(notebook)), set()
    while pending:
        module = pending.pop()
        seen.add(module)
        found = imports((ROOT / "src" / f"{module.replace('.', '/')}.py").read_text())
        pending |= (found - {"focalcal.train"} if module == "compendium.settings" else found) - seen
    return seen


def listed(stage: str) -> set[str]:
    """What a stage depends on of src, in the same words."""
    deps = [dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")]
    return {dep.removeprefix("src/").removesuffix(".py").replace("/", ".") for dep in deps}


KEEPERS = {"compendium.paths", "compendium.checkpoints", "compendium.fetch"}  # they place, keep and fetch files only


@pytest.mark.parametrize(
    ("stage", "notebook"), [("prepare", "01_prepare"), ("train", "02_train"), ("scale", "03_scale")]
)
def test_what_is_dear_depends_on_just_what_decides_its_result(stage, notebook):
    assert listed(stage) == uses(notebook) - KEEPERS
    assert not {"focalcal", "focalcal.plots"} & listed(stage)


def test_a_trainings_checkpoints_belong_to_the_code_that_its_stage_depends_on():
    modules = {module.__name__ for module in (*trainings.CODE, trainings)}
    assert modules - {"compendium.checkpoints"} == listed("train") - {"compendium.settings"}  # the settings are values


def chapters(stage: str) -> list[str]:
    """The chapters that a stage executes."""
    if stage == "compare":
        return [given["notebook"] for given in PARAMS["active"]["comparisons"].values()]
    matrix = STAGES[stage].get("matrix", {}).get("notebook")
    return matrix or re.findall(r"stripped/(\w+)\.ipynb", STAGES[stage]["cmd"])


@pytest.mark.parametrize("stage", ["analyse", "analyse-published", "choose-gamma", "repeat", "compare"])
def test_analyses_depend_on_the_whole_method_and_their_part_of_the_plant(stage):
    used = set().union(*map(uses, chapters(stage)))
    assert listed(stage) == {"focalcal"} | {name for name in used - KEEPERS if name.startswith("compendium.")}
    if any("papers" in code(chapter) for chapter in chapters(stage)):
        assert "papers" in STAGES[stage]["deps"]


def test_detectors_depend_on_just_what_they_use():
    assert listed("detect") == uses("16_generalized_focal") - KEEPERS  # minutes, so not on the whole method


def test_every_chapter_has_a_stage_that_depends_on_its_stripped_copy():
    assert {chapter for stage in STAGES for chapter in chapters(stage)} == set(NOTEBOOKS)
    for name, stage in STAGES.items():
        if chapters(name):
            given = name == "compare" or "notebook" in stage.get("matrix", {})
            file = "${item.notebook}" if given else chapters(name)[0]
            assert f"artifacts/stripped/{file}.ipynb" in stage["deps"], name
            assert f"compendium notebook artifacts/stripped/{file}.ipynb " in stage["cmd"], name


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_notebooks_are_chapters(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not re.search(r"^\s*%", prose, re.M), "the site takes such a line for a comment"
    assert cells[0].source.startswith("# ") and "Reading" in prose and "**Different from the paper" in prose
    assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == code[:1]
    assert max(cell.source.count("\n") + 1 for cell in code) <= 15
    assert not re.search(r"^class |/home/|/tmp/|\.\./", "\n".join(cell.source for cell in code), re.M)


@pytest.mark.parametrize(
    "name", ["fashion-350/08_results/results", "papers/13_published_cells/counts", "papers/13_published_cells/ran"]
)
def test_the_readme_shows_the_committed_tables(name):
    command = ["git", "show", f"HEAD:figures/{name}.md"]
    committed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    table = committed.stdout if committed.returncode == 0 else (ROOT / f"figures/{name}.md").read_text()
    assert table.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "src/focalcal").glob("*.py")), ids=lambda path: path.stem)
def test_the_public_api_is_documented(path):
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert ast.get_docstring(tree) and [node.name for node in public if not ast.get_docstring(node)] == []


def test_make_results_trains_and_analyses_what_is_trained_here_and_the_headline():
    globs = re.findall(
        r"'([^']+)'", "".join(re.findall(r"compendium grid run (.*)\)", (ROOT / "Makefile").read_text()))
    )
    active = yaml.safe_load((ROOT / "params.yaml").read_text())["active"]
    globs = [glob.replace("$(HEADLINE)", active["headline"]) for glob in globs]
    with chdir(ROOT):
        trained, analysed = (set(stages.matching(part, in_clones=False)[0]) for part in (globs[:1], globs[1:]))
    studies = active["studies"]
    runs = product(studies, active["losses"], active["seeds"])
    assert trained == {f"train@{study}-{loss}-{seed}" for study, loss, seed in runs}
    one = f"analyse@{studies[0]}-"
    chapters = {stage.removeprefix(one) for stage in analysed if re.match(rf"{one}\d", stage)}
    wanted = {f"analyse@{study}-{name}" for study, name in product(studies, chapters)}
    if active["headline"] in active["analysed"]:
        wanted |= {f"analyse-published@{active['headline']}-{name}" for name in chapters}
    assert analysed == wanted
