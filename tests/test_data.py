import gzip
import subprocess
import sys

import numpy as np
import pytest

from focalcal import data
from focalcal.settings import Data


@pytest.fixture
def files(monkeypatch):
    """Four small stand-ins for the published files, their MD5 sums in place of the real ones: name -> bytes."""
    import hashlib

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
        unreachable = {name: lambda _, name=name: f"{name}: unreachable" for name in data.SOURCES}
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
    data.fetch(tmp_path / "data" / "fashion_mnist")
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
    data.fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_half_downloaded_file_is_named_removed_and_fetched_anew(tmp_path, files, only, capsys):
    name = "train-images-idx3-ubyte.gz"
    write(tmp_path / "out", {**files, name: files[name][:20]})
    write(tmp_path / "mirror", files)
    only(tmp_path / "mirror")
    data.fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert f"Removed {tmp_path / 'out' / name}" in capsys.readouterr().out


def test_a_corrupted_source_is_never_used(tmp_path, files, only):
    name = "t10k-labels-idx1-ubyte.gz"
    corrupted = bytearray(files[name])
    corrupted[-1] ^= 1
    write(tmp_path / "mirror", {**files, name: bytes(corrupted)})
    only(tmp_path / "mirror")
    with pytest.raises(FileNotFoundError, match=f"{name} is corrupted.*set FOCALCAL_DATA to it"):
        data.fetch(tmp_path / "out")
    assert name not in contents(tmp_path / "out")
    assert (tmp_path / "mirror" / name).exists()  # the user's own file is left alone


def test_the_next_source_is_tried_and_a_full_folder_asks_none(tmp_path, files, monkeypatch):
    calls = []

    def works(folder):
        calls.append(folder)
        write(folder, files)

    monkeypatch.setattr(data, "SOURCES", {"broken": lambda _: "down", "works": works})
    data.fetch(tmp_path)
    data.fetch(tmp_path)
    assert calls == [tmp_path]


def test_the_command_line_says_what_to_put_where(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    code = "from focalcal import data; data.SOURCES = {'moon': lambda _: 'no ship'}; data.main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "Not from moon: no ship.\n"
    assert run.stderr.startswith("focalcal: No source of Fashion-MNIST could be used (no ship). Put train-images")
    assert "set FOCALCAL_DATA to it and run this again" in run.stderr and "Traceback" not in run.stderr


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
