"""Texts: 20 Newsgroups and the Stanford Sentiment Treebank, read and split as in Mukhoti et al.'s published code, with
GloVe's word vectors.

A new data set is one function that makes from a study's settings the arrays of ``feed.splits`` for train, val and test,
embedding, float32 (words, D), and classes, their names; and one line in ``DATASETS``.
"""

import csv
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from compendium import fetch, paths
from compendium.settings import Data

LENGTH = 1000  # last tokens of a document that count
VOCABULARY = 20_000  # word numbers below it are kept
SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))  # those of Keras; no apostrophe
ESCAPES = {"-lrb-": "(", "-rrb-": ")", "-lcb-": "{", "-rcb-": "}", "-lsb-": "[", "-rsb-": "]", "``": '"', "''": '"'}
VECTORS = {"glove.6B.100d": "glove.6B.100d.txt", "cut-out": "glove.6B.100d.part.txt"}  # files in data/glove
DIMENSIONS = 100


def newsgroup_files() -> list[Path]:
    """The documents in data/20newsgroups: groups in the order of their names, numbers in that of their digits."""
    folder = paths.root() / "data" / "20newsgroups"
    files = sorted(file for file in folder.glob("*/*") if file.name.isdigit())
    groups = {file.parent for file in files}
    if len(files) != fetch.DOCUMENTS or len(groups) != 20:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} documents in {len(groups)} groups instead of {fetch.DOCUMENTS:,} in 20; "
            "`python -m compendium data 20newsgroups` fetches them."
        )
    return files


def body(document: str) -> str:
    """What follows the first blank line, if there is one behind the start."""
    blank = document.find("\n\n")
    return document[blank:] if blank > 0 else document


def words(text: str) -> list[str]:
    """Lower-case words of a document, as Keras 2.1 splits them."""
    return [word for word in text.lower().translate(SEPARATORS).split(" ") if word]


def numbered(documents: list[list[str]], length: int = LENGTH, vocabulary: int = VOCABULARY):
    """Word numbers int64 (N, length), zeros in front, and the words by number (the first, for padding, is empty).

    Words are numbered from 1 by falling frequency, ties by first appearance; those from ``vocabulary`` on are dropped,
    and then the last ``length`` kept.
    """
    counts = Counter(word for document in documents for word in document)
    known = ["", *sorted(counts, key=lambda word: -counts[word])][:vocabulary]
    number = {word: i for i, word in enumerate(known)}
    tokens = np.zeros((len(documents), length), np.int64)
    for row, document in zip(tokens, documents, strict=True):
        kept = [number[word] for word in document if word in number][-length:]
        row[length - len(kept) :] = kept
    return tokens, known


def vectors(name: str, wanted: list[str], missing=lambda n: np.zeros((n, DIMENSIONS))) -> np.ndarray:
    """Word vectors, float32 (words, 100), of the words that are wanted; missing: gives rows for those without one."""
    if name not in VECTORS:
        raise ValueError(f"'vectors' must be one of {', '.join(VECTORS)}, got {name!r}.")
    path = paths.root() / "data" / "glove" / VECTORS[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m compendium data '{fetch.GLOVE[name]}'` fetches it.")
    rows, places = {}, set(wanted)
    with open(path, encoding="utf-8") as file:
        for line in file:
            word, _, numbers = line.rstrip("\n").partition(" ")
            if word in places:
                rows[word] = numbers.split(" ")
    if bad := [word for word, row in rows.items() if len(row) != DIMENSIONS]:
        raise ValueError(
            f"{path}: the vector of '{bad[0]}' has {len(rows[bad[0]])} numbers instead of {DIMENSIONS}; "
            "delete the file and fetch it anew."
        )
    if not rows:
        raise ValueError(f"{path} has a vector for none of the {len(wanted):,} words of the study.")
    found = np.array([word in rows for word in wanted])
    table = np.empty((len(wanted), DIMENSIONS), np.float32)
    table[found] = np.array([rows[word] for word in wanted if word in rows], np.float32)
    table[~found] = missing(int((~found).sum()))
    print(f"{name}: vectors of {found.sum():,} of {len(wanted):,} words.")
    return table


def newsgroup_documents() -> tuple[list[str], np.ndarray, np.ndarray]:
    """The documents of 20 Newsgroups without their headers, their labels (N,), and the names of the groups."""
    files = newsgroup_files()
    raw = [file.read_bytes() for file in files]
    digests = np.fromfile(Path(__file__).with_name("20newsgroups.crc32"), "<u4")
    different = sum(zlib.crc32(content) != digest for content, digest in zip(raw, digests, strict=True))
    print(f"{different} of {len(files):,} documents differ from the copy that the published runs were trained on.")
    bodies = [body(re.sub("\r\n?", "\n", content.decode("latin-1"))) for content in raw]
    classes = sorted({file.parent.name for file in files})
    return bodies, np.array([classes.index(file.parent.name) for file in files], np.int64), np.array(classes)


def newsgroup_split(config: Data) -> dict[str, np.ndarray]:
    """The published split: split -> places in the list of documents."""
    order = np.arange(fetch.DOCUMENTS)
    np.random.RandomState(config.seed).shuffle(order)  # the generator of the published code
    if config.train + config.val + config.test > len(order):
        raise ValueError(f"20newsgroups has {len(order):,} documents; train, val and test ask for more.")
    rest, test = np.split(order, [len(order) - config.test])
    rest, val = np.split(rest, [len(rest) - config.val])
    return {"train": rest[len(rest) - config.train :], "val": val, "test": test}


def newsgroups(config: Data) -> dict[str, np.ndarray]:
    """20 Newsgroups (Lang 1995): 19,997 messages to 20 groups of the Usenet, headers cut away.

    Numbered, padded and split as published, words of test documents included in the numbering. Arrays: *_tokens,
    int64 (N, 1000); *_labels; train_index, val_index and test_index into the sorted files; embedding; classes.
    """
    bodies, labels, classes = newsgroup_documents()
    tokens, known = numbered([words(text) for text in bodies])
    arrays = {}
    for name, rows in newsgroup_split(config).items():
        arrays |= {f"{name}_index": rows, f"{name}_tokens": tokens[rows], f"{name}_labels": labels[rows]}
    return arrays | {"embedding": vectors(config.vectors, known), "classes": classes}


def write_twins(config: Data, path: Path) -> None:
    """A table of the documents of 20 Newsgroups whose text, stripped, stands under other labels, too.

    Columns: split, row (in that split), label, others (those labels, with a space between them), and trained (those of
    them under which it stands in the training set).
    """
    bodies, labels, _ = newsgroup_documents()
    places = {}
    for split, rows in newsgroup_split(config).items():
        for row, document in enumerate(rows):
            places.setdefault(bodies[document].strip(), []).append((split, row, int(labels[document])))
    table = []
    for same in places.values():
        for split, row, label in same:
            others = sorted({twin for _, _, twin in same} - {label})
            trained = sorted({twin for where, _, twin in same if where == "train"} - {label})
            if others:
                table.append([split, row, label, " ".join(map(str, others)), " ".join(map(str, trained))])
    with paths.atomic(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["split", "row", "label", "others", "trained"], *sorted(table)])


def trees(text: str, where: str) -> list[dict[str, list]]:
    """Binary trees in brackets, one a line, as lists: words, left, right and node_labels (0 to 4), see feed.Trees.

    A leaf is (label word), another node (label left right). ValueError, naming line and place, for anything else.
    """
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        tree, open_nodes, done = {"words": [], "left": [], "right": [], "node_labels": []}, [], []
        try:
            for part in re.findall(r"[()]|[^() \n]+", line):
                if part == "(":
                    open_nodes.append([])
                elif part != ")":
                    open_nodes[-1].append(part)
                else:
                    node = open_nodes.pop()
                    leaf = [type(part) for part in node] == [str, str]
                    if not leaf and [type(part) for part in node] != [str, int, int]:
                        raise ValueError("a node has not a label and one word, nor a label and two children")
                    label, *children = node
                    if label not in ("0", "1", "2", "3", "4"):
                        raise ValueError(f"'{label}' is no label from 0 to 4")
                    word, left, right = (children[0], -1, -1) if leaf else (None, *children)
                    for kind, value in zip(tree, (word, left, right, int(label)), strict=True):
                        tree[kind].append(value)
                    (open_nodes[-1] if open_nodes else done).append(len(tree["words"]) - 1)
            if open_nodes or len(done) != 1:
                raise ValueError("its brackets do not match")
        except (ValueError, IndexError) as problem:
            reason = problem if isinstance(problem, ValueError) else "its brackets do not match"
            raise ValueError(f"{where}, line {number}: no binary tree, since {reason}.") from None
        found.append(tree)
    return found


def plain(word: str) -> str:
    """A token of the Penn treebank as GloVe writes it: in lower case, without escapes."""
    word = word.lower().replace("\\/", "/").replace("\\*", "*")
    return ESCAPES.get(word, word)


def sst(config: Data) -> dict[str, np.ndarray]:
    """The Stanford Sentiment Treebank (Socher et al. 2013): parsed sentences of film reviews, each phrase labelled.

    Classes are negative (0 and 1 of five), neutral and positive (3 and 4). Sentences with a neutral root are left out;
    neutral phrases stay. The vocabulary is that of all sentences, case kept; words without a vector are drawn from
    N(-0.05, 0.05^2), as published. Arrays: those of feed.Trees by split; embedding; classes.
    """
    splits, content = {}, fetch.verified("sst")
    for name, file in (("train", "train"), ("val", "dev"), ("test", "test")):
        path = f"trees/{file}.txt"
        splits[name] = trees(content[f"{file}.txt"].decode("utf-8"), f"data/sst/{path}")
    tokens = [word for found in splits.values() for tree in found for word in tree["words"] if word is not None]
    number = {word: i for i, word in enumerate(dict.fromkeys(tokens))}
    to_class = np.array([0, 0, 1, 2, 2])
    arrays = {}
    for name, found in splits.items():
        kept = [tree for tree in found if tree["node_labels"][-1] != 2]
        size = getattr(config, name)
        if size > len(kept):
            raise ValueError(f"sst has {len(kept):,} sentences with an opinion in {name}; {name} {size} asks for more.")
        kept = kept[:size]
        arrays[f"{name}_first"] = np.cumsum([0, *(len(tree["words"]) for tree in kept)])
        numbers = [number[word] if word is not None else -1 for tree in kept for word in tree["words"]]
        arrays[f"{name}_words"] = np.array(numbers, np.int64)
        for kind in ("left", "right", "node_labels"):
            arrays[f"{name}_{kind}"] = np.array([value for tree in kept for value in tree[kind]], np.int64)
        arrays[f"{name}_node_labels"] = to_class[arrays[f"{name}_node_labels"]]
    draw = np.random.RandomState(config.seed)
    spelt = [plain(word) for word in number]
    embedding = vectors(config.vectors, spelt, lambda n: draw.normal(-0.05, 0.05, (n, DIMENSIONS)))
    return arrays | {"embedding": embedding, "classes": np.array(["negative", "neutral", "positive"])}


DATASETS = {"20newsgroups": newsgroups, "sst": sst}


def prepare(config: Data) -> dict[str, np.ndarray]:
    """The arrays of a text study's prepared.npz; masked (m,), the classes that are never predicted, if there are.

    ValueError, naming the array, if documents or their labels are not as ``feed.splits`` and the network need them.
    """
    if not config.vectors:
        raise ValueError(f"'vectors' must be one of {', '.join(VECTORS)}, got {config.vectors!r}.")
    arrays = {name: np.asarray(array) for name, array in DATASETS[config.dataset](config).items()}
    check(arrays, config)
    return arrays | ({"masked": np.array(config.masked)} if config.masked else {})


def check(arrays: dict[str, np.ndarray], config: Data) -> None:
    """ValueError, naming the array, if they are not what ``feed.splits`` and the networks take."""
    name = config.dataset
    trees = "train_first" in arrays
    kinds = ("words", "left", "right", "node_labels", "first") if trees else ("tokens", "labels")
    wanted = [*(f"{split}_{kind}" for split in ("train", "val", "test") for kind in kinds), "embedding", "classes"]
    if missing := [array for array in wanted if array not in arrays]:
        raise ValueError(f"{name}: '{missing[0]}' is missing; it gives: {', '.join(arrays) or 'nothing'}.")
    if (found := arrays["embedding"]).dtype != np.float32 or found.ndim != 2:
        raise ValueError(f"{name}: embedding must be float32 (words, D), got {found.dtype} {found.shape}.")
    if bad := [array for array in wanted[:-2] if arrays[array].dtype != np.int64]:
        raise ValueError(f"{name}: {bad[0]} must be int64, got {arrays[bad[0]].dtype}.")
    for split in ("train", "val", "test"):
        labels = arrays[f"{split}_{'node_labels' if trees else 'labels'}"]
        if labels.min() < 0 or labels.max() >= len(arrays["classes"]):
            found = f"{labels.min()}..{labels.max()}"
            raise ValueError(f"{name}: {split}'s labels must lie in 0..{len(arrays['classes']) - 1}, got {found}.")
        if not trees:
            tokens, size = arrays[f"{split}_tokens"], getattr(config, split)
            if tokens.ndim != 2 or len(tokens) != size or labels.shape != (size,):
                got = f"{tokens.shape} and {labels.shape}"
                raise ValueError(f"{name}: {split}_tokens and _labels must be ({size}, L) and ({size},), got {got}.")
            if ((tokens[:, :-1] != 0) & (tokens[:, 1:] == 0)).any():
                raise ValueError(f"{name}: {split}_tokens have a 0 behind a word; 0 is padding, and stands in front.")
