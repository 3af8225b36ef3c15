"""Data sets by name, and what a study sees of them."""

import gzip
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import parameters, write_parameters
from PIL import Image

from compendium import fetch, images, paths, prepare
from compendium.__main__ import main
from compendium.settings import Data
from focalcal import feed


@pytest.fixture
def verified(monkeypatch):
    """Takes the content of a data set's files, by file name, in place of the verified ones."""

    def give(content):
        monkeypatch.setattr(fetch, "verified", lambda _: content)

    return give


def test_fashion_mnist_is_read(verified):
    def idx(*shape):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        return gzip.compress(header + bytes(range(np.prod(shape))))

    content = {f"{part}-images-idx3-ubyte.gz": idx(5, 4, 4) for part in ("train", "t10k")}
    verified(content | {f"{part}-labels-idx1-ubyte.gz": idx(5) for part in ("train", "t10k")})
    raw = images.load("fashion_mnist")
    assert raw["train_images"].shape == (5, 4, 4, 1) and raw["train_images"][1, 0, :3, 0].tolist() == [16, 17, 18]
    assert raw["test_labels"].tolist() == [0, 1, 2, 3, 4] and raw["test_labels"].dtype == np.int64
    assert len(raw["classes"]) == 10


@pytest.mark.parametrize(
    ("name", "train", "test", "labels", "meta"),
    [
        ("cifar10", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", [5, 3], ("batches.meta", "label_names")),
        ("cifar100", ["train"], "test", [7, 99], ("meta", "fine_label_names")),
    ],
)
def test_cifar_is_read(verified, name, train, test, labels, meta):
    names = [f"kind {number}" for number in range(100)]
    content = {meta[0]: pickle.dumps({meta[1]: names})}
    for number, file in enumerate([*train, test]):
        pixels = (np.arange(2 * 3072).reshape(2, 3072) + number) % 256
        batch = {"data": pixels.astype(np.uint8), "labels": [number, 3], "fine_labels": [7, 99]}
        content[file] = pickle.dumps(batch)
    verified(content)
    raw = images.load(name)
    assert raw["train_images"].shape == (2 * len(train), 32, 32, 3) and raw["test_images"].shape == (2, 32, 32, 3)
    assert raw["train_images"][0, 0, 1].tolist() == [1, 1, 1]  # the planes of red, green and blue start alike
    assert raw["train_images"][0, 1, 0].tolist() == [32, 32, 32]
    assert raw["test_labels"].tolist() == labels and raw["test_labels"].dtype == np.int64
    assert raw["classes"] == tuple(names)


def test_tiny_imagenet_is_read_from_its_archive(verified):
    def jpeg(value, mode):
        picture = io.BytesIO()
        Image.new(mode, (64, 64), value).save(picture, "JPEG")
        return picture.getvalue()

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "n2\nn1\n")
        for name, value in (("n1", 10), ("n2", 200)):
            archive.writestr(f"tiny-imagenet-200/train/{name}/images/{name}_0.JPEG", jpeg(value, "L"))
        archive.writestr("tiny-imagenet-200/val/images/val_0.JPEG", jpeg((9, 9, 9), "RGB"))
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn2\t0\t0\t1\t1\n")
    verified({"tiny-imagenet-200.zip": packed.getvalue()})
    raw = images.load("tiny_imagenet")
    assert raw["classes"] == ("n1", "n2") and raw["train_labels"].tolist() == [0, 1] and raw["test_labels"] == [1]
    assert raw["train_images"].shape == (2, 64, 64, 3) and raw["train_images"][1].mean() == pytest.approx(200, abs=2)


def test_svhn_is_read(verified):
    from scipy.io import savemat

    pixels, content = np.arange(2 * 3072).reshape(32, 32, 3, 2).astype(np.uint8), {}
    for split in ("train", "test"):
        file = io.BytesIO()
        savemat(file, {"X": pixels, "y": np.array([[10], [3]])})
        content[f"{split}_32x32.mat"] = file.getvalue()
    verified(content)
    raw = images.load("svhn")
    assert raw["test_labels"].tolist() == [0, 3] and np.array_equal(raw["test_images"][1], pixels[..., 1])


def test_images_from_elsewhere_are_fitted_or_left_out(tmp_path, monkeypatch, capsys):
    grey = np.array([[0, 100], [100, 200]], np.uint8)[None, :, :, None]
    assert images.fitted(grey, (2, 2, 1)).tolist() == grey.tolist()
    larger = images.fitted(grey, (4, 4, 3))
    assert (
        larger.shape == (1, 4, 4, 3) and larger[0, 0, 0].tolist() == [0] * 3 and larger[0, 3, 3].tolist() == [200] * 3
    )
    assert images.fitted(np.array([[[[10, 20, 60]]]], np.uint8), (1, 1, 1)).item() == 30
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    arrays = images.prepare(Data(dataset="digits", train=20, val=10, test=5, shifted=["digits", "svhn"]))
    assert arrays["shifted_digits"].shape == (797, 8, 8, 1) and "shifted_svhn" not in arrays
    assert "svhn is left out: " in capsys.readouterr().out


def test_classes_can_be_held_out_evenly():
    arrays = images.prepare(Data(dataset="digits", train=500, val=100, test=10, per_class=True))
    assert np.bincount(arrays["val_labels"]).tolist() == [10] * 10
    assert not set(arrays["train_index"]) & set(arrays["val_index"]) and len(arrays["train_index"]) == 500


def test_statistics_are_measured_on_train_or_given():
    pixels = np.array([0, 51, 102, 255], np.uint8).reshape(2, 1, 2, 1)  # 0, 0.2, 0.4 and 1
    config = Data(dataset="digits", train=1, val=1, test=1)
    found = images.statistics(config, pixels)
    assert list(found) == ["mean", "std"] and found["mean"] == pytest.approx([0.4])
    assert found["std"] == pytest.approx([np.sqrt((0.16 + 0.04 + 0 + 0.36) / 4)])
    own = {"mean": [0.5], "std": [0.25], "test_mean": [0.6], "test_std": [0.35]}
    assert {k: v.tolist() for k, v in images.statistics(config.model_copy(update=own), pixels).items()} == own
    for given, words in (
        ({"std": [0.1, 0.2]}, "'std' gives 2 values for images of 1 channels"),
        ({"test_mean": [0.1]}, "'test_mean' and 'test_std' go together; give both or none"),
    ):
        with pytest.raises(ValueError, match=words):
            images.statistics(config.model_copy(update=given), pixels)
    with pytest.raises(ValueError, match="Channel 1 is the same in all training images; leave it out, or give 'std'"):
        images.statistics(config, np.concatenate([pixels, np.full_like(pixels, 255)], axis=3))


@pytest.mark.parametrize("own", [{}, {"test_mean": [0.6], "test_std": [0.35]}])
def test_the_test_set_alone_is_normalised_by_statistics_of_its_own(own):
    """From params.yaml's names to what a network sees."""
    config = Data(dataset="digits", train=20, val=10, test=5, mean=[0.5], std=[0.25], **own)
    arrays = images.prepare(config)
    for name, split in feed.splits(arrays, torch.device("cpu")).items():
        mean, std = (0.6, 0.35) if own and name == "test" else (0.5, 0.25)
        expected = (arrays[f"{name}_images"].transpose(0, 3, 1, 2) / 255 - mean) / std
        assert split.batch(slice(None)).numpy() == pytest.approx(expected, abs=1e-5), name


def test_prepare_draws_disjoint_seeded_sets():
    config = Data(dataset="digits", train=600, val=200, test=300, seed=4)
    arrays, again = images.prepare(config), images.prepare(config)
    assert {s: len(arrays[f"{s}_labels"]) for s in ("train", "val", "test")} == {"train": 600, "val": 200, "test": 300}
    assert not set(arrays["train_index"]) & set(arrays["val_index"])
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    raw = images.digits()
    for split in ("train", "val"):
        assert np.array_equal(arrays[f"{split}_images"], raw["train_images"][arrays[f"{split}_index"]])
    other = images.prepare(config.model_copy(update={"seed": 5}))
    assert not np.array_equal(arrays["val_index"], other["val_index"])
    everything = images.prepare(Data(dataset="digits", train=800, val=200, test=797))
    assert np.array_equal(everything["test_labels"], raw["test_labels"])


def test_the_split_is_that_of_the_published_code():
    """Mukhoti et al. shuffle a list of indices after np.random.seed(seed) and hold out its head."""
    np.random.seed(1)
    indices = list(range(1000))
    np.random.shuffle(indices)
    arrays = images.prepare(Data(dataset="digits", train=900, val=100, test=797, seed=1))
    assert arrays["val_index"].tolist() == indices[:100] and arrays["train_index"].tolist() == indices[100:]


def test_bad_requests_are_named():
    for own in ({"vectors": "cut-out"}, {"masked": [1]}):
        with pytest.raises(ValueError, match="'vectors' and 'masked' are settings of texts"):
            prepare.prepare(Data(dataset="digits", train=1, val=1, test=1, **own))
    for own in ({"per_class": True}, {"shifted": ["svhn"]}):
        with pytest.raises(ValueError, match=f"'{min(own)}' is a setting of images, and this study's data are texts"):
            prepare.prepare(Data(dataset="sst", train=1, val=1, test=1, **own))
    with pytest.raises(ValueError, match="Unknown data set 'imagenet'; choose one of: fashion_mnist"):
        images.prepare(Data(dataset="imagenet", train=1, val=1, test=1))
    with pytest.raises(ValueError, match="digits has 1000 training and 797 test images; train 1000 [+] val 1 and test"):
        images.prepare(Data(dataset="digits", train=1000, val=1, test=10))
    with pytest.raises(ValueError, match="digits has 1000 training and 797 test images"):
        images.prepare(Data(dataset="digits", train=1, val=1, test=798))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train_images", lambda x: x / 255, r"own: train_images must be uint8 \(N, H, W, 1 or 3\), got float64"),
        ("test_images", lambda x: x[..., 0], r"own: test_images must be uint8 .*, got uint8 \(20, 8, 8\)"),
        ("test_images", lambda x: x.repeat(4, axis=3), r"own: test_images must be uint8 .*, got uint8 \(20, 8, 8, 4\)"),
        ("train_labels", lambda x: x.astype(str), r"own: train_labels must be int64 \(40,\), got <U"),
        ("test_labels", lambda x: x[:0], r"own: test_labels must be int64 \(20,\), got int64 \(0,\)"),
        ("test_labels", lambda x: x + 1, r"own: test_labels must lie in 0\.\.2, got 1\.\.3"),
        ("classes", lambda x: x[:2], r"own: train_labels must lie in 0\.\.1, got 0\.\.2"),
        ("test_images", lambda x: x[:, 1:], "own: images for training and test differ in height, width or channels"),
    ],
)
def test_a_data_set_of_ones_own_is_checked(monkeypatch, name, change, words):
    own = {"classes": ("a", "b", "c")}
    for split, size in (("train", 40), ("test", 20)):
        own |= {f"{split}_images": np.ones((size, 8, 8, 1), np.uint8), f"{split}_labels": np.arange(size) % 3}
    monkeypatch.setitem(images.DATASETS, "own", lambda: own | {name: change(own[name])})
    with pytest.raises(ValueError, match=words):
        images.load("own")


def test_a_data_set_of_ones_own_is_whole(monkeypatch):
    monkeypatch.setitem(images.DATASETS, "own", lambda: {"train_images": np.ones((4, 8, 8, 1), np.uint8)})
    with pytest.raises(ValueError, match="own: 'train_labels' is missing; it gives: train_images."):
        images.load("own")
    empty = {"images": np.ones((0, 8, 8, 1), np.uint8), "labels": np.zeros(0, np.int64)}
    arrays = {f"{split}_{kind}": array for split in ("train", "test") for kind, array in empty.items()}
    monkeypatch.setitem(images.DATASETS, "own", lambda: arrays | {"classes": ("a", "b")})
    with pytest.raises(ValueError, match="own: train_images and train_labels are empty"):
        images.load("own")


def test_images_are_prepared_outside_the_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_parameters(tmp_path, parameters())
    main(["data", "--prepare", "tiny"])
    assert "prepared.npz" in capsys.readouterr().out
    arrays = paths.read_npz(paths.prepared("tiny"))
    assert len(arrays["train_labels"]) == 150 and arrays["classes"].tolist() == [str(digit) for digit in range(10)]
