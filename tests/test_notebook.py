from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from compendium import notebook
from compendium.__main__ import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, *sources, tags=()):
    """A notebook with a parameters cell (x = 1) and the given code cells."""
    first = new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Title"), first, *(new_code_cell(s, metadata={"tags": list(tags)}) for s in sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": notebook.KERNELSPEC}), path)


def texts(path):
    return [o.get("text", "") for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]


def test_parameters_folders_and_equal_bytes(folder):
    write(
        folder / "a.ipynb", "print(x + 1)", "import sys; print('half' + 'way', file=sys.stderr); x", tags=["progress"]
    )
    for out in ("deep/er/one.ipynb", "two.ipynb"):
        main(["notebook", "a.ipynb", out, "-p", "x", "41"])
    assert (folder / "deep/er/one.ipynb").read_bytes() == (folder / "two.ipynb").read_bytes()
    executed = nbformat.read(folder / "two.ipynb", 4)
    assert texts(folder / "two.ipynb")[0] == "42\n" and executed.cells[-1].outputs[-1]["data"]["text/plain"] == "41"
    text = (folder / "two.ipynb").read_text()
    assert "halfway" not in text and str(folder) not in text and "duration" not in text and "iopub" not in text
    assert sorted(path.name for path in folder.iterdir()) == ["a.ipynb", "deep", "dvc.yaml", "two.ipynb"]


def test_numpy_sums_alike_on_every_machine_with_avx2(folder, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    write(folder / "a.ipynb", "import numpy; from threadpoolctl import threadpool_info as f; print(f()[0])")
    main(["notebook", "a.ipynb", "out.ipynb"])
    (said,) = texts(folder / "out.ipynb")
    avx2 = Path("/proc/cpuinfo").is_file() and " avx2 " in Path("/proc/cpuinfo").read_text()
    assert "'num_threads': 1" in said and ("'architecture': 'Haswell'" in said or not avx2)


def test_stripping_forgets_what_jupyterlab_writes(folder):
    (folder / "clean").mkdir()
    (folder / "touched").mkdir()
    write(folder / "clean" / "a.ipynb", "1 + 1")
    touched = nbformat.read(folder / "clean" / "a.ipynb", 4)
    touched.metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "language_info": {"version": "3.99"}}
    touched.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    touched.cells[2].execution_count, touched.cells[2].id = 7, "abcdef"
    touched.cells[2].metadata["collapsed"] = True
    nbformat.write(touched, folder / "touched" / "a.ipynb")
    for name in ("clean", "touched"):
        main(["notebook", "--strip", name, f"out-{name}"])
    assert (folder / "out-clean/a.ipynb").read_bytes() == (folder / "out-touched/a.ipynb").read_bytes()
    touched.cells[2].source = "1 + 2"
    nbformat.write(touched, folder / "touched" / "a.ipynb")
    main(["notebook", "--strip", "touched", "out-touched"])
    assert (folder / "out-clean/a.ipynb").read_bytes() != (folder / "out-touched/a.ipynb").read_bytes()


def test_outputs_hold_nothing_that_changes_from_run_to_run(folder):
    lines = ("import warnings", "print('a', flush=True)", "print('b', flush=True)", "warnings.warn('old')", "object()")
    write(folder / "a.ipynb", "\n".join(lines))
    main(["notebook", "a.ipynb", "out.ipynb"])
    outputs = nbformat.read(folder / "out.ipynb", 4).cells[-1].outputs
    assert [output.get("name") for output in outputs] == ["stdout", "stderr", None]
    assert outputs[0].text == "a\nb\n" and outputs[1].text.startswith("<cell>:4: UserWarning: old")
    assert outputs[2].data["text/plain"] == "<object>"


@pytest.mark.parametrize(
    ("sources", "arguments", "words"),
    [
        (["x"], ["-p", "y", "1"], "a.ipynb has no parameter 'y'; it has: x"),
        (["raise ValueError('gamma must be 0 or larger')", "x"], [], "gamma must be 0 or larger [a.ipynb, cell 2"),
        (["1 / 0"], [], "ZeroDivisionError: division by zero"),
        (["x"], ["-p", "x", "-3"], "Parameter 'x' of a.ipynb must be a whole number, 0 or larger, got '-3'"),
        (["import sys; sys.exit(0)", "x"], [], "a.ipynb stopped before its last cell."),
        (["import os; os.kill(os.getpid(), 9)", "x"], [], "a.ipynb: its kernel was killed"),
    ],
)
def test_failures_are_one_sentence_and_leave_the_old_result(folder, sources, arguments, words):
    write(folder / "a.ipynb", *sources)
    (folder / "out.ipynb").write_text("the old result")
    with pytest.raises(SystemExit) as stop:
        main(["notebook", "a.ipynb", "out.ipynb", *arguments])
    assert str(stop.value).startswith(f"focalcal: {words}") and "\n" not in str(stop.value)
    assert (folder / "out.ipynb").read_text() == "the old result"
    assert not list(folder.glob(".part*"))
    kept = folder / "artifacts/failed/out.ipynb"
    assert kept.is_file() == ("the failed notebook is artifacts/failed/out.ipynb" in str(stop.value))


def test_a_text_says_of_which_study_it_is(folder):
    write(folder / "a.ipynb", "print(study)")
    (folder / "a.ipynb").write_text((folder / "a.ipynb").read_text().replace("x = 1", 'study = \\"one\\"'))
    for study, first in (("one", "# Title"), ("two", "# Title\n\nTables and figures are of `two`; what is written")):
        main(["notebook", "a.ipynb", "out.ipynb", "-p", "study", study])
        cells = nbformat.read(folder / "out.ipynb", 4).cells
        assert cells[0].source.startswith(first) and (study == "two" or cells[0].source == first)
        assert texts(folder / "out.ipynb") == [f"{study}\n"]


def test_a_list_is_a_list(folder):
    write(folder / "a.ipynb", "print(len(x))")
    (folder / "a.ipynb").write_text((folder / "a.ipynb").read_text().replace("x = 1", "x = []"))
    main(["notebook", "a.ipynb", "out.ipynb", "-p", "x", "['brier', 'mmce']"])
    assert texts(folder / "out.ipynb") == ["2\n"]
    for value in ("brier", "5"):
        with pytest.raises(SystemExit, match=f"Parameter 'x' of a.ipynb must be a list such as .*, got {value}"):
            main(["notebook", "a.ipynb", "out.ipynb", "-p", "x", value])


def test_missing_notebook(folder):
    with pytest.raises(SystemExit, match="No notebook in nowhere"):
        main(["notebook", "--strip", "nowhere", "out"])
    with pytest.raises(SystemExit, match="No notebook b.ipynb"):
        main(["notebook", "b.ipynb", "out.ipynb"])


def test_filling_takes_the_outputs_of_the_copy_that_ran_with_the_same_parameters(folder):
    (folder / "notebooks").mkdir()
    write(folder / "notebooks" / "a.ipynb", "print(x + 1)")
    for study, value in (("one", "1"), ("two", "2")):
        main(["notebook", "notebooks/a.ipynb", f"artifacts/{study}/notebooks/a/{value}.ipynb", "-p", "x", value])
    (folder / "artifacts/one/notebooks/a/.part-1.ipynb").write_text("of a stopped stage")
    main(["notebook", "--fill", "artifacts", "notebooks"])
    assert texts(folder / "notebooks/a.ipynb") == ["2\n"]
    cells = nbformat.read(folder / "notebooks/a.ipynb", 4).cells
    assert [cell.source for cell in cells] == ["# Title", "x = 1", "print(x + 1)"]
    main(["notebook", "--strip", "notebooks", "stripped"])
    write(folder / "a.ipynb", "print(x + 1)")
    main(["notebook", "--strip", ".", "before"])
    assert (folder / "stripped/a.ipynb").read_bytes() == (folder / "before/a.ipynb").read_bytes()


@pytest.mark.parametrize(
    ("source", "words"), [("print(x + 2)", "has been edited since it ran"), (None, "no copy under artifacts ran with")]
)
def test_filling_refuses_outputs_of_other_sources_and_changes_nothing(folder, source, words):
    (folder / "notebooks").mkdir()
    write(folder / "notebooks" / "a.ipynb", "print(x + 1)")
    write(folder / "notebooks" / "b.ipynb", source or "print(x + 1)")
    main(["notebook", "notebooks/a.ipynb", "artifacts/one/notebooks/a.ipynb"])
    if source:
        write(folder / "b.ipynb", "print(x + 1)")
        main(["notebook", "b.ipynb", "artifacts/one/notebooks/b.ipynb"])
    before = (folder / "notebooks" / "a.ipynb").read_bytes()
    with pytest.raises(SystemExit, match=words):
        main(["notebook", "--fill", "artifacts", "notebooks"])
    assert (folder / "notebooks" / "a.ipynb").read_bytes() == before
