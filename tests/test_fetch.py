"""Raw data sets: where they come from, and that only their canonical files are used."""

import gzip
import hashlib
import shutil
import tarfile

import numpy as np
import pytest
from helpers import parameters, write_parameters

from compendium import fetch
from compendium.__main__ import main


@pytest.fixture
def files(monkeypatch):
    """Four small stand-ins for the published files, their MD5 sums in place of the real ones: name -> bytes."""
    made = {}
    for name, (_, stamp) in fetch.FASHION_MNIST.items():
        count, image = (12, name.endswith("idx3-ubyte.gz"))
        shape = (count, 4, 4) if image else (count,)
        values = np.arange(np.prod(shape), dtype=np.uint8) % (255 if image else 10)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(int(n).to_bytes(4, "big") for n in shape)
        stripped = gzip.compress(header + values.tobytes(), mtime=0)
        head = b"\x1f\x8b\x08\x08" + stamp.to_bytes(4, "little") + b"\x00\x03" + name[:-3].encode() + b"\0"
        made[name] = head + stripped[10:]
    sums = {n: (hashlib.md5(made[n]).hexdigest(), stamp) for n, (_, stamp) in fetch.FASHION_MNIST.items()}
    monkeypatch.setattr(fetch, "FASHION_MNIST", sums)
    return made


@pytest.fixture
def only(monkeypatch):
    """Leave FOCALCAL_DATA as the only source that can be reached, pointing at the given folder."""

    def restrict(folder):
        unreachable = {name: lambda *_, name=name: f"{name}: unreachable" for name in fetch.SOURCES}
        monkeypatch.setattr(fetch, "SOURCES", {**unreachable, "folder of FOCALCAL_DATA": fetch._from_environment})
        monkeypatch.setenv("FOCALCAL_DATA", str(folder))

    return restrict


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_mirror_folder_is_copied(tmp_path, files, only, capsys):
    write(tmp_path / "mirror" / "deep", files)
    only(tmp_path / "mirror")
    fetch.fetch("fashion_mnist", tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert "copied into" in capsys.readouterr().out


def test_debians_headers_are_restored(tmp_path, files, only):
    stripped = {n: b"\x1f\x8b\x08\x00" + bytes(4) + b"\x00\x03" + c[11 + len(n[:-3]) :] for n, c in files.items()}
    assert all(stripped[n] != files[n] for n in files)
    write(tmp_path / "package", stripped)
    only(tmp_path / "package")
    fetch.fetch("fashion_mnist", tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_half_downloaded_file_is_named_removed_and_fetched_anew(tmp_path, files, only, capsys):
    name = "train-images-idx3-ubyte.gz"
    write(tmp_path / "out", {**files, name: files[name][:20]})
    write(tmp_path / "mirror", files)
    only(tmp_path / "mirror")
    fetch.fetch("fashion_mnist", tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert f"Removed {tmp_path / 'out' / name}" in capsys.readouterr().out


def test_a_corrupted_source_is_never_used(tmp_path, files, only):
    name = "t10k-labels-idx1-ubyte.gz"
    corrupted = bytearray(files[name])
    corrupted[-1] ^= 1
    write(tmp_path / "mirror", {**files, name: bytes(corrupted)})
    only(tmp_path / "mirror")
    with pytest.raises(FileNotFoundError, match=f"{name} is corrupted.*set FOCALCAL_DATA to it"):
        fetch.fetch("fashion_mnist", tmp_path / "out")
    assert name not in contents(tmp_path / "out")
    assert (tmp_path / "mirror" / name).exists()  # the user's own file is left alone


def test_the_next_source_is_tried_and_a_full_folder_asks_none(tmp_path, files, monkeypatch):
    calls = []

    def works(_, folder):
        calls.append(folder)
        write(folder, files)

    monkeypatch.setattr(fetch, "SOURCES", {"broken": lambda *_: "down", "works": works})
    fetch.fetch("fashion_mnist", tmp_path)
    fetch.fetch("fashion_mnist", tmp_path)
    assert calls == [tmp_path]


def test_what_is_read_was_verified(tmp_path, files, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "fashion_mnist", files)
    assert fetch.verified("fashion_mnist") == files
    path = tmp_path / "data" / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz is corrupted or incomplete; `make data` replaces"):
        fetch.verified("fashion_mnist")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte.gz is missing; `make data` fetches it"):
        fetch.verified("fashion_mnist")
    with pytest.raises(FileNotFoundError, match="is missing; `python -m compendium data tiny_imagenet` fetches it"):
        fetch.verified("tiny_imagenet")


def test_the_command_line_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "SOURCES", {"moon": lambda *_: "no ship"})
    with pytest.raises(SystemExit) as stop:
        main(["data", "fashion_mnist"])
    said = "Looking for fashion_mnist; a download can take minutes.\nNot from moon: no ship.\n"
    assert capsys.readouterr().out == said
    assert str(stop.value).startswith(
        "focalcal: No source of fashion_mnist could be used (no ship). Put train-images-idx3-ubyte.gz, "
    )
    assert "set FOCALCAL_DATA to it and run this again" in str(stop.value)
    with pytest.raises(SystemExit, match=r"focalcal: 'digits' is not fetched .*; data sets that are: fashion_mnist, "):
        main(["data", "digits"])


def test_a_slip_in_the_name_of_a_loss_shows_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = parameters()
    values["active"]["losses"] = ["focl1"]
    write_parameters(tmp_path, values)
    with pytest.raises(SystemExit, match="Unknown loss 'focl1'; params.yaml lists under shared.losses: "):
        main(["data"])


def test_without_names_the_active_studies_data_are_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values, asked = parameters(), []
    values["studies"]["tiny"]["data"] |= {"shifted": ["digits", "svhn"]}
    values["studies"]["big"] = values["studies"]["tiny"] | {"data": values["studies"]["tiny"]["data"].copy()}
    values["studies"]["big"]["data"]["dataset"] = "cifar10"
    values["active"]["studies"] = ["tiny", "big"]
    write_parameters(tmp_path, values)

    def ask(name, folder):
        asked.append(name)
        assert folder == tmp_path / "data" / name
        if name == "svhn":
            raise FileNotFoundError("no ship")

    monkeypatch.setattr(fetch, "fetch", ask)
    main(["data"])
    assert asked == ["cifar10", "fashion_mnist", "svhn"]  # the second is pinned, digits come with scikit-learn
    assert capsys.readouterr().out == "svhn, which only chapter 9 uses, is left out: no ship\n"


@pytest.mark.parametrize("archived", [False, True])
def test_files_are_found_below_a_folder_or_in_an_archive(tmp_path, only, monkeypatch, archived):
    names = [f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch")]
    made = {name: name.encode() for name in names}
    monkeypatch.setattr(fetch, "files", lambda _: {name: hashlib.md5(made[name]).hexdigest() for name in names})
    write(tmp_path / "mirror" / "cifar-10-batches-py", {name.split("/")[1]: made[name] for name in names})
    if archived:
        with tarfile.open(tmp_path / "mirror" / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "mirror" / "cifar-10-batches-py", "cifar-10-batches-py")
        shutil.rmtree(tmp_path / "mirror" / "cifar-10-batches-py")
    only(tmp_path / "mirror")
    fetch.fetch("cifar10", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == made


def test_torchvision_knows_the_files_of_the_others():
    assert len(fetch.files("cifar10")) == 7 and len(fetch.files("cifar100")) == 3
    assert list(fetch.files("svhn")) == ["train_32x32.mat", "test_32x32.mat"]
    assert fetch.files("tiny_imagenet") == {"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"}
    assert all(len(md5) == 32 for name in fetch.FETCHED for md5 in fetch.files(name).values())
