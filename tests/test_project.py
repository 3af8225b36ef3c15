"""What has to agree across files."""

import ast
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml

from focalcal import calibrate, losses, metrics, plots
from focalcal.train import Training

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert [re.split("=", name)[0] for name in conda] == ["python", "pip"]
    python = float(conda[0].split("=")[1].replace("3.", ""))
    assert python >= 11 and 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_requirements_are_pinned_hashed_and_name_no_host():
    text = (ROOT / "requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)
    assert len(pinned) > 100 and text.count("--hash=sha256:") > len(pinned)
    assert "://" not in text
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"([a-z]+)[>=]=', project)
    assert {"torch", "torchvision", "dvc", "papermill"} <= set(named) <= {name for name, _ in pinned}


def test_the_parameters_name_what_exists():
    shared, known = PARAMS["shared"], Training.model_fields
    assert set(PARAMS["active"]["losses"]) <= set(shared["losses"])
    assert set(losses.LOSSES) <= set(shared["losses"]) <= set(plots.STYLE)
    assert set(PARAMS["active"]["studies"]) <= set(PARAMS["studies"])
    for name, special in shared["losses"].items():
        losses.make(name, **{key: value for key, value in special.items() if key not in known})
    looks = [(color, dashes) for _, color, dashes in plots.STYLE.values()]
    assert len(set(looks)) == len(looks)


def imports(source):
    """focalcal modules imported by a Python source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "focalcal":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("focalcal."):
            found.add(node.module.split(".")[1])
    return found


def test_stages_depend_on_the_modules_they_use():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    uses = {}
    for path in NOTEBOOKS:
        code = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        pending, seen = imports(code), set()
        while pending:
            module = pending.pop()
            seen.add(module)
            pending |= imports((ROOT / f"src/focalcal/{module}.py").read_text()) - seen
        uses[path.stem] = seen - {"paths", "checkpoints"} | ({"papers"} if "papers" in code else set())
    for name, stage in stages.items():
        for notebook, modules in uses.items():
            if f"/{notebook}.ipynb " in stage["cmd"] or notebook in stage.get("matrix", {}).get("notebook", []):
                listed = {Path(dep).stem for dep in stage["deps"] if dep.startswith(("src/", "papers"))}
                assert modules <= listed, f"{name} uses {modules - listed} without depending on it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_chapters(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].source.startswith("# ") and "Reading" in prose and "**Different from the paper" in prose
    assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == code[:1]
    assert max(cell.source.count("\n") + 1 for cell in code) <= 15
    assert not re.search(r"^class |/home/|/tmp/|\.\./", "\n".join(cell.source for cell in code), re.M)


def test_the_readme_shows_the_committed_table():
    command = ["git", "show", "HEAD:figures/fashion/08_results/results.md"]
    committed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    table = committed.stdout if committed.returncode == 0 else (ROOT / command[2].split(":")[1]).read_text()
    assert table.strip() in (ROOT / "README.md").read_text()


def test_the_public_api_is_whole():
    for module, names in {
        losses: "cross_entropy label_smoothing brier focal flsd dual_focal inverse_focal mmce_weighted AdaFocal LOSSES",
        metrics: "nll error brier ece adaptive_ece classwise_ece mce",
        calibrate: "temperature_by_nll temperature_by_ece gamma_for",
    }.items():
        for name in names.split():
            thing = getattr(module, name)
            assert isinstance(thing, dict) or thing.__doc__, f"{name} has no docstring"
