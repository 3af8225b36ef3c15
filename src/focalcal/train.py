"""One training loop for every loss and device. A ``Run`` is a training's state, ``train`` a generator of its rows:

    run = Run(model, loss, settings)
    for row in train(run, data, seed):
        print(row["epoch"], row["test_error"])

*exact* mode computes in float32 with deterministic kernels: a rerun on the same device gives the same bits. *fast*
mode computes the network in bfloat16 (weights, head, loss and evaluation stay in float32, on a GPU as TF32) and, on
a GPU, replays the whole step, batch and augmentation included, as a CUDA graph.
"""

import os
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from focalcal import calibrate, metrics, networks  # noqa: E402
from focalcal.feed import Batches, Split  # noqa: E402

GRADIENT_FRACTIONS = (10 / 350, 100 / 350, 200 / 350)  # the papers' histograms: epochs 10, 100, 200 of 350
CPU_BATCH, GPU_BATCH = 250, 2500  # samples of an evaluation; on a CPU, larger ones fall out of its cache


@dataclass(frozen=True)
class Training:
    """How a network is trained. Raises ValueError, naming the setting first, for a value out of its range."""

    network: str  # a name in networks.NETWORKS
    epochs: int
    milestones: list[int]  # epochs, counted from 1, from which on the learning rate is 10 times lower
    batch_size: int  # samples
    learning_rate: float  # of SGD
    momentum: float  # no Nesterov
    weight_decay: float
    reduction: Literal["sum", "mean"]  # of the batch loss
    clip: float  # largest gradient norm (L2, all parameters)
    augment: bool  # random crop after 4 pixels of zero padding, and horizontal flip
    mode: Literal["auto", "exact", "fast"] = "auto"  # auto: exact on a CPU, fast on a GPU
    compiled: bool = False  # by torch.compile, in fast mode
    threads: int | None = None  # of a CPU, on which the bytes of a result depend; None: as many as PyTorch takes
    evaluate_train_every: int = 1  # epochs between evaluations of the training set (and at the last)

    def __post_init__(self):
        for name in ("epochs", "batch_size", "evaluate_train_every", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}.")
        for name, zero in (("learning_rate", False), ("clip", False), ("momentum", True), ("weight_decay", True)):
            if not 0 <= (value := getattr(self, name)) < float("inf") or not (value or zero):
                raise ValueError(f"{name} must be finite and {'0 or more' if zero else 'above 0'}, got {value!r}.")
        if any(not 1 <= milestone <= self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones must be epochs from 1 to {self.epochs}, got {self.milestones!r}.")
        for name, known in (("reduction", ("sum", "mean")), ("mode", ("auto", "exact", "fast"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


def device() -> torch.device:
    """cuda, mps or cpu, the first that is there; the environment variable FOCALCAL_DEVICE overrides."""
    wanted = os.environ.get("FOCALCAL_DEVICE", "auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name, ok in there.items() if ok]
    if wanted == "auto":
        return torch.device(usable[0])
    if wanted.split(":")[0] not in usable:
        raise ValueError(
            f"FOCALCAL_DEVICE is '{wanted}', which this machine does not have; use auto, {', '.join(usable)}."
        )
    return torch.device(wanted)


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> np.ndarray:
    """Logits (N, K), float32, in evaluation mode."""
    model.eval()
    batches = split.images.split(CPU_BATCH if split.images.device.type == "cpu" else GPU_BATCH)
    return torch.cat([model(split.normalise(batch)).float() for batch in batches]).cpu().numpy()


def gradient_epochs(epochs: int) -> list[int]:
    """Early, middle and late epoch at which gradient histograms are taken."""
    return sorted({max(1, round(fraction * epochs)) for fraction in GRADIENT_FRACTIONS})


class Run:
    """One training: its network, loss and optimiser, and what it has produced so far.

    loss: from losses.make. A loss may have ``start_epoch(epoch, epochs)``, ``update(confidence, correct)``
    (called after each epoch with the validation set) and ``log()`` (its moving parts, added to the row).
    history: rows as in history.csv; gradients: epoch -> networks.head_gradient_norms of the training set, (N,);
    predictions: val and test -> logits (N, K) and labels (N,) after the last epoch that was trained here.
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
        self.history, self.gradients, self.predictions = [], {}, {}

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
            pair = predict(self.model, split), split.labels.cpu().numpy()
            row |= {f"{name}_{key}": value for key, value in metrics.summary(*pair).items()}
            if name != "train":
                self.predictions[name] = pair
        row |= calibrate.after_scaling(self.predictions["val"], self.predictions["test"])
        if hasattr(self.loss, "update"):
            self.loss.update(*metrics.confidence_correct(*self.predictions["val"]))
        if hasattr(self.loss, "log"):
            row |= self.loss.log()
        if epoch in gradient_epochs(self.settings.epochs):
            size = self.settings.batch_size
            self.gradients[epoch] = networks.head_gradient_norms(self.model, data["train"], self.loss, size)
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


def set_numerics(settings: Training, fast: bool, on: torch.device) -> None:
    """Process-wide switches of PyTorch: deterministic float32, or TF32 and the fastest kernels; CPU threads."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not fast, fast
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast
    if on.type == "cuda":
        torch.use_deterministic_algorithms(not fast, warn_only=True)


def take_step(runs: list[Run], batches: Batches, size: int, streams: list) -> None:
    """One step of every run on the same batch; on a GPU each on its stream, if there are several."""
    images, labels = batches.next(size)
    if streams:
        main = torch.cuda.current_stream()
        for run, stream in zip(runs, streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                run.step(images, labels, batches.number)
        for stream in streams:
            main.wait_stream(stream)
    else:
        for run in runs:
            run.step(images, labels, batches.number)
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


def train_together(runs: list[Run], data: dict[str, Split], seed: int):
    """Train several runs on the same batches; yields one list of rows per epoch, see ``train``.

    Raises ValueError unless epochs, batch size, augmentation, mode and what is done already are the same for all.
    """
    settings, fast, on, done = runs[0].settings, runs[0].fast, runs[0].device, len(runs[0].history)
    shared = {(r.settings.epochs, r.settings.batch_size, r.settings.augment, r.fast, len(r.history)) for r in runs}
    if len(shared) > 1:
        raise ValueError(
            "Losses trained together need the same epochs, batch_size, augment and mode, and equal progress."
        )
    set_numerics(settings, fast, on)
    batches = Batches(data["train"], settings.batch_size, settings.augment)
    streams = [torch.cuda.Stream() for _ in runs] if on.type == "cuda" and len(runs) > 1 else []
    graphs, rates = {}, None
    for epoch in range(done + 1, settings.epochs + 1):
        for run in runs:
            run.start_epoch(epoch, len(batches.sizes))
        batches.shuffle(seed, epoch)
        if fast and on.type == "cuda" and rates != [run.settings.learning_rate_at(epoch) for run in runs]:
            rates = [run.settings.learning_rate_at(epoch) for run in runs]  # constants of the graphs
            graphs = capture(runs, batches, streams)
        for size in batches.sizes:
            graphs[size].replay() if graphs else take_step(runs, batches, size, streams)
        yield [run.finish_epoch(epoch, data) for run in runs]


def train(run: Run, data: dict[str, Split], seed: int):
    """Train a run with SGD, from the epoch after its history on, and yield a row per epoch, as in history.csv.

    data: the splits train, val and test. A row holds metrics.summary of each as train_*, val_* and test_*, in
    evaluation mode after the epoch (train_* is NaN where settings.evaluate_train_every leaves it out), and
    calibrate.after_scaling; train_loss is the mean of the training steps' own losses, gradient_norm that of the norms
    before clipping; weight_norm is the norm of the head's matrix; then comes what the loss logs. Raises
    FloatingPointError if the loss stops being finite.
    """
    for (row,) in train_together([run], data, seed):
        yield row
