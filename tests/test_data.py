import gzip
import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from compendium import data
from compendium.settings import Data


@pytest.fixture
def files(monkeypatch):
    """Four small stand-ins for the published files, their MD5 sums in place of the real ones: name -> bytes."""
    made = {}
    for name, (_, stamp) in data.FASHION_MNIST.items():
        count, image = (12, name.endswith("idx3-ubyte.gz"))
        shape = (count, 4, 4) if image else (count,)
        values = np.arange(np.prod(shape), dtype=np.uint8) % (255 if image else 10)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(int(n).to_bytes(4, "big") for n in shape)
        stripped = gzip.compress(header + values.tobytes(), mtime=0)
        head = b"\x1f\x8b\x08\x08" + stamp.to_bytes(4, "little") + b"\x00\x03" + name[:-3].encode() + b"\0"
        made[name] = head + stripped[10:]
    sums = {n: (hashlib.md5(made[n]).hexdigest(), stamp) for n, (_, stamp) in data.FASHION_MNIST.items()}
    monkeypatch.setattr(data, "FASHION_MNIST", sums)
    return made


@pytest.fixture
def only(monkeypatch):
    """Leave FOCALCAL_DATA as the only source that can be reached, pointing at the given folder."""

    def restrict(folder):
        unreachable = {name: lambda *_, name=name: f"{name}: unreachable" for name in data.SOURCES}
        monkeypatch.setattr(data, "SOURCES", {**unreachable, "folder of FOCALCAL_DATA": data._from_environment})
        monkeypatch.setenv("FOCALCAL_DATA", str(folder))

    return restrict


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_mirror_folder_is_copied_and_read(tmp_path, files, only, monkeypatch):
    write(tmp_path / "mirror" / "deep", files)
    only(tmp_path / "mirror")
    data.fetch("fashion_mnist", tmp_path / "data" / "fashion_mnist")
    assert contents(tmp_path / "data" / "fashion_mnist") == files
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    raw = data.fashion_mnist()
    assert raw["train_images"].shape == (12, 4, 4, 1) and raw["test_labels"].tolist()[:3] == [0, 1, 2]


def test_debians_headers_are_restored(tmp_path, files, only):
    stripped = {n: b"\x1f\x8b\x08\x00" + bytes(4) + b"\x00\x03" + c[11 + len(n[:-3]) :] for n, c in files.items()}
    assert all(stripped[n] != files[n] for n in files)
    write(tmp_path / "package", stripped)
    only(tmp_path / "package")
    data.fetch("fashion_mnist", tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_half_downloaded_file_is_named_removed_and_fetched_anew(tmp_path, files, only, capsys):
    name = "train-images-idx3-ubyte.gz"
    write(tmp_path / "out", {**files, name: files[name][:20]})
    write(tmp_path / "mirror", files)
    only(tmp_path / "mirror")
    data.fetch("fashion_mnist", tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert f"Removed {tmp_path / 'out' / name}" in capsys.readouterr().out


def test_a_corrupted_source_is_never_used(tmp_path, files, only):
    name = "t10k-labels-idx1-ubyte.gz"
    corrupted = bytearray(files[name])
    corrupted[-1] ^= 1
    write(tmp_path / "mirror", {**files, name: bytes(corrupted)})
    only(tmp_path / "mirror")
    with pytest.raises(FileNotFoundError, match=f"{name} is corrupted.*set FOCALCAL_DATA to it"):
        data.fetch("fashion_mnist", tmp_path / "out")
    assert name not in contents(tmp_path / "out")
    assert (tmp_path / "mirror" / name).exists()  # the user's own file is left alone


def test_the_next_source_is_tried_and_a_full_folder_asks_none(tmp_path, files, monkeypatch):
    calls = []

    def works(_, folder):
        calls.append(folder)
        write(folder, files)

    monkeypatch.setattr(data, "SOURCES", {"broken": lambda *_: "down", "works": works})
    data.fetch("fashion_mnist", tmp_path)
    data.fetch("fashion_mnist", tmp_path)
    assert calls == [tmp_path]


def test_the_command_line_says_what_to_put_where(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    code = "from focalcal import data; data.SOURCES = {'moon': lambda *_: 'no ship'}; data.main(['fashion_mnist'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "Not from moon: no ship.\n"
    assert run.stderr.startswith("focalcal: No source of fashion_mnist could be used (no ship). Put train-images")
    assert "set FOCALCAL_DATA to it and run this again" in run.stderr and "Traceback" not in run.stderr


def small_cifar(folder, name, monkeypatch):
    """A stand-in for CIFAR with two images a batch, in the published layout, its MD5 sums in place of the real."""
    from torchvision import datasets

    known = getattr(datasets, name.upper())
    for attribute in ("train_list", "test_list"):
        sums = []
        for number, (file, _) in enumerate(getattr(known, attribute)):
            pixels = np.arange(2 * 3072).reshape(2, 3072) + number
            content = {"data": (pixels % 256).astype(np.uint8), "labels": [number, 1], "fine_labels": [7, 99]}
            path = folder / known.base_folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(content))
            sums.append([file, hashlib.md5(path.read_bytes()).hexdigest()])
        monkeypatch.setattr(known, attribute, sums)
    path = folder / known.base_folder / known.meta["filename"]
    path.write_bytes(pickle.dumps({"label_names": ["a"], "fine_label_names": ["b"]}))
    monkeypatch.setattr(known, "meta", known.meta | {"md5": hashlib.md5(path.read_bytes()).hexdigest()})


@pytest.mark.parametrize(("name", "archived"), [("cifar10", False), ("cifar10", True), ("cifar100", False)])
def test_cifar_from_a_folder_or_an_archive(tmp_path, only, monkeypatch, name, archived):
    small_cifar(tmp_path / "mirror", name, monkeypatch)
    if archived:
        with tarfile.open(tmp_path / "mirror" / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "mirror" / "cifar-10-batches-py", "cifar-10-batches-py")
        shutil.rmtree(tmp_path / "mirror" / "cifar-10-batches-py")
    only(tmp_path / "mirror")
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    data.fetch(name, tmp_path / "data" / name)
    raw = data.load(name)
    batches = {"cifar10": 5, "cifar100": 1}[name]
    assert raw["train_images"].shape == (2 * batches, 32, 32, 3) and raw["test_images"].shape == (2, 32, 32, 3)
    assert raw["train_images"][0, 0, 1].tolist() == [1, 1, 1]  # the planes of red, green and blue start alike
    assert raw["train_labels"][:2].tolist() == {"cifar10": [0, 1], "cifar100": [7, 99]}[name]


def test_tiny_imagenet_is_read_from_its_archive(tmp_path, monkeypatch):
    path = tmp_path / "data" / "tiny_imagenet" / "tiny-imagenet-200.zip"
    path.parent.mkdir(parents=True)

    def jpeg(value, mode):
        picture = io.BytesIO()
        Image.new(mode, (64, 64), value).save(picture, "JPEG")
        return picture.getvalue()

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "n2\nn1\n")
        for name, value in (("n1", 10), ("n2", 200)):
            archive.writestr(f"tiny-imagenet-200/train/{name}/images/{name}_0.JPEG", jpeg(value, "L"))
        archive.writestr("tiny-imagenet-200/val/images/val_0.JPEG", jpeg((9, 9, 9), "RGB"))
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn2\t0\t0\t1\t1\n")
    monkeypatch.setattr(data, "TINY_IMAGENET", ("x/tiny-imagenet-200.zip", hashlib.md5(path.read_bytes()).hexdigest()))
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    raw = data.load("tiny_imagenet")
    assert raw["classes"] == ("n1", "n2") and raw["train_labels"].tolist() == [0, 1] and raw["test_labels"] == [1]
    assert raw["train_images"].shape == (2, 64, 64, 3) and raw["train_images"][1].mean() == pytest.approx(200, abs=2)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="tiny-imagenet-200.zip is corrupted.*focalcal.data tiny_imagenet"):
        data.load("tiny_imagenet")


def test_svhn_is_read(tmp_path, monkeypatch):
    from scipy.io import savemat

    images = np.arange(2 * 3072).reshape(32, 32, 3, 2).astype(np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [3]])})
    monkeypatch.setattr(data, "_verified", lambda _: {p.name: p.read_bytes() for p in tmp_path.iterdir()})
    raw = data.load("svhn")
    assert raw["test_labels"].tolist() == [0, 3] and np.array_equal(raw["test_images"][1], images[..., 1])


def test_images_from_elsewhere_are_fitted_or_left_out(tmp_path, monkeypatch, capsys):
    grey = np.array([[0, 100], [100, 200]], np.uint8)[None, :, :, None]
    assert data.fitted(grey, (4, 4, 3)).shape == (1, 4, 4, 3) and data.fitted(grey, (2, 2, 1)).tolist() == grey.tolist()
    assert data.fitted(np.array([[[[10, 20, 60]]]], np.uint8), (1, 1, 1)).item() == 30
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    arrays = data.prepare(Data(dataset="digits", train=20, val=10, test=5, shifted=["digits", "svhn"]))
    assert arrays["shifted_digits"].shape == (797, 8, 8, 1) and "shifted_svhn" not in arrays
    assert "svhn is left out" in capsys.readouterr().out


def test_given_statistics_and_classes_held_out_evenly():
    config = Data(dataset="digits", train=500, val=100, test=10, mean=[0.5], std=[0.25], per_class=True)
    arrays = data.prepare(config)
    assert arrays["mean"].tolist() == [0.5] and arrays["std"].tolist() == [0.25]
    assert np.bincount(arrays["val_labels"]).tolist() == [10] * 10
    assert not set(arrays["train_index"]) & set(arrays["val_index"]) and len(arrays["train_index"]) == 500
    with pytest.raises(ValueError, match="'std' gives 2 values for images of 1 channels"):
        data.prepare(Data(dataset="digits", train=5, val=5, test=5, std=[0.1, 0.2]))
    with pytest.raises(ValueError, match="'test_mean' and 'test_std' go together"):
        data.prepare(Data(dataset="digits", train=5, val=5, test=5, test_mean=[0.1]))


def test_prepare_draws_disjoint_seeded_sets():
    settings = Data(dataset="digits", train=600, val=200, test=300, seed=4)
    arrays, again = data.prepare(settings), data.prepare(settings)
    assert {s: len(arrays[f"{s}_labels"]) for s in ("train", "val", "test")} == {"train": 600, "val": 200, "test": 300}
    assert not set(arrays["train_index"]) & set(arrays["val_index"])
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    pixels = arrays["train_images"] / 255
    assert (pixels - arrays["mean"]).mean() == pytest.approx(0, abs=1e-9)
    assert ((pixels - arrays["mean"]) / arrays["std"]).std() == pytest.approx(1)
    everything = data.prepare(Data(dataset="digits", train=800, val=200, test=797))
    assert np.array_equal(everything["test_labels"], data.digits()["test_labels"])


def test_the_split_is_that_of_the_published_code():
    """Mukhoti et al. shuffle a list of indices after np.random.seed(seed) and hold out its head."""
    np.random.seed(1)
    indices = list(range(1000))
    np.random.shuffle(indices)
    arrays = data.prepare(Data(dataset="digits", train=900, val=100, test=797, seed=1))
    assert arrays["val_index"].tolist() == indices[:100] and arrays["train_index"].tolist() == indices[100:]


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="Unknown data set 'imagenet'; choose one of: fashion_mnist"):
        data.prepare(Data(dataset="imagenet", train=1, val=1, test=1))
    with pytest.raises(ValueError, match="digits has 1000 training"):
        data.prepare(Data(dataset="digits", train=1000, val=1, test=10))
