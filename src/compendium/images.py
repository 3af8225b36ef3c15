"""Images: data sets by name, and what a study sees of them.

A new data set is one function returning the dictionary that ``fashion_mnist`` describes, and one line in
``DATASETS``.
"""

import gzip
import io
import pickle
import struct
import zipfile

import numpy as np

from compendium import fetch
from compendium.settings import Data

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


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
    raw = {name[: name.index("-idx")]: _read_idx(content) for name, content in fetch.verified("fashion_mnist").items()}
    return {
        "train_images": raw["train-images"][..., None],
        "train_labels": raw["train-labels"].astype(np.int64),
        "test_images": raw["t10k-images"][..., None],
        "test_labels": raw["t10k-labels"].astype(np.int64),
        "classes": FASHION_CLASSES,
    }


def _cifar(name: str, train: list[str], test: list[str], labels: str, classes: tuple[str, str]) -> dict:
    verified = fetch.verified(name)  # so that it is safe to unpickle
    raw = {file: pickle.loads(content, encoding="latin1") for file, content in verified.items()}
    arrays = {}
    for split, batches in (("train", train), ("test", test)):
        pixels = np.concatenate([raw[batch]["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = np.concatenate([raw[batch][labels] for batch in batches]).astype(np.int64)
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

    arrays, content = {}, fetch.verified("svhn")
    for split in ("train", "test"):
        raw = loadmat(io.BytesIO(content[f"{split}_32x32.mat"]))
        arrays[f"{split}_images"] = np.ascontiguousarray(raw["X"].transpose(3, 0, 1, 2))
        arrays[f"{split}_labels"] = raw["y"][:, 0].astype(np.int64) % 10  # there, 10 stands for the digit 0
    return arrays | {"classes": tuple(str(digit) for digit in range(10))}


def tiny_imagenet() -> dict:
    """Tiny-ImageNet (Stanford CS231n): 100,000 + 10,000 colour 64x64 images of 200 classes.

    The published validation set serves as test set, since the labels of the test set are not public. Classes are
    numbered in the order of their WordNet ids.
    """
    from PIL import Image

    with zipfile.ZipFile(io.BytesIO(next(iter(fetch.verified("tiny_imagenet").values())))) as archive:

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
    """The data set called ``name``; ValueError if there is none, or if it is not as ``fashion_mnist`` describes."""
    if name not in DATASETS:
        raise ValueError(f"Unknown data set '{name}'; choose one of: {', '.join(DATASETS)}.")
    raw = DATASETS[name]()
    wanted = [*(f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")), "classes"]
    if missing := [array for array in wanted if array not in raw]:
        raise ValueError(f"{name}: '{missing[0]}' is missing; it gives: {', '.join(raw) or 'nothing'}.")
    raw |= {array: np.asarray(raw[array]) for array in wanted[:4]}
    for split in ("train", "test"):
        images, labels = raw[f"{split}_images"], raw[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            got = f"{images.dtype} {images.shape}"
            raise ValueError(f"{name}: {split}_images must be uint8 (N, H, W, 1 or 3), got {got}.")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{name}: {split}_labels must be int64 ({len(images)},), got {labels.dtype} {labels.shape}."
            )
        if not len(labels):
            raise ValueError(f"{name}: {split}_images and {split}_labels are empty.")
        if labels.min() < 0 or labels.max() >= len(raw["classes"]):
            found = f"{labels.min()}..{labels.max()}"
            raise ValueError(f"{name}: {split}_labels must lie in 0..{len(raw['classes']) - 1}, got {found}.")
    if raw["train_images"].shape[1:] != raw["test_images"].shape[1:]:
        raise ValueError(f"{name}: images for training and test differ in height, width or channels.")
    return raw


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
    if config.std is None and not std.all():
        raise ValueError(f"Channel {np.argmin(std)} is the same in all training images; leave it out, or give 'std'.")
    for name in ("mean", "std", "test_mean", "test_std"):
        given = getattr(config, name)
        if given is not None:
            found[name] = np.array(given)
            if len(given) != channels:
                raise ValueError(f"'{name}' gives {len(given)} values for images of {channels} channels.")
    if ("test_mean" in found) != ("test_std" in found):
        raise ValueError("'test_mean' and 'test_std' go together; give both or none.")
    return found
