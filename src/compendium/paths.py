"""Where things are, and how files are read and written so that they are either whole or refused."""

import errno
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def root() -> Path:
    """The compendium's folder: the nearest one, from the working directory upwards, that holds dvc.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise FileNotFoundError(f"No dvc.yaml in {here} or above it; run this inside the focalcal folder.")


def study(name: str) -> Path:
    """Artifacts of a study."""
    return root() / "artifacts" / name


def prepared(name: str) -> Path:
    """Prepared data of a study, .npz."""
    return study(name) / "prepared.npz"


def run(name: str, loss: str, seed: int) -> Path:
    """Folder of one training's history.csv, logits.npz and gradients.npz."""
    return study(name) / "runs" / loss / str(seed)


def published(name: str, loss: str, seed: int) -> Path:
    """Folder of a run that was trained elsewhere, see publish."""
    return root() / "published" / name / "runs" / loss / str(seed)


def scratch() -> Path:
    """Checkpoints, grids and a reader's own figures; the environment variable FOCALCAL_SCRATCH names another folder."""
    return Path(os.environ.get("FOCALCAL_SCRATCH") or root() / "scratch")


def figures(name: str, notebook: str, only=()) -> Path:
    """Folder of the figures and tables of one analysis notebook; made if missing.

    only: the losses that a reader has chosen; such pictures go to scratch/, so that figures/ has all of a study's.
    """
    folder = (scratch() if only else root()) / "figures" / name / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic(path: Path):
    """Yields a temporary path beside ``path``, moved onto it at the end and removed if anything fails.

    Raises IsADirectoryError, before anything is computed, if ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # the content reaches the disk before the name does, power or no power
        os.replace(part, path)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            problem.errno, f"Disk full while writing {path} ({free:.0f} MB free); free some space and run again"
        ) from problem
    finally:
        part.unlink(missing_ok=True)


def existing(path: Path) -> Path:
    """The path, if there is a file; else FileNotFoundError that says how to get it."""
    if not path.is_file():
        advice = "; `dvc repro` makes it, `make artifacts` fetches published ones" if _is_artifact(path) else ""
        if path.name == "prepared.npz":
            advice = f"; `python -m compendium data --prepare {path.parent.name}` makes it"
        raise FileNotFoundError(f"{path} is missing{advice}.")
    return path


def _is_artifact(path: Path) -> bool:
    """Whether DVC keeps the file; others are the user's own."""
    return any(Path(path).resolve().is_relative_to((root() / top).resolve()) for top in ("artifacts", "published"))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; ValueError, naming the file, if it is truncated or damaged."""
    with open(existing(path), "rb") as opened:
        try:
            if not zipfile.is_zipfile(opened):
                raise ValueError("no such archive as np.savez writes")
            opened.seek(0)
            with np.load(opened) as file:
                return {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, OSError) as problem:
            ours = "delete it and run `dvc checkout` or `dvc repro`"
            advice = ours if _is_artifact(path) else "make or copy it anew"
            raise ValueError(f"{path} is truncated or damaged ({problem}); {advice}.") from problem


def write_npz(path: Path, compression: int = zipfile.ZIP_STORED, **arrays) -> None:
    """Write arrays, by default uncompressed: then equal arrays give equal bytes (np.savez leaves headers to Python's
    patch release, and zlib has variants)."""
    with atomic(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asanyarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getbuffer(), compression)


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the files of an open archive below ``folder``, links and devices left out; TarError for one that would lie
    elsewhere. (TarFile.extractall has a filter for this from Python 3.11.4 on; Debian 12 has 3.11.2.)"""
    folder = Path(folder).resolve()
    for member in filter(tarfile.TarInfo.isfile, archive):
        target = (folder / member.name).resolve()
        if not target.is_relative_to(folder):
            raise tarfile.TarError(f"{member.name} would lie outside")
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.extractfile(member) as content, open(target, "wb") as file:
            shutil.copyfileobj(content, file)


def save_figure(figure, folder: Path, name: str) -> None:
    """Write <name>.png and <name>.svg into the folder, free of dates: equal figures give equal bytes."""
    import matplotlib
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "focalcal"}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            with atomic(folder / f"{name}.{ending}") as part:
                figure.savefig(part, format=ending, metadata=metadata, bbox_inches="tight")
    if not matplotlib.is_interactive():
        pyplot.close(figure)


def save_table(table, folder: Path, name: str, **options) -> None:
    """Write a pandas table to <name>.csv in the folder; options go to DataFrame.to_csv."""
    with atomic(folder / f"{name}.csv") as part:
        table.to_csv(part, lineterminator="\n", **options)
