"""DVC's stages as a grid sees them: which match, which are not up to date, and entering what was run elsewhere."""

import fnmatch
import signal
from contextlib import contextmanager

import networkx
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, load_yaml

from compendium import paths


def matching(globs: list[str], in_clones: bool) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The stages that match, each with those it reads from; and all stages that they depend on.

    ValueError, in one sentence, if they make no grid; in_clones: also if they cannot run in a clone.
    """
    with Repo(str(paths.root())) as repo:
        graph, named = repo.index.graph, _named(repo)
        found = {name for glob in globs for name in fnmatch.filter(named, glob) if named[name].cmd}
        for glob in globs:
            if not fnmatch.filter(found, glob):
                raise ValueError(f"No stage matches '{glob}'; `dvc stage list` names all that params.yaml activates.")
        above = {name: {s.addressing for s in networkx.descendants(graph, named[name])} for name in found}
        for name in sorted(found):
            if within := above[name] & found:
                raise ValueError(f"{name} depends on {min(within)}, so they cannot run at once: run one grid each.")
            if in_clones and not all(out.use_cache and not out.persist for out in named[name].outs):
                raise ValueError(f"{name} writes files that are not in DVC's cache, so it can run here only.")
            if in_clones and not all(stage.cmd for stage in graph.successors(named[name])):
                raise ValueError(f"{name} reads data that only this folder has, so it can run here only.")
        before = [name for name in named if named[name].cmd and any(name in names for names in above.values())]
        return {n: tuple(s.addressing for s in graph.successors(named[n])) for n in named if n in found}, before


def outdated(names: list[str]) -> list[str]:
    """Those of the stages that dvc repro would not skip."""
    with Repo(str(paths.root()), _wait_for_lock=True) as repo, repo.lock:
        named = _named(repo)  # repo.status(targets) would read dvc.yaml anew for each
        return [name for name in names if named[name].status()]


def collect(entries: dict[str, dict]) -> tuple[list[str], list[str], list[str]]:
    """Enter into dvc.lock, all at once, what stages did in clones, and fetch their results from the cache.

    entries: stage -> its entry in the clone's dvc.lock. Returns the names of those entered; of those that were run
    with other settings, code or data than are here now, which are left alone; and of those entered that `dvc repro`
    would have to run again. Stages that are unknown or up to date here are none of them.
    """
    if not entries:
        return [], [], []
    root = paths.root()
    lock = root / "dvc.lock"
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:  # nobody else writes dvc.lock meanwhile
        named = _named(repo)
        entries = {name: entries[name] for name in entries if name in named and named[name].status()}
        before, entered, others = load_yaml(lock), [], []
        with ignoring(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            try:
                _write(lock, before | {"stages": before["stages"] | entries})
                with Repo(str(root)) as anew:  # sees the new entries
                    anew.lock = repo.lock
                    named = _named(anew)
                    others = [name for name in entries if named[name].changed_stage() or named[name].changed_deps()]
                    entered = [name for name in entries if name not in others]
                    for name in entered:
                        named[name].checkout(force=True)
            finally:
                _write(lock, before | {"stages": before["stages"] | {name: entries[name] for name in entered}})
    return entered, others, outdated(entered)


def _write(lock, content: dict) -> None:
    """dvc.lock, whole or not at all."""
    with paths.atomic(lock) as part:
        part.write_text(dumps_yaml(content), "utf-8")


@contextmanager
def ignoring(*numbers: int):
    """These signals, such as Ctrl-C's, are ignored meanwhile, also by a process that is started."""
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _named(repo: Repo) -> dict:
    """All stages of dvc.yaml by name."""
    return {stage.addressing: stage for stage in repo.index.stages}
