"""Data sets: fetched and verified, loaded, and prepared for a study.

    python -m focalcal.data        fetch the default data set (Fashion-MNIST) into data/

A new data set is one function returning the dictionary that ``fashion_mnist`` describes, and one line in
``DATASETS``.
"""

import gzip
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from focalcal import paths
from focalcal.settings import Data

# The canonical files of Xiao et al. 2017: MD5, and the time stamp in their gzip headers. Debian ships the same
# streams with name and time stripped; with the header put back they are the canonical bytes again.
FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
    "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
}
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


def canonical(name: str, raw: bytes) -> bytes | None:
    """The canonical file ``name`` from ``raw``, its gzip header restored if that is all that differs; else None."""
    md5, stamp = FASHION_MNIST[name]
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", stamp) + b"\x00\x03" + name.removesuffix(".gz").encode() + b"\0"
    for candidate in (raw, header + raw[10:]):
        if hashlib.md5(candidate, usedforsecurity=False).hexdigest() == md5:
            return candidate
    return None


def _copy_from(source: Path, folder: Path) -> str | None:
    """Fill ``folder`` from the files anywhere below ``source``; what is wrong, or None if all are there."""
    for name in FASHION_MNIST:
        found = [path for path in sorted(source.rglob(name)) if path.is_file()]
        if not found:
            return f"{name} is not in {source}"
        content = next(filter(None, (canonical(name, path.read_bytes()) for path in found)), None)
        if content is None:
            return f"{found[0]} is corrupted or incomplete (its MD5 is not the published one)"
        with paths.atomic(folder / name) as part:
            part.write_bytes(content)
    return None


def _from_environment(folder: Path) -> str | None:
    source = os.environ.get("FOCALCAL_DATA")
    if not source:
        return "the environment variable FOCALCAL_DATA is not set"
    return _copy_from(Path(source).expanduser(), folder)


def _from_mirrors(folder: Path) -> str | None:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds; torchvision sets none
    with tempfile.TemporaryDirectory() as scratch:
        try:
            FashionMNIST(scratch, download=True)
        except Exception as problem:  # torchvision raises RuntimeError, urllib's errors or its own, by version
            return " ".join(str(problem).split())
        finally:
            socket.setdefaulttimeout(before)
        return _copy_from(Path(scratch), folder)


def _from_debian(folder: Path) -> str | None:
    package = "dataset-fashion-mnist"
    installed = Path("/usr/share/datasets/fashion-mnist")
    if installed.is_dir():
        return _copy_from(installed, folder)
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "this is no Debian or Ubuntu, so there is no package to unpack"
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt drops its privileges while downloading
        lists = ["-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
        (Path(scratch) / "cache/archives/partial").mkdir(parents=True)
        (Path(scratch) / "lists/partial").mkdir(parents=True)
        download = ["apt-get", "-qq", "download", package]
        for commands in ([download], [["apt-get", *lists, "-qq", "update"], [*download[:1], *lists, *download[1:]]]):
            results = [subprocess.run(c, cwd=scratch, capture_output=True, text=True) for c in commands]
            files = list(Path(scratch).glob(f"{package}_*.deb"))
            if files:
                break
        else:
            reason = results[-1].stderr.strip().splitlines() or ["apt-get gave no reason"]
            return f"{package}: {reason[-1]}"
        unpacked = Path(scratch) / "unpacked"
        done = subprocess.run(["dpkg-deb", "-x", files[0], unpacked], capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else _copy_from(unpacked, folder)


SOURCES = {  # tried in this order
    "folder of FOCALCAL_DATA": _from_environment,
    "torchvision's mirrors": _from_mirrors,
    "Debian's package": _from_debian,
}


def fetch(folder: Path) -> None:
    """Fill ``folder`` with the four canonical Fashion-MNIST files from the first source that works.

    A file there with the wrong MD5 is named and removed first. Raises FileNotFoundError, saying what to put
    where, if no source has the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (md5, _) in FASHION_MNIST.items():
        path = folder / name
        if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            path.unlink()
            print(f"Removed {path}: corrupted or incomplete (its MD5 is not the published one).")
    if all((folder / name).is_file() for name in FASHION_MNIST):
        print(f"Fashion-MNIST is in {folder}, all four files verified.")
        return
    failures = []
    for source, copy in SOURCES.items():
        problem = copy(folder)
        if problem is None:
            print(f"Fashion-MNIST copied into {folder} from {source}, all four files verified.")
            return
        print(f"Not from {source}: {problem}.")
        failures.append(problem)
    raise FileNotFoundError(
        f"No source of Fashion-MNIST could be used ({'; '.join(failures)}). Put {', '.join(FASHION_MNIST)} "
        f"into a folder, set FOCALCAL_DATA to it and run this again."
    )


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file (LeCun's format for MNIST) as uint8 array."""
    with gzip.open(path) as file:
        raw = file.read()
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def fashion_mnist() -> dict:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey 28x28 images of ten kinds of clothing.

    Returns train_images and test_images, uint8 (N, H, W, C); train_labels and test_labels, int64 (N,); and
    classes, their names.
    """
    folder, raw = paths.root() / "data" / "fashion_mnist", {}
    for name, (md5, _) in FASHION_MNIST.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; `make data` fetches it.")
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{path} is corrupted or incomplete; `make data` replaces it.")
        raw[name[: name.index("-idx")]] = _read_idx(path)
    return {
        "train_images": raw["train-images"][..., None],
        "train_labels": raw["train-labels"].astype(np.int64),
        "test_images": raw["t10k-images"][..., None],
        "test_labels": raw["t10k-labels"].astype(np.int64),
        "classes": FASHION_CLASSES,
    }


def digits() -> dict:
    """scikit-learn's 1,797 grey 8x8 digits, the last 797 as test set: small, and on every machine."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = (raw.images * (255 / 16)).round().astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int64)
    return {
        "train_images": images[:1000],
        "train_labels": labels[:1000],
        "test_images": images[1000:],
        "test_labels": labels[1000:],
        "classes": tuple(str(digit) for digit in range(10)),
    }


DATASETS = {
    "fashion_mnist": fashion_mnist,
    "digits": digits,
}


def prepare(settings: Data) -> dict[str, np.ndarray]:
    """The arrays of a study's prepared.npz.

    train_*, val_* and test_* images, uint8 (N, H, W, C), and labels, int64 (N,); train_index and val_index
    into the published training set; mean and std (C,), float64, of train's pixels in [0, 1]; classes, their
    names. val is the head of the seeded permutation, train follows, as in Mukhoti et al.'s loaders.
    """
    if settings.dataset not in DATASETS:
        raise ValueError(f"Unknown data set '{settings.dataset}'; choose one of: {', '.join(DATASETS)}.")
    raw = DATASETS[settings.dataset]()
    available, test = len(raw["train_labels"]), len(raw["test_labels"])
    if settings.train + settings.val > available or settings.test > test:
        raise ValueError(
            f"{settings.dataset} has {available} training and {test} test images; "
            f"train {settings.train} + val {settings.val} and test {settings.test} ask for more."
        )
    draw = np.random.RandomState(settings.seed)  # the generator of the papers' code
    order = draw.permutation(available)
    index = {"val": order[: settings.val], "train": order[settings.val : settings.val + settings.train]}
    arrays = {f"{split}_index": rows for split, rows in index.items()}
    for split, rows in index.items():
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = raw["train_images"][rows], raw["train_labels"][rows]
    rows = np.sort(draw.permutation(test)[: settings.test])
    arrays["test_images"], arrays["test_labels"] = raw["test_images"][rows], raw["test_labels"][rows]
    pixels = arrays["train_images"] / 255
    arrays["mean"], arrays["std"] = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    arrays["classes"] = np.array(raw["classes"])
    return arrays


def main() -> None:
    """Fetch the default data set; see ``fetch``."""
    try:
        fetch(paths.root() / "data" / "fashion_mnist")
    except (OSError, ValueError) as problem:
        sys.exit(f"focalcal: {problem}")


if __name__ == "__main__":
    main()
