"""Data sets: fetched and verified, loaded, and prepared for a study.

    python -m focalcal.data                     fetch into data/ what the active studies need
    python -m focalcal.data cifar10 svhn        fetch these
    python -m focalcal.data --prepare STUDY     write a study's prepared.npz without the pipeline

A new data set is one function returning the dictionary that ``fashion_mnist`` describes, and one line in
``DATASETS``.
"""

import argparse
import gzip
import hashlib
import io
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from focalcal import paths, settings
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
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
FETCHED = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
FETCHED |= {"tiny_imagenet": None}  # torchvision's classes; it has none for this one


def files(name: str) -> dict[str, str]:
    """The canonical files of a data set that is fetched: path below data/<name> -> published MD5."""
    if name == "fashion_mnist":
        return {file: md5 for file, (md5, _) in FASHION_MNIST.items()}
    if name == "tiny_imagenet":
        return {Path(TINY_IMAGENET[0]).name: TINY_IMAGENET[1]}
    from torchvision import datasets

    known = getattr(datasets, FETCHED[name])
    if name == "svhn":
        return {known.split_list[split][1]: known.split_list[split][2] for split in ("train", "test")}
    listed = [*known.train_list, *known.test_list, [known.meta["filename"], known.meta["md5"]]]
    return {f"{known.base_folder}/{file}": md5 for file, md5 in listed}


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def canonical(file: str, md5: str, raw: bytes) -> bytes | None:
    """The canonical content from ``raw``: itself, or with its gzip header restored; None if it is neither."""
    candidates = [raw]
    if file in FASHION_MNIST:
        name, stamp = file.removesuffix(".gz").encode(), FASHION_MNIST[file][1]
        candidates.append(b"\x1f\x8b\x08\x08" + struct.pack("<I", stamp) + b"\x00\x03" + name + b"\0" + raw[10:])
    return next((candidate for candidate in candidates if _md5(candidate) == md5), None)


def _copy_from(source: Path, name: str, folder: Path) -> str | None:
    """Fill ``folder`` from the files anywhere below ``source``; what is wrong, or None if all are there."""
    for file, md5 in files(name).items():
        found = [path for path in sorted(source.rglob(Path(file).name)) if path.is_file()]
        if not found:
            return f"{Path(file).name} is not in {source}"
        content = next(filter(None, (canonical(file, md5, path.read_bytes()) for path in found)), None)
        if content is None:
            return f"{found[0]} is corrupted or incomplete (its MD5 is not the published one)"
        with paths.atomic(folder / file) as part:
            part.write_bytes(content)
    return None


def _from_environment(name: str, folder: Path) -> str | None:
    source = os.environ.get("FOCALCAL_DATA")
    if not source:
        return "the environment variable FOCALCAL_DATA is not set"
    source = Path(source).expanduser()
    problem = _copy_from(source, name, folder)
    archives = sorted(source.rglob(f"{name.replace('cifar', 'cifar-')}-python.tar.gz"))
    if problem and archives:
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
            return _copy_from(Path(scratch), name, folder)
    return problem


def _from_mirrors(name: str, folder: Path) -> str | None:
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds; torchvision sets none
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if name == "tiny_imagenet":
                datasets.utils.download_url(TINY_IMAGENET[0], scratch, md5=TINY_IMAGENET[1])
            else:
                make = getattr(datasets, FETCHED[name])
                for split in ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({},):
                    make(scratch, download=True, **split)
        except Exception as problem:  # torchvision raises RuntimeError, urllib's errors or its own, by version
            return " ".join(str(problem).split())
        finally:
            socket.setdefaulttimeout(before)
        return _copy_from(Path(scratch), name, folder)


def _from_debian(name: str, folder: Path) -> str | None:
    package = "dataset-fashion-mnist"
    installed = Path("/usr/share/datasets/fashion-mnist")
    if name != "fashion_mnist":
        return f"Debian has no package of {name}"
    if installed.is_dir():
        return _copy_from(installed, name, folder)
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
        return done.stderr.strip() if done.returncode else _copy_from(unpacked, name, folder)


SOURCES = {  # tried in this order
    "folder of FOCALCAL_DATA": _from_environment,
    "torchvision's mirrors": _from_mirrors,
    "Debian's package": _from_debian,
}


def fetch(name: str, folder: Path) -> None:
    """Fill ``folder`` with the canonical files of a data set from the first source that works.

    A file there with the wrong MD5 is named and removed first. Raises ValueError for a data set that is not
    fetched, and FileNotFoundError, saying what to put where, if no source has the data.
    """
    if name not in FETCHED:
        raise ValueError(f"'{name}' is not fetched; data sets that are: {', '.join(FETCHED)}.")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = files(name)
    for file, md5 in wanted.items():
        path = folder / file
        if path.is_file() and _md5(path.read_bytes()) != md5:
            path.unlink()
            print(f"Removed {path}: corrupted or incomplete (its MD5 is not the published one).")
    verified = f"all files verified ({len(wanted)})"
    if all((folder / file).is_file() for file in wanted):
        print(f"{name} is in {folder}, {verified}.")
        return
    failures = []
    for source, copy in SOURCES.items():
        problem = copy(name, folder)
        if problem is None:
            print(f"{name} copied into {folder} from {source}, {verified}.")
            return
        print(f"Not from {source}: {problem}.")
        failures.append(problem)
    raise FileNotFoundError(
        f"No source of {name} could be used ({'; '.join(failures)}). Put {', '.join(Path(f).name for f in wanted)} "
        f"into a folder, set FOCALCAL_DATA to it and run this again."
    )


def _verified(name: str) -> dict[str, bytes]:
    """Content of a data set's files by file name."""
    folder, raw = paths.root() / "data" / name, {}
    for file, md5 in files(name).items():
        path = folder / file
        again = "`make data`" if name == "fashion_mnist" else f"`python -m focalcal.data {name}`"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {again} fetches it.")
        raw[path.name] = path.read_bytes()
        if _md5(raw[path.name]) != md5:
            raise ValueError(f"{path} is corrupted or incomplete; {again} replaces it.")
    return raw


def _read_idx(content: bytes) -> np.ndarray:
    """An IDX file (LeCun's format for MNIST), gzipped, as uint8 array."""
    raw = gzip.decompress(content)
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def fashion_mnist() -> dict:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey 28x28 images of ten kinds of clothing.

    Returns train_images and test_images, uint8 (N, H, W, C); train_labels and test_labels, int64 (N,); and
    classes, their names.
    """
    raw = {name[: name.index("-idx")]: _read_idx(content) for name, content in _verified("fashion_mnist").items()}
    return {
        "train_images": raw["train-images"][..., None],
        "train_labels": raw["train-labels"].astype(np.int64),
        "test_images": raw["t10k-images"][..., None],
        "test_labels": raw["t10k-labels"].astype(np.int64),
        "classes": FASHION_CLASSES,
    }


def _cifar(name: str, train: list[str], test: list[str], labels: str, classes: tuple[str, str]) -> dict:
    raw = {file: pickle.loads(content, encoding="latin1") for file, content in _verified(name).items()}  # MD5 verified

    def joined(batches):
        images = np.concatenate([raw[batch]["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.concatenate([raw[batch][labels] for batch in batches]).astype(np.int64)

    arrays = {}
    for split, batches in (("train", train), ("test", test)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = joined(batches)
    return arrays | {"classes": tuple(raw[classes[0]][classes[1]])}


def cifar10() -> dict:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour 32x32 images of ten classes."""
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return _cifar("cifar10", train, ["test_batch"], "labels", ("batches.meta", "label_names"))


def cifar100() -> dict:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour 32x32 images of a hundred classes."""
    return _cifar("cifar100", ["train"], ["test"], "fine_labels", ("meta", "fine_label_names"))


def svhn() -> dict:
    """SVHN, cropped digits (Netzer et al. 2011): 73,257 + 26,032 colour 32x32 images of house numbers."""
    from scipy.io import loadmat

    arrays = {}
    for split in ("train", "test"):
        raw = loadmat(io.BytesIO(_verified("svhn")[f"{split}_32x32.mat"]))
        arrays[f"{split}_images"] = np.ascontiguousarray(raw["X"].transpose(3, 0, 1, 2))
        arrays[f"{split}_labels"] = raw["y"][:, 0].astype(np.int64) % 10  # there, 10 stands for the digit 0
    return arrays | {"classes": tuple(str(digit) for digit in range(10))}


def tiny_imagenet() -> dict:
    """Tiny-ImageNet (Stanford CS231n): 100,000 + 10,000 colour 64x64 images of 200 classes.

    The published validation set serves as test set, since the labels of the test set are not public. Classes are
    numbered in the order of their WordNet ids.
    """
    from PIL import Image

    with zipfile.ZipFile(io.BytesIO(next(iter(_verified("tiny_imagenet").values())))) as archive:

        def image(member):
            return np.asarray(Image.open(io.BytesIO(archive.read(member))).convert("RGB"))

        top = "tiny-imagenet-200"
        classes = sorted(archive.read(f"{top}/wnids.txt").decode().split())
        number = {name: i for i, name in enumerate(classes)}
        train = sorted(m for m in archive.namelist() if m.startswith(f"{top}/train/") and m.endswith(".JPEG"))
        lines = archive.read(f"{top}/val/val_annotations.txt").decode().splitlines()
        test = sorted(line.split("\t")[:2] for line in lines)
        return {
            "train_images": np.stack([image(member) for member in train]),
            "train_labels": np.array([number[member.split("/")[2]] for member in train], np.int64),
            "test_images": np.stack([image(f"{top}/val/images/{file}") for file, _ in test]),
            "test_labels": np.array([number[name] for _, name in test], np.int64),
            "classes": tuple(classes),
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
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "svhn": svhn,
    "digits": digits,
}


def load(name: str) -> dict:
    """The data set called ``name``; ValueError if there is none."""
    if name not in DATASETS:
        raise ValueError(f"Unknown data set '{name}'; choose one of: {', '.join(DATASETS)}.")
    return DATASETS[name]()


def fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 images (N, H, W, C) resized (bilinear) and made grey (mean) or three-channel, to (N, *shape)."""
    import torch
    import torch.nn.functional as F

    if images.shape[3] != shape[2]:
        images = images.mean(axis=3, keepdims=True) if shape[2] == 1 else images.repeat(shape[2], axis=3)
    if images.shape[1:3] != shape[:2]:
        as_float = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
        images = F.interpolate(as_float, shape[:2], mode="bilinear").permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(images.round().astype(np.uint8))


def split(labels: np.ndarray, config: Data, draw: np.random.RandomState) -> dict[str, np.ndarray]:
    """Indices of train and val into the published training set: val is the head of a permutation, train follows.

    With config.per_class, val takes the same number of every class, those that come first in the permutation.
    """
    order = draw.permutation(len(labels))
    if config.per_class:
        rank = np.empty(len(order), np.int64)
        for label in np.unique(labels):
            places = np.flatnonzero(labels[order] == label)
            rank[places] = np.arange(len(places))
        order = order[np.argsort(rank, kind="stable")]
    return {"val": order[: config.val], "train": order[config.val : config.val + config.train]}


def prepare(config: Data) -> dict[str, np.ndarray]:
    """The arrays of a study's prepared.npz.

    train_*, val_* and test_* images, uint8 (N, H, W, C), and labels, int64 (N,); train_index and val_index into the
    published training set; mean and std (C,), float64, of pixels in [0, 1], as given or else measured on train, and
    test_mean and test_std where they are given; classes, their names; shifted_<name>, test images of another data
    set, for each one listed that is in data/. The split is drawn as in Mukhoti et al.'s loaders.
    """
    raw = load(config.dataset)
    available, test = len(raw["train_labels"]), len(raw["test_labels"])
    if config.train + config.val > available or config.test > test:
        raise ValueError(
            f"{config.dataset} has {available} training and {test} test images; "
            f"train {config.train} + val {config.val} and test {config.test} ask for more."
        )
    draw = np.random.RandomState(config.seed)  # the generator of the papers' code
    arrays = {f"{name}_index": rows for name, rows in split(raw["train_labels"], config, draw).items()}
    for name in ("val", "train"):
        rows = arrays[f"{name}_index"]
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = raw["train_images"][rows], raw["train_labels"][rows]
    rows = np.sort(draw.permutation(test)[: config.test])
    arrays["test_images"], arrays["test_labels"] = raw["test_images"][rows], raw["test_labels"][rows]
    arrays |= statistics(config, arrays["train_images"])
    arrays["classes"] = np.array(raw["classes"])
    for name in config.shifted:
        try:
            images = load(name)["test_images"]
        except FileNotFoundError as problem:
            print(f"{name} is left out: {problem}")
        else:
            arrays[f"shifted_{name}"] = fitted(images, arrays["test_images"].shape[1:])
    return arrays


def statistics(config: Data, images: np.ndarray) -> dict[str, np.ndarray]:
    """mean and std, given or measured on uint8 images, and test_mean and test_std where given."""
    pixels, channels = images.reshape(-1, images.shape[3]), images.shape[3]
    histograms = [np.bincount(pixels[:, channel], minlength=256) / len(pixels) for channel in range(channels)]
    levels = np.arange(256) / 255
    mean = np.array([histogram @ levels for histogram in histograms])
    std = np.sqrt(np.array([histogram @ levels**2 for histogram in histograms]) - mean**2)
    found = {"mean": mean, "std": std}
    for name in ("mean", "std", "test_mean", "test_std"):
        given = getattr(config, name)
        if given is not None:
            found[name] = np.array(given)
            if len(given) != channels:
                raise ValueError(f"'{name}' gives {len(given)} values for images of {channels} channels.")
    if ("test_mean" in found) != ("test_std" in found):
        raise ValueError("'test_mean' and 'test_std' go together; give both or none.")
    return found


def main(arguments=None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m focalcal.data", description="Fetch and prepare data sets.")
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(FETCHED)}; by default what active studies use")
    parser.add_argument("--prepare", metavar="STUDY", help="write artifacts/STUDY/prepared.npz")
    given = parser.parse_args(arguments)
    try:
        if given.prepare:
            paths.write_npz(paths.prepared(given.prepare), **prepare(settings.data(given.prepare)))
            print(f"Wrote {paths.prepared(given.prepare)}.")
            return
        studies = [] if given.name else [settings.data(study) for study in settings.params()["active"]["studies"]]
        needed = given.name or ["fashion_mnist", *(study.dataset for study in studies)]  # the first one is pinned
        for name in dict.fromkeys(needed):
            if name in FETCHED or given.name:
                fetch(name, paths.root() / "data" / name)
        for name in dict.fromkeys(name for study in studies for name in study.shifted if name in FETCHED):
            try:
                fetch(name, paths.root() / "data" / name)
            except FileNotFoundError as problem:
                print(f"{name}, which only chapter 9 uses, is left out: {problem}")
    except (OSError, ValueError) as problem:
        sys.exit(f"focalcal: {problem}")


if __name__ == "__main__":
    main()
