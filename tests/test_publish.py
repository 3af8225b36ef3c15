"""Packing finished runs and publishing them."""

import gzip
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from helpers import parameters, write_parameters

from compendium import paths, publish, runs
from compendium.__main__ import main
from focalcal import metrics


@pytest.fixture
def compendium(tmp_path, monkeypatch):
    """A folder with two finished runs of study 'tiny'."""
    write_parameters(tmp_path, parameters())
    monkeypatch.chdir(tmp_path)
    for loss, seed in (("brier", 0), ("focal3", 1)):
        finished(loss, seed)
    return tmp_path


def finished(loss, seed, nll=0.4):
    study, folder, rng = paths.study("tiny"), paths.run("tiny", loss, seed), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text(f"epoch,test_nll\n1,0.5\n2,{nll}\n")
    labels = np.arange(3000) % 5
    logits = 50 + 3 * np.eye(5)[labels] + rng.normal(size=(3000, 5))
    splits = {"val_logits": logits, "val_labels": labels, "test_logits": logits, "test_labels": labels}
    paths.write_npz(folder / "logits.npz", **splits, epoch=np.array(2))
    paths.write_npz(folder / "gradients.npz", epochs=np.array([1]), norms=np.ones((1, 4), np.float32))
    noise = {f"noise{level}": logits.astype(np.float16) for level in range(1, 6)}
    paths.write_npz(folder / "shifted.npz", digits=logits, **noise)
    for kind, ending in (("provenance", "json"), ("models", "safetensors")):
        (study / kind).mkdir(exist_ok=True)
        (study / kind / f"{loss}-{seed}.{ending}").write_text("{}")


def members(archive):
    with tarfile.open(archive) as packed:
        return {name.removeprefix("tiny/") for name in packed.getnames()}


def test_packed_runs_are_published_and_pinned(compendium, capsys):
    subprocess.run(["git", "init", "-q"], check=True)
    for command in ("init -q", "config core.analytics false", "remote add -d store .store -q"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], check=True)
    raw = paths.read_npz(paths.run("tiny", "brier", 0) / "logits.npz")
    main(["publish", "pack", "tiny"])
    assert "2 runs in tiny.tar" in capsys.readouterr().out
    main(["publish", "add", "tiny.tar"])
    assert "move the study to active.published" in capsys.readouterr().out
    assert (compendium / "published/tiny.dvc").is_file()
    assert [file for file in (compendium / ".store").rglob("*") if file.is_file()]
    found = paths.read_npz(compendium / "published/tiny/runs/brier/0/logits.npz")
    assert found["test_logits"].dtype == np.float16 and found["epoch"] == 2
    for metric in metrics.METRICS.values():
        before = metric(raw["test_logits"], raw["test_labels"])
        assert metric(found["test_logits"].astype(float), found["test_labels"]) == pytest.approx(before, abs=1e-4)


def test_what_is_packed(compendium):
    always = {"runs/brier/0/history.csv", "runs/brier/0/logits.npz", "provenance/brier-0.json", "params.yaml"}
    whole = always | {"runs/brier/0/gradients.npz", "runs/brier/0/shifted.npz"}

    def packed(*options):
        main(["publish", "pack", "tiny", "--out", "some.tar", *options])
        return {name for name in members("some.tar") if "focal3" not in name}

    assert packed("--scores-only") == always and packed() == whole
    assert packed("--weights") == whole | {"models/brier-0.safetensors"}
    assert publish.add(compendium / "some.tar") == compendium / "published/tiny"
    assert (compendium / "published/tiny/models/focal3-1.safetensors").read_text() == "{}"
    (paths.study("tiny") / "models/focal3-1.safetensors").unlink()
    packed("--weights")
    assert not any("focal3" in name for name in members("some.tar"))  # a run that lacks a file is left out whole
    packed()
    assert "runs/focal3/1/history.csv" in members("some.tar")


def test_predictions_are_compressed_and_weaker_noise_published_of_seed_0_only(compendium):
    publish.pack("tiny")
    runs = publish.add(compendium / "tiny.tar") / "runs"
    for path in (*runs.rglob("logits.npz"), *runs.rglob("shifted.npz")):
        with ZipFile(path) as archive:
            assert {member.compress_type for member in archive.infolist()} == {ZIP_DEFLATED}
    kept = {run: sorted(paths.read_npz(runs / run / "shifted.npz")) for run in ("brier/0", "focal3/1")}
    assert kept["brier/0"] == ["digits", *(f"noise{level}" for level in range(1, 6))]
    assert kept["focal3/1"] == ["digits", "noise5"]


def test_logits_that_half_precision_would_change_stay_as_they_are(tmp_path):
    path = tmp_path / "logits.npz"
    logits = np.tile([0.0, 1e-9], (60, 1))  # a lead of the second class that half precision loses
    labels = np.ones(60, np.int64)
    paths.write_npz(path, val_logits=logits, val_labels=labels, test_logits=logits, test_labels=labels)
    assert not publish.halve_precision(path) and np.array_equal(paths.read_npz(path)["test_logits"], logits)
    miss = np.array([[0, -200.03]] + 59 * [[0, 0.0]])  # half precision has -200, and the NLL of 60 moves by 0.0005
    paths.write_npz(path, val_logits=miss, val_labels=labels, test_logits=miss, test_labels=labels)
    assert not publish.halve_precision(path)
    far = logits - np.array([1e5, 0])  # beyond the range of half precision
    paths.write_npz(path, val_logits=far, val_labels=labels, test_logits=far, test_labels=labels)
    assert not publish.halve_precision(path)


def test_what_is_halved_stays_so(tmp_path):
    path, draw = tmp_path / "logits.npz", np.random.default_rng(0)
    labels = draw.integers(3, size=1821)  # by chance many confidences lie next to an edge once rounded
    logits = (draw.normal(size=(1821, 3)) + 2 * np.eye(3)[labels]).astype(np.float16).astype(np.float64)
    logits = (logits - logits.max(axis=1, keepdims=True)).astype(np.float16)
    paths.write_npz(path, val_logits=logits, val_labels=labels, test_logits=logits, test_labels=labels)
    assert publish.halve_precision(path) and np.array_equal(paths.read_npz(path)["test_logits"], logits)


def test_a_masked_class_is_published_too(compendium):
    run = paths.run("tiny", "brier", 0) / "logits.npz"
    paths.write_npz(run, **paths.read_npz(run), masked=np.array([3]))
    publish.pack("tiny")
    published = publish.add(compendium / "tiny.tar") / "runs/brier/0/logits.npz"
    assert runs.read_logits(published)["test"][2] == (3,)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_that_are_links_into_a_cache_are_packed(compendium, link):
    for number, path in enumerate(sorted(paths.study("tiny").glob("runs/*/*/*"))):
        link(path.rename(compendium / f"cached-{number}"), path)
        link(compendium / f"cached-{number}", compendium / f"another-{number}")
    publish.pack("tiny")
    assert len(list(publish.add(compendium / "tiny.tar").glob("runs/*/*/*.*"))) == 8


def test_more_runs_are_added_and_others_results_refused(compendium):
    publish.pack("tiny")
    publish.add(compendium / "tiny.tar")
    finished("focal3", 2)
    publish.pack("tiny", compendium / "more.tar")
    publish.add(compendium / "more.tar")
    published = [f"{run.parent.name} {run.name}" for run in (compendium / "published/tiny").glob("runs/*/*")]
    assert sorted(published) == ["brier 0", "focal3 1", "focal3 2"]
    finished("focal3", 2, nll=0.3)
    publish.pack("tiny")
    with pytest.raises(ValueError, match="focal3/2 is published already, with other results; delete it first"):
        publish.add(compendium / "tiny.tar")
    finished("focal3", 2)
    logits = paths.run("tiny", "focal3", 2) / "logits.npz"
    paths.write_npz(logits, **paths.read_npz(logits) | {"test_labels": np.arange(3000) % 4})
    publish.pack("tiny")
    with pytest.raises(ValueError, match="focal3/2 is published already, with other results; delete it first"):
        publish.add(compendium / "tiny.tar")


def test_what_is_published_must_be_here_to_be_added_to(compendium):
    publish.pack("tiny")
    (compendium / "published").mkdir()
    (compendium / "published/tiny.dvc").touch()
    with pytest.raises(ValueError, match="published/tiny is not here; run `dvc pull published/tiny.dvc` first"):
        publish.add(compendium / "tiny.tar")


def test_what_is_not_whole_is_named(compendium, capsys):
    (paths.run("tiny", "focal3", 1) / "history.csv").unlink()
    publish.pack("tiny")
    assert "focal3, seed 1 is left out: history.csv missing." in capsys.readouterr().out
    packed = compendium / "tiny.tar"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="tiny.tar is damaged or no tar file"):
        publish.add(packed)
    with gzip.open(packed.with_name("short.tar.gz"), "wb") as file:
        file.write(whole)
    short = packed.with_name("short.tar.gz")
    short.write_bytes(short.read_bytes()[:3000])
    with pytest.raises(ValueError, match="short.tar.gz is damaged or no tar file"):
        publish.add(short)
    header = whole.rfind(b"././@PaxHeader", 0, whole.rfind(b"tiny/runs"))  # tarfile takes a damaged one for the end
    packed.write_bytes(whole[:header] + b"?" + whole[header + 1 :])
    with pytest.raises(ValueError, match="tiny.tar is damaged: it ends before its params.yaml"):
        publish.add(packed)
    for name in ("../dvc.yaml", "tiny/runs/brier/0/history.exe"):
        with tarfile.open(compendium / "other.tar", "w") as archive:
            archive.add(compendium / "dvc.yaml", name)
        with pytest.raises(ValueError, match="other.tar is not what `compendium publish pack` writes"):
            publish.add(compendium / "other.tar")
    with tarfile.open(compendium / "other.tar", "w") as archive:
        for study in ("tiny", "other"):
            archive.add(paths.root() / "params.yaml", f"{study}/params.yaml")
    with pytest.raises(ValueError, match="other.tar holds several studies; pack each alone"):
        publish.add(compendium / "other.tar")
    assert not (compendium / "published").exists()
    with pytest.raises(SystemExit, match="focalcal: No finished run in .*nothing/runs; train first"):
        main(["publish", "pack", "nothing"])
    assert not (compendium / "nothing.tar").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("history.csv", b"epoch,test_nll\n1,0.5\n3,0.4\n", ": history.csv does not hold every epoch once"),
        ("history.csv", b"a,b\n1,0.5\n", ": history.csv does not hold every epoch once"),
        ("history.csv", b"epoch,test_nll\n", ": history.csv does not hold every epoch once"),
        ("history.csv", b"epoch,test_nll\n1,inf\n", ": the test NLL in history.csv is not finite"),
        ("history.csv", b"epoch,test_nll\n1,abc\n", ": history.csv is damaged"),
        ("history.csv", b"", ": history.csv is damaged"),
        ("gradients.npz", b"nothing", ", is damaged in the packed file: .*gradients.npz"),
        ("logits.npz", b"nothing", ", is damaged in the packed file: .*logits.npz"),
        ("../../../provenance/brier-0.json", b"{", ", is damaged in the packed file"),
    ],
)
def test_a_damaged_run_is_named(compendium, name, content, words):
    (paths.run("tiny", "brier", 0) / name).write_bytes(content)
    publish.pack("tiny")
    with pytest.raises(ValueError, match=f"brier, seed 0{words}"):
        publish.add(compendium / "tiny.tar")
    assert not (compendium / "published").exists()


def test_a_run_without_its_provenance_is_named(compendium):
    publish.pack("tiny")
    with tarfile.open("tiny.tar") as packed:
        paths.unpack(packed, compendium / "unpacked")
    (compendium / "unpacked/tiny/provenance/brier-0.json").unlink()
    with tarfile.open("tiny.tar", "w") as packed:
        for path in filter(Path.is_file, Path("unpacked").rglob("*")):
            packed.add(path, path.relative_to("unpacked"))
    with pytest.raises(ValueError, match="brier, seed 0, is damaged in the packed file: .*brier-0.json is missing"):
        publish.add(compendium / "tiny.tar")


def test_of_two_archives_the_good_one_is_published_whole(compendium, monkeypatch):
    called = []
    monkeypatch.setattr(publish.subprocess, "run", lambda words, **_: called.append(words[-1]) or done)
    done = subprocess.CompletedProcess([], 0)
    publish.pack("tiny")
    (compendium / "bad.tar").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="bad.tar is damaged or no tar file"):
        main(["publish", "add", "tiny.tar", "bad.tar"])
    assert called == [compendium / "published/tiny", f"{compendium / 'published/tiny'}.dvc"]


def test_a_full_disk_leaves_what_was_published(compendium, monkeypatch):
    publish.pack("tiny")
    publish.add(compendium / "tiny.tar")
    before = {path: path.read_bytes() for path in (compendium / "published").rglob("*") if path.is_file()}
    finished("focal3", 2)
    publish.pack("tiny")
    copytree = publish.shutil.copytree

    def full(source, target, *rest, **options):
        if "focal3/2" in str(target):
            raise OSError("No space left on device")
        return copytree(source, target, *rest, **options)

    monkeypatch.setattr(publish.shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        publish.add(compendium / "tiny.tar")
    assert {path: path.read_bytes() for path in (compendium / "published").rglob("*") if path.is_file()} == before
    assert [path.name for path in (compendium / "published").iterdir()] == ["tiny"]
