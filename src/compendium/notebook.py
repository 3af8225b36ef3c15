"""Run a notebook as a pipeline stage, strip notebooks to what a stage depends on, or show in them what stages made.

Executing refuses unknown parameters, works on a scratch file, checks that the last cell ran, and moves the
result into place without times, durations, paths and random ids: two runs give equal bytes. A cell tagged
``progress`` shows its standard error live but does not keep it.
"""

import ast
import base64
import copy
import io
import os
import re
import shutil
import sys
from pathlib import Path

sys.modules.setdefault("rfc3987_syntax", None)  # a grammar that takes seconds to build and that nothing here uses

import nbformat  # noqa: E402

from compendium import paths  # noqa: E402

SPEAKING = ("ValueError", "SystemExit", "OSError", "FileNotFoundError")  # their message says it all
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def normalise(notebook, keep_outputs: bool):
    """A copy with fixed cell ids, only the tags as cell metadata and no trace of when, where and by whom."""
    notebook = copy.deepcopy(notebook)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        if not keep_outputs:
            cell.outputs, cell.execution_count = [], None
        if "progress" in tags:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = _settled(cell.outputs)
    return notebook


def _settled(outputs: list) -> list:
    """Outputs with neighbouring pieces of one stream joined, since where they break is chance, and anonymous."""
    joined = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if "text" in output:
            output.text = _anonymous(output.text)
        elif "text/plain" in output.get("data", {}):
            output.data["text/plain"] = _anonymous(output.data["text/plain"])
    return joined


def _anonymous(text: str) -> str:
    """The text without process ids and memory addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text))


def strip(folder: Path, out: Path) -> None:
    """Write the stripped copy of every notebook of ``folder`` into ``out``."""
    for source in _notebooks(folder):
        with paths.atomic(Path(out) / source.name) as part:
            nbformat.write(normalise(nbformat.read(source, 4), keep_outputs=False), part)


def _notebooks(folder: Path) -> list[Path]:
    """Those of a folder; FileNotFoundError if there is none."""
    if not (found := sorted(Path(folder).glob("*.ipynb"))):
        raise FileNotFoundError(f"No notebook in {folder}.")
    return found


def fill(artifacts: Path, folder: Path) -> None:
    """Give every notebook of ``folder`` the outputs of its executed copy under ``artifacts``.

    Of several copies it is the one that ran with the notebook's own parameters. ValueError, and no notebook changed, if
    there is no such copy or if the notebook has been edited since.
    """
    filled = {}
    for path in _notebooks(folder):
        notebook = normalise(nbformat.read(path, 4), keep_outputs=False)
        places = (f"*/notebooks/{path.name}", f"*/notebooks/{path.stem}/[!.]*.ipynb")  # none of a stopped stage
        for place in sorted(place for glob in places for place in Path(artifacts).glob(glob)):
            executed = nbformat.read(place, 4)
            if _parameters(executed) == _parameters(notebook):
                break
        else:
            raise ValueError(f"{path}: no copy under {artifacts} ran with its parameters; run `dvc repro` first.")
        cells = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        if [cell.source for cell in cells] != [cell.source for cell in notebook.cells]:
            raise ValueError(f"{path} has been edited since it ran; run `dvc repro` first.")
        notebook.cells = cells
        filled[path] = normalise(notebook, keep_outputs=True)
    for path, notebook in filled.items():
        with paths.atomic(path) as part:
            nbformat.write(notebook, part)


def _fewer_colours(picture: str) -> str:
    """A PNG, base64, with at most 128 colours, which takes half of the bytes or less."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(128).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def _parameters(notebook) -> dict:
    """What the parameters cell says, and the injected one over it."""
    tagged = [c for c in notebook.cells if {"parameters", "injected-parameters"} & set(c.metadata.get("tags", []))]
    lines = [line for cell in tagged for line in ast.parse(cell.source).body if isinstance(line, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Run ``notebook`` with ``parameters`` (texts; made numbers or lists where the default is one) into ``out``.

    Where ``study`` is not the notebook's own, the first cell says of which study its text is.

    Raises ValueError for parameters that the notebook's parameters cell does not define, and RuntimeError, in
    one sentence, if a cell fails, when the failed notebook is kept under artifacts/failed, if the kernel is killed, or
    if the last cell did not run. ``out`` is then left as it was.
    """
    import nbclient
    import papermill

    if not Path(notebook).is_file():
        raise FileNotFoundError(f"No notebook {notebook}.")
    known = papermill.inspect_notebook(str(notebook))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(f"{notebook} has no parameter '{unknown[0]}'; it has: {', '.join(known) or 'none'}.")
    for name, value in parameters.items():
        if known[name]["default"].startswith("["):
            try:
                parameters[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                parameters[name] = None
            if not isinstance(parameters[name], list):
                raise ValueError(f"Parameter '{name}' of {notebook} must be a list such as '[\"brier\"]', got {value}.")
        elif known[name]["default"].isdecimal():
            if not value.isdecimal():
                raise ValueError(
                    f"Parameter '{name}' of {notebook} must be a whole number, 0 or larger, got '{value}'."
                )
            parameters[name] = int(value)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, whatever the user installed
    os.environ.setdefault("PYTHONUTF8", "1")  # chapters write γ, whatever the locale
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's sums then do not depend on how many cores there are
    processor = Path("/proc/cpuinfo")
    if processor.is_file() and " avx2 " in processor.read_text():
        os.environ["OPENBLAS_CORETYPE"] = "Haswell"  # nor on which wider instructions a newer CPU has
    for left in Path(out).parent.glob(f".part-scratch-.part-*{Path(out).name}"):  # by one that was killed
        left.unlink()
    with paths.atomic(out) as part:
        scratch = part.with_name(f".part-scratch-{part.name}")
        try:
            papermill.execute_notebook(
                str(notebook),
                str(scratch),
                parameters,
                kernel_name=KERNELSPEC["name"],
                cwd=str(paths.root()),
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # nothing about sockets and shutdown
            )
            executed = nbformat.read(scratch, 4)
            code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
            if not code or code[-1].execution_count is None:
                raise RuntimeError(f"{notebook} stopped before its last cell.")
            written = known["study"]["default"].strip("'\"") if "study" in known else ""
            if (study := parameters.get("study", written)) != written:
                about = f"Tables and figures are of `{study}`; what is written about them is of `{written}`."
                executed.cells[0].source += f"\n\n{about}"
            for output in (output for cell in executed.cells for output in cell.get("outputs", [])):
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _fewer_colours(output.data["image/png"])
            nbformat.write(normalise(executed, keep_outputs=True), part)
        except nbclient.exceptions.DeadKernelError as death:
            name = Path(notebook).name
            raise RuntimeError(f"{name}: its kernel was killed, most often for lack of memory.") from death
        except papermill.exceptions.PapermillExecutionError as failure:
            artifacts, place = (paths.root() / "artifacts").resolve(), Path(out).resolve()
            inside = place.relative_to(artifacts) if place.is_relative_to(artifacts) else Path(place.name)
            kept = artifacts / "failed" / inside
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(scratch, kept)
            reason = " ".join(str(failure.evalue).split())
            name = "" if failure.ename in SPEAKING else f"{failure.ename}: "
            where = f"{Path(notebook).name}, cell {failure.exec_count}"
            raise RuntimeError(
                f"{name}{reason} [{where}; the failed notebook is {kept.relative_to(paths.root())}]"
            ) from failure
        finally:
            scratch.unlink(missing_ok=True)
