import errno
import io
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest

from compendium import paths


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_places(folder, monkeypatch):
    (folder / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(folder / "deep" / "er")
    assert paths.root() == folder
    assert paths.run("tiny", "brier", 3) == folder / "artifacts/tiny/runs/brier/3"
    assert paths.prepared("tiny") == folder / "artifacts/tiny/prepared.npz"
    assert paths.scratch() == folder / "scratch"
    assert paths.figures("tiny", "08_results") == folder / "figures/tiny/08_results"
    assert paths.figures("tiny", "08_results", ["brier"]) == folder / "scratch/figures/tiny/08_results"
    assert (folder / "scratch/figures/tiny/08_results").is_dir()
    monkeypatch.setenv("FOCALCAL_SCRATCH", "/elsewhere")
    assert str(paths.scratch()) == "/elsewhere"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "new" / "results.csv"
    with paths.atomic(target) as part:
        part.write_text("old")
        assert not target.exists()
    full = r"Disk full while writing .*results.csv \(\d+ MB free\); free some space and run again"
    with pytest.raises(OSError, match=full), paths.atomic(target) as part:
        part.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ZeroDivisionError), paths.atomic(target) as part:
        part.write_text("half of it")
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]
    with pytest.raises(IsADirectoryError, match="new is a folder; name a file"), paths.atomic(target.parent):
        raise AssertionError("nothing is computed for it")


def test_what_is_missing_is_named_with_advice_that_fits(folder):
    with pytest.raises(FileNotFoundError, match="a.npz is missing; `dvc repro` makes it, `make artifacts` fetches"):
        paths.read_npz(folder / "artifacts" / "a.npz")
    with pytest.raises(FileNotFoundError, match="mine.npz is missing") as problem:
        paths.read_npz(folder / "mine.npz")
    assert "dvc" not in str(problem.value)


@pytest.mark.parametrize("damage", [lambda b: b[:300], lambda b: b"", lambda b: b"not an archive"])
def test_what_is_damaged_is_named_with_advice_that_fits(folder, damage):
    for place in ("artifacts/tiny", "."):
        path = folder / place / "logits.npz"
        paths.write_npz(path, logits=np.zeros((20, 3)))
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="logits.npz is truncated or damaged .*; delete it and run `dvc checkout`"):
        paths.read_npz(folder / "artifacts/tiny/logits.npz")
    with pytest.raises(ValueError, match="logits.npz is truncated or damaged .*; make or copy it anew") as problem:
        paths.read_npz(folder / "logits.npz")
    assert "dvc" not in str(problem.value) and "\n" not in str(problem.value)


def test_a_damaged_byte_of_a_compressed_file_is_found(folder):
    path = folder / "logits.npz"
    paths.write_npz(path, zipfile.ZIP_DEFLATED, logits=np.zeros((20, 3)))
    content = bytearray(path.read_bytes())
    content[30 + len("logits.npy")] = 0xFF  # the first one behind the header: there is no such block
    path.write_bytes(content)
    with pytest.raises(ValueError, match="logits.npz is truncated or damaged .*invalid block type"):
        paths.read_npz(path)
    paths.write_npz(path, logits=np.zeros((20, 3)))
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\1\2") + 8] |= 1  # a flag: encrypted
    path.write_bytes(content)
    with pytest.raises(ValueError, match="logits.npz is truncated or damaged .*encrypted"):
        paths.read_npz(path)


def test_a_single_array_is_no_npz_file(tmp_path):
    with open(tmp_path / "logits.npz", "wb") as file:
        np.save(file, np.zeros((20, 3)))
    with pytest.raises(ValueError, match="no such archive as np.savez writes"):
        paths.read_npz(tmp_path / "logits.npz")


def test_arrays_come_back_and_equal_ones_give_equal_bytes(tmp_path):
    arrays = {"names": np.array(["a", "bc"]), "one": np.array(1), "logits": np.ones((2, 3), np.float16)[::-1]}
    for name in ("first", "second"):
        paths.write_npz(tmp_path / f"{name}.npz", **arrays)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    for loaded in (paths.read_npz(tmp_path / "first.npz"), dict(np.load(tmp_path / "first.npz"))):
        assert list(loaded) == list(arrays)
        assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
        assert loaded["logits"].dtype == np.float16


def test_equal_figures_and_tables_give_equal_bytes(tmp_path):
    from matplotlib import pyplot

    def made(folder):
        figure, ax = pyplot.subplots()
        ax.plot([1, 2], [3, 4])
        ax.set_title("clip paths and ids")
        paths.save_figure(figure, folder, "lines")
        paths.save_table(pd.DataFrame({"ece": [0.25]}), folder, "table", index=False)
        assert not pyplot.fignum_exists(figure.number)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert made(tmp_path / "one") == made(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["lines.png", "lines.svg", "table.csv"]
    assert (tmp_path / "one" / "table.csv").read_text() == "ece\n0.25\n"


def test_an_archives_files_are_unpacked_and_nothing_else(tmp_path):
    def packed(*names):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size, entry.type = (5, tarfile.REGTYPE) if name != "link" else (0, tarfile.SYMTYPE)
                entry.linkname = "/etc/passwd" if name == "link" else ""
                archive.addfile(entry, io.BytesIO(b"seen\n"))
        content.seek(0)
        return tarfile.open(fileobj=content)

    paths.unpack(packed("deep/er/file", "link"), tmp_path / "inside")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()] == [
        "inside/deep/er/file"
    ]
    assert (tmp_path / "inside/deep/er/file").read_text() == "seen\n"
    for outside in ("../evil", f"{tmp_path}/evil"):
        with pytest.raises(tarfile.TarError, match="evil would lie outside"):
            paths.unpack(packed(outside), tmp_path / "inside")
        assert not (tmp_path / "evil").exists()
