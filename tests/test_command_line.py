"""python -m compendium VERB."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import parameters, write_parameters

from compendium import __main__ as command_line
from compendium.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]
TEXTS = ("Makefile", "README.md", "dvc.yaml", "docs/extend.md", "docs/grid.md", "docs/paper-scale.md", "docs/verify.md")


def run(code: str) -> subprocess.CompletedProcess:
    """What a fresh Python prints and returns for this code."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does_with_an_example(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    description, example = VERBS[verb]
    assert "\n" not in description and len(description) <= 120 and description.endswith(".")
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and description in lines and f"example: {example}" in lines
    program, *arguments = example.split()
    assert program == "compendium" and command_line.parser().parse_args(arguments).verb == verb


def test_help_lists_all_verbs_and_loads_nothing_heavy():
    code = """
import runpy, sys
sys.argv = ["compendium", "--help"]
try:
    runpy.run_module("compendium", run_name="__main__")
except SystemExit as stop:
    heavy = {"torch", "numpy", "pandas", "papermill", "nbformat", "dvc", "submitit", "matplotlib", "pydantic", "yaml"}
    print("status", stop.code, "loaded", sorted(heavy & set(sys.modules)))
"""
    said = run(code).stdout
    assert said.splitlines()[-1] == "status 0 loaded []"
    assert re.findall(r"^    (\w+)", said, re.M) == list(VERBS)
    assert all(" ".join(description.split()) in " ".join(said.split()) for description, _ in VERBS.values())


@pytest.mark.parametrize(
    ("missing", "arguments", "extras"),
    [
        ("pydantic", ["data", "svhn"], "compendium"),
        ("nbformat", ["notebook", "a.ipynb", "b.ipynb"], "compendium"),
        ("dvc", ["grid", "status"], "compendium"),
        ("altair", ["report"], "compendium,report"),
    ],
)
def test_what_is_not_installed_is_named(missing, arguments, extras):
    code = f"import sys; sys.modules[{missing!r}] = None; from compendium.__main__ import main; main({arguments})"
    done = run(code)
    wanted = f"focalcal: '{missing}[.a-z]*' is missing; install what this needs with: pip install '.\\[{extras}\\]'\n"
    assert done.returncode == 1 and done.stdout == "" and re.fullmatch(wanted, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "huge", "focal1"], "Unknown study 'huge'; params.yaml defines: tiny."),
        (["train", "tiny", "brier"], "Unknown loss 'brier'; params.yaml lists under shared.losses: focal1, adafocal."),
        (["data", "--prepare", "huge"], "Unknown study 'huge'"),
        (["train", "tiny", "focal1", "focal1"], "Every loss is trained once"),
        (["data", "--prepare", "tiny", "svhn"], "--prepare writes what a study needs"),
        (["publish", "add", "none.tar"], "none.tar is missing"),
        (
            ["notebook", "--strip", "a", "b", "-p", "study", "x"],
            "-p goes with executing a notebook; --strip and --fill",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, arguments, words):
    write_parameters(tmp_path, parameters())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert str(stop.value).startswith(f"focalcal: {words}") and "\n" not in str(stop.value)


def test_outside_the_folder(monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(SystemExit, match="^focalcal: No dvc.yaml in .*; run this inside the focalcal folder.$"):
        main(["train", "tiny", "focal1"])


def test_what_nobody_can_mend_is_shown_whole(monkeypatch):
    monkeypatch.setattr(command_line, "call", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["data"])


def test_ctrl_c_ends_in_a_sentence(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "call", interrupted)
    assert main(["data"]) == 130 and "goes on from its last finished epoch" in capsys.readouterr().err


def test_the_report_is_built_into_site_or_where_one_says(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "report").mkdir()
    (tmp_path / "report/build.py").write_text("def build(out):\n    out.mkdir()\n")
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) is None and (tmp_path / "site").is_dir()
    main(["report", "elsewhere"])
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_written_down_names_the_verbs_there_are(name):
    text = (ROOT / name).read_text()
    assert set(re.findall(r"(?:python -m |`)compendium (\w+)", text)) <= set(VERBS)
    assert not re.findall(r"-m focalcal\b.*", text)
