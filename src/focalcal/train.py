"""One training loop for every loss and device. Training is a generator of history rows:

for row in train(model, data, loss, settings, seed):
    history.append(row)
"""

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from focalcal import metrics, networks, paths
from focalcal.settings import Training

GRADIENT_FRACTIONS = (10 / 350, 100 / 350, 200 / 350)  # the papers' histograms: epochs 10, 100, 200 of 350
EVAL_BATCH = 250  # samples; larger batches fall out of a CPU cache


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


class Split:
    """Images and labels of one split on a device, kept as uint8 (N, C, H, W) and normalised batch by batch.

    mean, std: per channel, of pixel values in [0, 1].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean, std, on: torch.device):
        self.images = torch.from_numpy(images).to(on).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).to(on)
        scale = 255 * torch.as_tensor(std, dtype=torch.float32)
        self.scale = (1 / scale).view(-1, 1, 1).to(on)
        self.shift = (-torch.as_tensor(mean, dtype=torch.float32) * 255 / scale).view(-1, 1, 1).to(on)

    def __len__(self) -> int:
        return len(self.labels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (n, C, H, W) to float32, channels last in memory."""
        return (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


def splits(prepared, on: torch.device) -> dict[str, Split]:
    """train, val and test of a prepared .npz (see data.prepare) on a device."""
    mean, std = prepared["mean"], prepared["std"]
    return {s: Split(prepared[f"{s}_images"], prepared[f"{s}_labels"], mean, std, on) for s in ("train", "val", "test")}


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by offsets (n, 2) - padding pixels, zeros moving in, and mirrored where flips (n,)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    samples = torch.arange(n, device=images.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def epoch_randomness(seed: int, epoch: int, n: int, padding: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Order (n,), crop offsets (n, 2) and flips (n,) of one epoch.

    Drawn on the CPU from (seed, epoch) alone: the same for every loss and device, whatever came before.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    return order, offsets, torch.rand(n, generator=generator) < 0.5


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> np.ndarray:
    """Logits (N, K), float32, in evaluation mode."""
    model.eval()
    batches = split.images.split(EVAL_BATCH)
    return torch.cat([model(split.normalise(batch)).float() for batch in batches]).cpu().numpy()


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


def epoch_batches(split: Split, settings: Training, seed: int, epoch: int, model: nn.Module):
    """Shuffled, augmented, normalised batches of one epoch, the short last one included."""
    model.train()
    order, offsets, flips = (t.to(split.labels.device) for t in epoch_randomness(seed, epoch, len(split)))
    for index in order.split(settings.batch_size):
        images = split.images[index]
        if settings.augment:
            images = crop_and_flip(images, offsets[index], flips[index])
        yield split.normalise(images), split.labels[index]


def check_finite(batch_losses: Tensor, epoch: int, settings: Training) -> None:
    """Raise FloatingPointError naming the step if a batch loss (steps,) is NaN or infinite."""
    bad = (~batch_losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].item()
        raise FloatingPointError(
            f"The loss became {batch_losses[step].item()} in epoch {epoch}, step {step + 1}, at learning rate "
            f"{settings.learning_rate_at(epoch):g}; lower learning_rate or clip, or look at the loss function."
        )


def train(model: nn.Module, data: dict[str, Split], loss, settings: Training, seed: int):
    """Train ``model`` in place with SGD and yield one dictionary per epoch, in the order of history.csv.

    loss: from losses.make. A loss may have ``start_epoch(epoch, epochs)``, ``update(confidence, correct)``
    (called after each epoch with the validation set) and ``log()`` (its moving parts, added to the row).
    train_*, val_*, test_* are metrics.summary of the split in evaluation mode after the epoch;
    gradient_norm is the mean over steps of the norm before clipping; weight_norm that of the head's matrix.
    Raises FloatingPointError if the loss stops being finite.
    """
    train_set, parameters = data["train"], list(model.parameters())
    on = train_set.labels.device
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if isinstance(loss, nn.Module):
        loss.to(on)
    optimizer = torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    for epoch in range(1, settings.epochs + 1):
        if hasattr(loss, "start_epoch"):
            loss.start_epoch(epoch, settings.epochs)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(epoch)
        batch_losses, gradient_norms = [], []
        for images, labels in epoch_batches(train_set, settings, seed, epoch, model):
            per_sample = loss(model(images).float(), labels)
            batch_loss = per_sample.sum() if settings.reduction == "sum" else per_sample.mean()
            optimizer.zero_grad()
            batch_loss.backward()
            gradient_norms.append(nn.utils.clip_grad_norm_(parameters, settings.clip))
            optimizer.step()
            batch_losses.append(per_sample.detach().mean())
        batch_losses = torch.stack(batch_losses)
        check_finite(batch_losses, epoch, settings)

        row = {"epoch": epoch, "learning_rate": settings.learning_rate_at(epoch)}
        row["train_loss"] = batch_losses.mean().item()
        row["gradient_norm"] = torch.stack(gradient_norms).mean().item()
        row["weight_norm"] = networks.head(model).weight.norm().item()
        for name, split in data.items():
            logits, labels = predict(model, split), split.labels.cpu().numpy()
            row |= {f"{name}_{key}": float(value) for key, value in metrics.summary(logits, labels).items()}
            if name == "val" and hasattr(loss, "update"):
                confidence, correct = metrics.confidence_correct(logits, labels)
                loss.update(torch.from_numpy(confidence), torch.from_numpy(correct).float())
        if hasattr(loss, "log"):
            row |= loss.log()
        yield row


def progress(rows, settings: Training, images: int, label: str, file=None):
    """Pass history rows on while showing epoch, loss, error, images/s (evaluation included) and time left."""
    bar = tqdm(rows, label, settings.epochs, file=file or sys.stderr, unit="epoch", mininterval=1, dynamic_ncols=True)
    start = time.perf_counter()
    for row in bar:
        speed = images * row["epoch"] / (time.perf_counter() - start)
        state = {
            "loss": f"{row['train_loss']:.3f}",
            "val error": f"{row['val_error']:.1%}",
            "images/s": f"{speed:,.0f}",
        }
        bar.set_postfix(state, refresh=False)
        yield row


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


def save(study: str, loss: str, seed: int, model: nn.Module, history, logits, gradients, seconds: float) -> None:
    """Write a finished training: history.csv, logits.npz, gradients.npz, weights and provenance.

    history: rows of ``train``; logits: split -> ((N, K) float32, (N,) int64); gradients: (epochs, norms (epochs, N)).
    Provenance already there is kept if the results are the same, byte for byte.
    """
    folder, study_folder = paths.run(study, loss, seed), paths.study(study)
    results = (folder / "history.csv", folder / "logits.npz")
    before = [path.read_bytes() for path in results if path.is_file()]
    with paths.atomic(folder / "history.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in history)
    arrays = {f"{split}_logits": pair[0] for split, pair in logits.items()}
    paths.write_npz(folder / "logits.npz", **arrays, **{f"{split}_labels": pair[1] for split, pair in logits.items()})
    paths.write_npz(folder / "gradients.npz", epochs=np.array(gradients[0]), norms=gradients[1])
    with paths.atomic(study_folder / "models" / f"{loss}-{seed}.safetensors") as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, part)
    record = study_folder / "provenance" / f"{loss}-{seed}.json"
    if record.is_file() and before == [path.read_bytes() for path in results]:
        return  # the same results again, say from a notebook run by hand: DVC need not see a change
    with paths.atomic(record) as part:
        part.write_text(json.dumps(provenance(seconds, next(model.parameters()).device), indent=2) + "\n")
