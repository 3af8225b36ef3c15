"""Checkpoints: what lets a killed training go on from its last finished epoch, and only one process train it."""

import errno
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compendium import paths
from focalcal.train import Run

KEPT = 2  # the newest one, and one to fall back on


def place(study: str, loss: str, seed: int) -> Path:
    """The folder for all checkpoints of one training, one for each key in it; there while one is under way."""
    return paths.scratch() / study / f"{loss}-{seed}"


@contextmanager
def claim(study: str, loss: str, seed: int, key: str):
    """Yields the folder for the checkpoints of one training; it goes away when the block ends without an error.

    Those of the same training with other settings, data or code are not used, and stay, with a message. If the
    environment variable FOCALCAL_KEEP_CHECKPOINTS names a file, the folder stays, too, and the file tells where it is:
    to be removed by whoever set the variable, once the results are in safety.
    key: a hash of all that decides the result, so that no other configuration's checkpoint is ever taken up.
    Raises RuntimeError if another process is in such a block for the same study, loss and seed, and if the folder is on
    a file system without locks.
    """
    folder = place(study, loss, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0, fallback_to_soft=False):
            (folder / key).mkdir(parents=True, exist_ok=True)
            if others := [str(path) for path in folder.iterdir() if path.name != key and epochs(path)]:
                what = "Checkpoints of other settings, data, code or versions are not used; delete them if you like:"
                print(f"note: {what} {', '.join(others)}", file=sys.stderr)
            yield folder / key
            if receipt := os.environ.get("FOCALCAL_KEEP_CHECKPOINTS"):
                with paths.atomic(Path(receipt)) as part:
                    part.write_text(str(folder / key))
            else:
                shutil.rmtree(folder / key)
                with suppress(OSError):  # others are there
                    folder.rmdir()
    except Timeout:
        raise RuntimeError(
            f"Another process is training {study}, {loss}, seed {seed}; wait for it or stop it (its lock is "
            f"{folder.name}.lock in {folder.parent})."
        ) from None
    except OSError as problem:
        if problem.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise RuntimeError(  # a lock of another kind would outlive a killed process
            f"The file system of {folder.parent} has no locks; name a folder on another with FOCALCAL_SCRATCH."
        ) from None


def resume(runs: list[Run], folders: list[Path]) -> None:
    """Restore all runs to the newest epoch of which every one has an undamaged checkpoint, if there is one."""
    found = [epochs(folder) for folder in folders]
    for epoch in sorted(set.intersection(*map(set, found)), reverse=True):
        saved = [read(there[epoch]) for there in found]
        if all(saved):
            for run, (state, history) in zip(runs, saved, strict=True):
                run.restore(state, history)
            return


def keep(rows, runs: list[Run], folders: list[Path]):
    """Pass the rows of train_together on, saving every run after each epoch while the next one is computed."""
    written = []
    with ThreadPoolExecutor(1) as writer:
        for row in rows:
            for result in written:
                result.result()  # raises what went wrong while writing
            written = [
                writer.submit(write, folder, len(run.history), run.state(), list(run.history))
                for run, folder in zip(runs, folders, strict=True)
            ]
            yield row
        for result in written:
            result.result()


def write(folder: Path, epoch: int, tensors: dict[str, Tensor], history: list[dict]) -> None:
    """Save the state after an epoch; the file's name carries the CRC-32 of its content.

    Only the KEPT newest up to this epoch stay. Later ones go, too: a run has them if it went on from an earlier epoch
    because of what is trained beside it.
    """
    content = safetensors.torch.save(tensors, {"history": json.dumps(history)})
    with paths.atomic(folder / f"{epoch:05d}-{zlib.crc32(content):08x}.safetensors") as part:
        part.write_bytes(content)
    found = epochs(folder)
    for other in {*found} - {*sorted(number for number in found if number <= epoch)[-KEPT:]}:
        found[other].unlink()


def epochs(folder: Path) -> dict[int, Path]:
    """The checkpoints there are, oldest first; what a killed process left half-written is none."""
    return {int(path.name.split("-")[0]): path for path in sorted(folder.glob("[0-9]*.safetensors"))}


def read(path: Path) -> tuple[dict[str, Tensor], list[dict]] | None:
    """Tensors and history of a checkpoint; None, with a message, if it is damaged, which also sets it aside."""
    try:
        if f"{zlib.crc32(path.read_bytes()):08x}" != path.stem.split("-")[1]:
            raise ValueError("its checksum is wrong")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["history"])  # noqa: SIM118
    except (ValueError, IndexError, SafetensorError) as problem:
        aside = path.with_suffix(".damaged")
        path.rename(aside)
        print(f"note: checkpoint {path.name} is damaged ({problem}); set aside as {aside}.", file=sys.stderr)
        return None
