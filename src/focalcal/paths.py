"""Where things are, and how a file is written so that it is either whole or not there."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """The compendium's folder: the nearest one, from the working directory upwards, that holds dvc.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise FileNotFoundError(f"No dvc.yaml in {here} or above it; run this inside the focalcal folder.")


def study(name: str) -> Path:
    """Artifacts of a study: what this checkout ran, else what was published with it."""
    own, published = root() / "artifacts" / name, root() / "published" / name
    return published if not own.exists() and published.exists() else own


def prepared(name: str) -> Path:
    """Prepared data of a study, .npz."""
    return root() / "artifacts" / name / "prepared.npz"


def run(name: str, loss: str, seed: int) -> Path:
    """Folder of one training's history.csv, logits.npz and gradients.npz."""
    return study(name) / "runs" / loss / str(seed)


def figures(name: str, notebook: str) -> Path:
    """Folder of the figures and tables of one analysis notebook; made if missing."""
    folder = root() / "figures" / name / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic(path: Path):
    """Yields a temporary path beside ``path``, moved onto it at the end and removed if anything fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
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
