"""One training loop for every loss and device. A ``Run`` is a training's state, ``train`` a generator of its rows:

    run = Run(model, loss, settings)
    for row in train(run, data, seed):
        print(row["epoch"], row["test_error"])

*exact* mode computes in float32 with deterministic kernels: a rerun on the same device gives the same bits. *fast*
mode computes the network in bfloat16 (weights, head, loss and evaluation stay in float32, on a GPU as TF32) and, on
a GPU, replays the whole step, batch and augmentation included, as a CUDA graph.

    python -m focalcal.train STUDY LOSS [LOSS ...] [--seed 0]

trains outside the pipeline, several losses at a time on the same batches, and leaves what the pipeline would leave.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from focalcal import checkpoints, feed, losses, metrics, networks, paths, settings  # noqa: E402
from focalcal.feed import Batches, Split, gaussian_noise, splits  # noqa: E402
from focalcal.settings import Training  # noqa: E402

GRADIENT_FRACTIONS = (10 / 350, 100 / 350, 200 / 350)  # the papers' histograms: epochs 10, 100, 200 of 350
EVALUATION_BATCH = {"cpu": 250}  # samples; larger ones fall out of a CPU cache


def device() -> torch.device:
    """cuda, mps or cpu, the first that is there; the environment variable FOCALCAL_DEVICE overrides."""
    wanted = os.environ.get("FOCALCAL_DEVICE", "auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, usable in there.items() if usable))
    if not there.get(wanted.split(":")[0]):
        usable = ", ".join(name for name, ok in there.items() if ok)
        raise ValueError(f"FOCALCAL_DEVICE is '{wanted}', which this machine does not have; use auto, {usable}.")
    return torch.device(wanted)


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> np.ndarray:
    """Logits (N, K), float32, in evaluation mode."""
    model.eval()
    batches = split.images.split(EVALUATION_BATCH.get(split.images.device.type, 2500))
    return torch.cat([model(split.normalise(batch)).float() for batch in batches]).cpu().numpy()


def predicted(model: nn.Module, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K), float32, and labels (N,), int64, of a split."""
    return predict(model, split), split.labels.cpu().numpy()


def predict_shifted(model: nn.Module, prepared, on: torch.device) -> dict[str, np.ndarray]:
    """Logits, float16 (N, K), of what the model was not trained on: the study's data sets from elsewhere (name) and
    the test images under Gaussian noise of the five severities (noise1 ... noise5)."""
    scale = [prepared.get(f"test_{name}", prepared[name]) for name in ("mean", "std")]
    images = {name.removeprefix("shifted_"): prepared[name] for name in prepared if name.startswith("shifted_")}
    images |= {f"noise{level}": gaussian_noise(prepared["test_images"], level) for level in range(1, 6)}
    none = np.zeros(0, np.int64)
    return {name: predict(model, Split(x, none, *scale, on)).astype(np.float16) for name, x in images.items()}


def head_gradient_norms(model: nn.Module, split: Split, loss, batch_size: int) -> np.ndarray:
    """Norm of each sample's loss gradient with respect to the head's weight matrix, (N,) float32.

    That gradient is the outer product of d loss / d logits and the features, so its norm is the product of
    theirs; the model is in evaluation mode. batch_size matters for losses that couple the samples of a batch.
    """
    model.eval()
    features, norms = [], []
    hook = networks.head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
            with torch.no_grad():
                logits = model(split.normalise(images)).float()
            logits.requires_grad_()
            (slope,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
            norms.append(slope.norm(dim=1) * features.pop().float().norm(dim=1))
    finally:
        hook.remove()
    return torch.cat(norms).detach().cpu().numpy()


def gradient_epochs(epochs: int) -> list[int]:
    """Early, middle and late epoch at which gradient histograms are taken."""
    return sorted({max(1, round(fraction * epochs)) for fraction in GRADIENT_FRACTIONS})


class Run:
    """One training: its network, loss and optimiser, and what it has produced so far.

    loss: from losses.make. A loss may have ``start_epoch(epoch, epochs)``, ``update(confidence, correct)``
    (called after each epoch with the validation set) and ``log()`` (its moving parts, added to the row).
    history: rows as in history.csv; gradients: epoch -> head_gradient_norms of the training set, (N,).
    """

    def __init__(self, model: nn.Module, loss, settings: Training):
        self.model, self.loss, self.settings = model, loss, settings
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.fast = settings.mode == "fast" or (settings.mode == "auto" and self.device.type == "cuda")
        self.forward = torch.compile(model) if settings.compiled and self.fast else model
        if isinstance(loss, nn.Module):
            loss.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda" or None,
        )
        for parameter in self.parameters:  # as after a step without gradient: what is saved has one form at any time
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.batch_losses = self.gradient_norms = torch.zeros(0)  # of the steps of an epoch
        self.history, self.gradients = [], {}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; writing into these tensors changes the run."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            named[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        if isinstance(self.loss, nn.Module):
            named |= {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        return named

    def start_epoch(self, epoch: int, steps: int) -> None:
        self.model.train()
        if hasattr(self.loss, "start_epoch"):
            self.loss.start_epoch(epoch, self.settings.epochs)
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate_at(epoch)
        if len(self.batch_losses) != steps:
            self.batch_losses, self.gradient_norms = (torch.zeros(steps, device=self.device) for _ in range(2))

    def step(self, images: Tensor, labels: Tensor, number: Tensor) -> None:
        """One step of SGD; loss and gradient norm are noted at ``number`` (1,). Nothing waits for the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            logits = self.forward(images)
        per_sample = self.loss(logits.float(), labels)
        batch_loss = per_sample.sum() if self.settings.reduction == "sum" else per_sample.mean()
        self.optimizer.zero_grad()
        batch_loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.gradient_norms.index_copy_(0, number, norm.detach()[None])
        self.batch_losses.index_copy_(0, number, per_sample.detach().mean()[None])

    def finish_epoch(self, epoch: int, data: dict[str, Split]) -> dict:
        """Evaluate, update the loss, and add the epoch's row to the history. Raises FloatingPointError."""
        check_finite(self.batch_losses, epoch, self.settings)
        row = {"epoch": epoch, "learning_rate": self.settings.learning_rate_at(epoch)}
        row["train_loss"] = self.batch_losses.mean().item()
        row["gradient_norm"] = self.gradient_norms.mean().item()
        row["weight_norm"] = networks.head(self.model).weight.norm().item()
        skip_train = epoch % self.settings.evaluate_train_every and epoch < self.settings.epochs
        for name, split in data.items():
            if name == "train" and skip_train:
                row |= {f"train_{key}": float("nan") for key in metrics.SUMMARY}
                continue
            logits, labels = predicted(self.model, split)
            row |= {f"{name}_{key}": float(value) for key, value in metrics.summary(logits, labels).items()}
            if name == "val" and hasattr(self.loss, "update"):
                confidence, correct = metrics.confidence_correct(logits, labels)
                self.loss.update(torch.from_numpy(confidence), torch.from_numpy(correct).float())
        if hasattr(self.loss, "log"):
            row |= self.loss.log()
        if epoch in gradient_epochs(self.settings.epochs):
            size = self.settings.batch_size
            self.gradients[epoch] = head_gradient_norms(self.model, data["train"], self.loss, size)
        self.history.append(row)
        return row

    def state(self) -> dict[str, Tensor]:
        """A copy of what a checkpoint keeps, besides the history, on the CPU."""
        copied = {
            name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
            for name, t in self.tensors().items()
        }
        return copied | {f"gradients.{epoch}": torch.from_numpy(norms) for epoch, norms in self.gradients.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], history: list[dict]) -> None:
        """Take up a saved state."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        saved = [name for name in state if name.startswith("gradients.")]
        self.gradients = {int(name.split(".")[1]): state[name].numpy() for name in saved}
        self.history = history


def check_finite(batch_losses: Tensor, epoch: int, settings: Training) -> None:
    """Raise FloatingPointError naming the step if a batch loss (steps,) is NaN or infinite."""
    bad = (~batch_losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].item()
        raise FloatingPointError(
            f"The loss became {batch_losses[step].item()} in epoch {epoch}, step {step + 1}, at learning rate "
            f"{settings.learning_rate_at(epoch):g}; lower learning_rate or clip, or look at the loss function."
        )


def resume(runs: list[Run], folders: list) -> int:
    """Restore all runs to the newest epoch of which every one has an undamaged checkpoint; that epoch, or 0."""
    found = [checkpoints.epochs(folder) for folder in folders]
    for epoch in sorted(set.intersection(*map(set, found)), reverse=True):
        saved = [checkpoints.read(paths_of[epoch]) for paths_of in found]
        if all(saved):
            for run, (state, history) in zip(runs, saved, strict=True):
                run.restore(state, history)
            return epoch
    return 0


def set_numerics(fast: bool, on: torch.device) -> None:
    """Process-wide switches of PyTorch: deterministic float32, or TF32 and the fastest kernels."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not fast, fast
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast
    if on.type == "cuda":
        torch.use_deterministic_algorithms(not fast, warn_only=True)


def take_step(runs: list[Run], batches: Batches, size: int, streams: list) -> None:
    """One step of every run on the same batch; on a GPU each on its stream, if there are several."""
    images, labels = batches.next(size)
    if not streams:
        for run in runs:
            run.step(images, labels, batches.number)
    for run, stream in zip(runs, streams, strict=False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run.step(images, labels, batches.number)
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    batches.number += 1


def capture(runs: list[Run], batches: Batches, streams: list) -> dict:
    """The step as a CUDA graph for each batch size; runs and batches are left as they were."""
    before = [(tensor, tensor.clone()) for run in runs for tensor in run.tensors().values()]
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for size in 3 * sorted(set(batches.sizes)):  # lets cuDNN choose, and lazy parts start
            batches.rewind()
            take_step(runs, batches, size, streams)
    torch.cuda.current_stream().wait_stream(warm_up)
    graphs = {size: torch.cuda.CUDAGraph() for size in set(batches.sizes)}
    pool = torch.cuda.graph_pool_handle()
    for size, graph in graphs.items():
        batches.rewind()
        with torch.cuda.graph(graph, pool=pool):
            take_step(runs, batches, size, streams)
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
    batches.rewind()
    return graphs


def train_together(runs: list[Run], data: dict[str, Split], seed: int, folders=()):
    """Train several runs on the same batches; yields one list of rows per epoch, see ``train``.

    Epochs, batch size, augmentation and mode must be the same for all. folders: one for each run's checkpoints.
    """
    shared = {(r.settings.epochs, r.settings.batch_size, r.settings.augment, r.fast) for r in runs}
    if len(shared) > 1:
        raise ValueError("Losses trained together need the same epochs, batch_size, augment and mode.")
    (epochs, _, _, fast), on = shared.pop(), runs[0].device
    set_numerics(fast, on)
    batches = Batches(data["train"], runs[0].settings)
    streams = [torch.cuda.Stream() for _ in runs] if on.type == "cuda" and len(runs) > 1 else []
    graphs, rates, written = {}, None, []
    done = resume(runs, folders) if folders else 0
    for epoch in range(done):
        yield [run.history[epoch] for run in runs]
    with ThreadPoolExecutor(1) as writer:
        for epoch in range(done + 1, epochs + 1):
            for run in runs:
                run.start_epoch(epoch, len(batches.sizes))
            batches.shuffle(seed, epoch)
            if fast and on.type == "cuda" and rates != [run.settings.learning_rate_at(epoch) for run in runs]:
                rates = [run.settings.learning_rate_at(epoch) for run in runs]  # constants of the graphs
                graphs = capture(runs, batches, streams)
            for size in batches.sizes:
                if graphs:
                    graphs[size].replay()
                else:
                    take_step(runs, batches, size, streams)
            rows = [run.finish_epoch(epoch, data) for run in runs]
            for result in written:
                result.result()  # raises what went wrong while writing
            written = [
                writer.submit(checkpoints.write, folder, epoch, run.state(), list(run.history))
                for run, folder in zip(runs, folders, strict=False)
            ]
            yield rows
        for result in written:
            result.result()


def train(run: Run, data: dict[str, Split], seed: int, folder=None):
    """Train a run with SGD and yield one dictionary per epoch, in the order of history.csv.

    train_*, val_*, test_* are metrics.summary of the split in evaluation mode after the epoch (train_* is NaN where
    settings.evaluate_train_every leaves it out); train_loss is the mean of the training steps' own losses,
    gradient_norm that of the norms before clipping; weight_norm is the norm of the head's matrix.
    folder: from checkpoints.claim; every epoch is saved there, and what is already saved there is not trained
    again: its rows come first. Raises FloatingPointError if the loss stops being finite.
    """
    for (row,) in train_together([run], data, seed, [folder] if folder else []):
        yield row


def progress(rows, settings: Training, images: int, label: str, file=None):
    """Pass history rows on while showing epoch, loss, error, images/s (evaluation included) and time left."""
    bar = tqdm(rows, label, settings.epochs, file=file or sys.stderr, unit="epoch", mininterval=1, dynamic_ncols=True)
    last = time.perf_counter()
    for row in bar:
        now = time.perf_counter()
        state = {
            "loss": f"{row['train_loss']:.3f}",
            "val error": f"{row['val_error']:.1%}",
            "images/s": f"{images / max(now - last, 1e-3):,.0f}",
        }
        last = now
        bar.set_postfix(state, refresh=False)
        yield row


def configuration(study: str, loss: str, seed: int, on: torch.device) -> str:
    """A hash of all that decides a training's result: settings, data, code, versions, device, threads."""
    digest = hashlib.sha256()
    config, special = settings.training(study, loss)
    threads = torch.get_num_threads() if on.type == "cpu" else 0
    what = [config.model_dump_json(), special, seed, torch.__version__, np.__version__, on.type, threads]
    digest.update(json.dumps(what).encode())
    for module in (feed, losses, metrics, networks, sys.modules[__name__]):
        with open(module.__file__, "rb") as file:
            digest.update(file.read())
    with open(paths.existing(paths.prepared(study)), "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def provenance(seconds: float, on: torch.device) -> dict:
    """Where and how a training ran: commit, versions, device, threads, wall time in s, peak memory in MB."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.root(), capture_output=True, text=True)
    cuda = on.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(on) if cuda else f"{on.type}, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "wall_seconds": round(seconds, 1),
        "peak_memory_mb": round((torch.cuda.max_memory_allocated(on) if cuda else resident) / 1e6),
    }


def save(study: str, loss: str, seed: int, run: Run, logits, shifted, seconds: float) -> None:
    """Write a finished training: history.csv, logits.npz, gradients.npz, shifted.npz, weights and provenance.

    logits: split -> ((N, K) float32, (N,) int64); shifted: see predict_shifted; seconds: since the (last) start.
    Provenance already there is kept if the results are the same, byte for byte.
    """
    folder, study_folder = paths.run(study, loss, seed), paths.study(study)
    results = (folder / "history.csv", folder / "logits.npz")
    before = [path.read_bytes() for path in results if path.is_file()]
    with paths.atomic(folder / "history.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, run.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in run.history)
    arrays = {f"{split}_logits": pair[0] for split, pair in logits.items()}
    paths.write_npz(folder / "logits.npz", **arrays, **{f"{split}_labels": pair[1] for split, pair in logits.items()})
    marks = sorted(run.gradients)
    norms = np.stack([run.gradients[epoch] for epoch in marks])
    paths.write_npz(folder / "gradients.npz", epochs=np.array(marks), norms=norms)
    paths.write_npz(folder / "shifted.npz", **shifted)
    with paths.atomic(study_folder / "models" / f"{loss}-{seed}.safetensors") as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in run.model.state_dict().items()}, part)
    record = study_folder / "provenance" / f"{loss}-{seed}.json"
    if record.is_file() and before == [path.read_bytes() for path in results]:
        return  # the same results again, say from a notebook run by hand: DVC need not see a change
    with paths.atomic(record) as part:
        part.write_text(json.dumps(provenance(seconds, run.device), indent=2) + "\n")


def start(study: str, loss: str, seed: int, prepared, on: torch.device) -> Run:
    """The run that the study's settings describe, not trained yet."""
    config, special = settings.training(study, loss)
    model = networks.make(config.network, len(prepared["classes"]), len(prepared["mean"]), seed).to(on)
    return Run(model, losses.make(loss, **special), config)


def main(arguments=None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m focalcal.train", description="Train outside the pipeline.")
    parser.add_argument("study")
    parser.add_argument("loss", nargs="+", help="trained at the same time, on the same batches")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        on, begun = device(), time.perf_counter()
        prepared = paths.read_npz(paths.prepared(given.study))
        runs, data = [start(given.study, loss, given.seed, prepared, on) for loss in given.loss], splits(prepared, on)
        with ExitStack() as claims:
            keys = [configuration(given.study, loss, given.seed, on) for loss in given.loss]
            folders = [
                claims.enter_context(checkpoints.claim(given.study, loss, given.seed, key))
                for loss, key in zip(given.loss, keys, strict=True)
            ]
            rows = (rows[0] for rows in train_together(runs, data, given.seed, folders))
            images = len(runs) * len(data["train"])
            for _ in progress(rows, runs[0].settings, images, f"{given.study} {' '.join(given.loss)} {given.seed}"):
                pass
            for loss, run in zip(given.loss, runs, strict=True):
                logits = {name: predicted(run.model, data[name]) for name in ("val", "test")}
                shifted = predict_shifted(run.model, prepared, on)
                save(given.study, loss, given.seed, run, logits, shifted, time.perf_counter() - begun)
                print(f"Finished: {paths.run(given.study, loss, given.seed)}")
    except (ValueError, RuntimeError, OSError, FloatingPointError) as problem:
        sys.exit(f"focalcal: {problem}")


if __name__ == "__main__":
    main()
