"""Trainings of a study: from params.yaml to the files of a run, for chapter 2 and for `compendium train`."""

import copy
import csv
import ctypes
import hashlib
import inspect
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from compendium import checkpoints, paths, settings
from focalcal import calibrate, devices, feed, losses, metrics, networks, optimizers, text, train
from focalcal.feed import Images, Split
from focalcal.train import Run, Training

# With this module, what decides a result.
CODE = calibrate, checkpoints, devices, feed, losses, metrics, networks, optimizers, text, train


class Job(NamedTuple):
    """One training as params.yaml describes it."""

    study: str
    loss: str
    seed: int
    settings: Training
    loss_settings: dict


def job(study: str, loss: str, seed: int) -> Job:
    """The settings of one training, read and checked; ValueError in one sentence, see settings."""
    return Job(study, loss, seed, *settings.training(study, loss))


def new_run(job: Job, prepared: dict[str, np.ndarray], on: torch.device) -> Run:
    """Initial weights and loss of a training; prepared: the arrays of the study's prepared.npz."""
    if "embedding" in prepared:
        of = torch.from_numpy(prepared["embedding"])
        words = max(prepared[name].max() for name in prepared if name.endswith(("_tokens", "_words")))
        if words >= len(of):
            raise ValueError(f"A word of study '{job.study}' has number {words}, but there are {len(of)} word vectors.")
    else:
        of = len(prepared["mean"])
    classes = len(prepared["classes"])
    model = networks.make(job.settings.network, classes, of, job.seed).to(on)
    return Run(model, new_loss(job, classes), job.settings, job.loss)


def new_loss(job: Job, classes: int):
    """The loss of a training, tried on two samples; ValueError for one that ``train`` could not do justice to."""
    loss = losses.make(job.loss, **job.loss_settings)
    function = losses.LOSSES[job.loss_settings.get("function", job.loss)]
    if taken := sorted(set(inspect.signature(function).parameters) & set(settings.names(Training))):
        raise ValueError(f"Loss '{job.loss}': training has a setting '{taken[0]}', too; give the loss's another name.")
    if isinstance(loss, nn.Module) and list(loss.parameters()):
        raise ValueError(f"Loss '{job.loss}' has parameters, and nothing here trains them; make them buffers.")
    shape = tuple(copy.deepcopy(loss)(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long)).shape)
    if shape != (2,):
        raise ValueError(f"Loss '{job.loss}' must give one number per sample, (2,) for two; it gives {shape}.")
    return loss


def complete(jobs: list[Job], runs: list[Run], data: dict[str, Split], prepared: dict[str, np.ndarray]) -> None:
    """Train the runs together to their end and save them; what was interrupted before goes on where it was.

    data: feed.splits of prepared. Runs of one study and seed; a bar shows how far they are. Raises FloatingPointError
    if a loss stops being finite, and RuntimeError if another process trains one of them.
    """
    begun, first = time.perf_counter(), jobs[0]
    keep_memory()
    devices.set_numerics(runs[0].fast, runs[0].device, first.settings.threads)
    with ExitStack() as claims:
        folders = []
        for job in jobs:
            claimed = checkpoints.claim(job.study, job.loss, job.seed, key(job, runs[0].device))
            folders.append(claims.enter_context(claimed))
        checkpoints.resume(runs, folders)
        done = len(runs[0].history)
        rows = checkpoints.keep(train.train_together(runs, data, first.seed), runs, folders)
        label = f"{first.study} {' '.join(job.loss for job in jobs)} {first.seed}"
        for _ in progress(rows, done, first.settings.epochs, len(runs) * len(data["train"]), label):
            pass
        for job, run in zip(jobs, runs, strict=True):
            shifted = predict_shifted(run.model, prepared, run.device)
            save(job, run, predictions(run, data), shifted, time.perf_counter() - begun, done)


def keep_memory() -> None:
    """Let glibc's malloc reuse up to 1 GiB of freed memory, where it would return it to the system at every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            for size in (1 << 25, 1 << 30):  # an older glibc refuses the second and keeps the first
                libc.mallopt(threshold, size)


def progress(rows, done: int, epochs: int, samples: int, label: str):
    """Pass train_together's rows on while showing the first run's epoch, loss, error, samples/s and time left."""
    bar = tqdm(rows, label, epochs, initial=done, file=sys.stderr, unit="epoch", mininterval=1, dynamic_ncols=True)
    last = time.perf_counter()
    for row in bar:
        now = time.perf_counter()
        shown = {"loss": f"{row[0]['train_loss']:.3f}", "val error": f"{row[0]['val_error']:.1%}"}
        bar.set_postfix(shown | {"samples/s": f"{samples / max(now - last, 1e-3):,.0f}"}, refresh=False)
        last = now
        yield row


def key(job: Job, on: torch.device) -> str:
    """A hash of all that decides a training's result: settings, data, code, versions, device, threads."""
    digest = hashlib.sha256()
    threads = torch.get_num_threads() if on.type == "cpu" else 0
    what = [asdict(job.settings), job.loss_settings, job.seed, torch.__version__, np.__version__, on.type, threads]
    digest.update(json.dumps(what).encode())
    for file in (*(Path(module.__file__) for module in CODE), Path(__file__), paths.prepared(job.study)):
        with open(paths.existing(file), "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def predictions(run: Run, data: dict[str, Split]) -> dict[str, tuple]:
    """What train.scored gives of val and test after the selected epoch, anew unless that is the last trained here."""
    return run.predictions or {name: train.scored(run.model, data[name]) for name in ("val", "test")}


def predict_shifted(model, prepared: dict[str, np.ndarray], on: torch.device) -> dict[str, np.ndarray]:
    """Logits, float16 (N, K), of what the model was not trained on: the study's data sets from elsewhere (name) and
    the test images under Gaussian noise of the five severities (noise1 ... noise5). Nothing, for texts."""
    if "test_images" not in prepared:
        return {}
    scale = [prepared.get(f"test_{name}", prepared[name]) for name in ("mean", "std")]
    images = {name.removeprefix("shifted_"): prepared[name] for name in prepared if name.startswith("shifted_")}
    images |= {f"noise{level}": feed.gaussian_noise(prepared["test_images"], level) for level in range(1, 6)}
    none = np.zeros(0, np.int64)
    return {name: train.predict(model, Images(x, none, *scale, on)).astype(np.float16) for name, x in images.items()}


def provenance(on: torch.device) -> dict:
    """Where and with what something is computed: commit, and whether src or params.yaml differ from it, versions,
    device, CPU, threads."""

    def git(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=paths.root(), capture_output=True, text=True)

    commit = git("rev-parse", "HEAD").stdout.strip() or None if shutil.which("git") else None
    changed = commit and git("diff", "--quiet", "HEAD", "--", "src", "params.yaml").returncode
    return {
        "commit": f"{commit}, with changes" if changed else commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else f"{on.type}, {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """The CPU's name, as Linux gives it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def save(job: Job, run: Run, logits, shifted, seconds: float, done: int) -> None:
    """Write a finished training: history.csv, logits.npz, gradients.npz, shifted.npz, weights and provenance.

    logits: split -> what train.scored gives; shifted: see predict_shifted; seconds: since the (last) start, which
    went on after ``done`` epochs; 0 if nothing had interrupted it.
    Provenance already there is kept if settings and results are the same, the latter byte for byte.
    """
    folder, study_folder = paths.run(job.study, job.loss, job.seed), paths.study(job.study)
    results = (folder / "history.csv", folder / "logits.npz")
    before = [path.read_bytes() for path in results if path.is_file()]
    with paths.atomic(folder / "history.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, run.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.9g}" for name, value in row.items()} for row in run.history)
    arrays = {f"{split}_logits": pair[0] for split, pair in logits.items()}
    arrays |= {f"{split}_labels": pair[1] for split, pair in logits.items()}
    if masked := logits["test"][2]:
        arrays["masked"] = np.array(masked)
    paths.write_npz(folder / "logits.npz", **arrays, epoch=np.array(run.selected))
    marks = sorted(run.gradients)
    norms = np.stack([run.gradients[epoch] for epoch in marks])
    paths.write_npz(folder / "gradients.npz", epochs=np.array(marks), norms=norms)
    if shifted:
        paths.write_npz(folder / "shifted.npz", **shifted)
    with paths.atomic(study_folder / "models" / f"{job.loss}-{job.seed}.safetensors") as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in run.model.state_dict().items()}, part)
    record = study_folder / "provenance" / f"{job.loss}-{job.seed}.json"
    resolved = {"settings": asdict(job.settings), "loss_settings": job.loss_settings}
    try:
        recorded = json.loads(record.read_text())
    except (OSError, ValueError):  # none yet, or damaged
        recorded = {}
    if resolved.items() <= recorded.items() and before == [path.read_bytes() for path in results]:
        return  # the same results again, say from a notebook run by hand: DVC need not see a change
    cuda = run.device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated(run.device) if cuda else resident
    ran = {"wall_seconds": round(seconds, 1), "resumed_after_epoch": done, "peak_memory_mb": round(memory / 1e6)}
    with paths.atomic(record) as part:
        part.write_text(json.dumps(provenance(run.device) | ran | resolved, indent=2) + "\n")


def read_prepared(study: str) -> dict[str, np.ndarray]:
    """The arrays of the study's prepared.npz; ValueError if sizes, mean or std are not those of params.yaml."""
    prepared, config = paths.read_npz(paths.prepared(study)), settings.data(study)
    for split in ("train", "val", "test"):
        trees = f"{split}_first" in prepared
        size = len(prepared[f"{split}_first"]) - 1 if trees else len(prepared[f"{split}_labels"])
        if size != (wanted := getattr(config, split)):
            raise ValueError(
                f"{paths.prepared(study)} has {size} {split} samples, params.yaml asks for {wanted}; "
                f"`python -m compendium data --prepare {study}` makes it anew."
            )
    for name in ("mean", "std", "test_mean", "test_std"):
        if (given := getattr(config, name)) is not None and not np.array_equal(prepared.get(name), given):
            raise ValueError(
                f"{paths.prepared(study)} has another {name} than params.yaml; "
                f"`python -m compendium data --prepare {study}` makes it anew."
            )
    return prepared


def train_jobs(study: str, names: list[str], seed: int) -> None:
    """Train these losses of a study outside the pipeline, at the same time and on the same batches."""
    on, jobs = devices.device(), [job(study, loss, seed) for loss in names]
    prepared = read_prepared(study)
    runs = [new_run(job, prepared, on) for job in jobs]
    complete(jobs, runs, feed.splits(prepared, on), prepared)
    for loss in names:
        print(f"Finished: {paths.run(study, loss, seed)}")
