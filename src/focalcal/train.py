"""One training loop for every loss and device. A ``Run`` is a training's state, ``train`` a generator of its rows:

    run = Run(model, loss, settings)
    for row in train(run, data, seed):
        print(row["epoch"], row["test_error"])

*exact* mode computes in float32 with deterministic kernels: a rerun on the same device gives the same bits. *fast*
mode computes the network in bfloat16 (weights, head, loss and evaluation stay in float32, on a GPU as TF32) and, on
a GPU, replays the whole step, batch and augmentation included, as a CUDA graph.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from focalcal import calibrate, devices, metrics, networks, optimizers
from focalcal.feed import Batches, Split

GRADIENT_FRACTIONS = (10 / 350, 100 / 350, 200 / 350)  # the papers' histograms: epochs 10, 100, 200 of 350
CPU_BATCH, GPU_BATCH = 250, 1000  # samples of an evaluation; on a CPU, larger ones fall out of its cache


@dataclass(frozen=True)
class Training:
    """How a network is trained. Raises ValueError, naming the setting first, for a value out of its range."""

    network: str  # a name in networks.NETWORKS
    epochs: int
    milestones: list[int]  # epochs, counted from 1, from which on learning_rate is 10 times lower
    batch_size: int  # samples
    learning_rate: float
    momentum: float  # of SGD, no Nesterov
    weight_decay: float
    reduction: Literal["sum", "mean", "per_document"]  # of the batch loss; per_document: a sum divided by batch_size
    clip: float | None  # largest gradient norm (L2, all parameters); None: as it comes
    augment: bool  # random crop after 4 pixels of zero padding, and horizontal flip
    optimizer: Literal["sgd", "adam", "adagrad"] = "sgd"
    embedding_learning_rate: float | None = None  # constant, of plain SGD on trained word vectors; None: as the rest
    select: Literal["last", "best"] = "last"  # epoch that is kept; best: the first of the highest validation accuracy
    drop_last: bool = False  # leave the short last batch of an epoch out
    mode: Literal["auto", "exact", "fast"] = "auto"  # auto: exact on a CPU, fast on a GPU
    compiled: bool = False  # by torch.compile, in fast mode
    threads: int | None = None  # of a CPU, on which the bytes of a result depend; None: as many as PyTorch takes
    evaluate_train_every: int = 1  # epochs between evaluations of the training set (and at the last)

    def __post_init__(self):
        for name in ("epochs", "batch_size", "evaluate_train_every", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}.")
        for name in ("learning_rate", "clip", "embedding_learning_rate", "momentum", "weight_decay"):
            value, zero = getattr(self, name), name in ("momentum", "weight_decay")
            if value is not None and (not 0 <= value < float("inf") or not (value or zero)):
                raise ValueError(f"{name} must be finite and {'0 or more' if zero else 'above 0'}, got {value!r}.")
        if any(not 1 <= milestone <= self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones must be epochs from 1 to {self.epochs}, got {self.milestones!r}.")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and (value := getattr(self, name)) not in (known := get_args(kind)):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> np.ndarray:
    """Logits (N, K), float32, in evaluation mode."""
    model.eval()
    size = CPU_BATCH if split.labels.device.type == "cpu" else GPU_BATCH
    parts = [model(split.batch(slice(first, first + size))).float() for first in range(0, len(split), size)]
    return torch.cat(parts).cpu().numpy()


def scored(model: nn.Module, split: Split) -> tuple:
    """What every metric takes: logits (N, K), labels (N,), classes that are never predicted."""
    return predict(model, split), split.labels.cpu().numpy(), split.masked


def gradient_epochs(epochs: int) -> list[int]:
    """Early, middle and late epoch at which gradient histograms are taken."""
    return sorted({max(1, round(fraction * epochs)) for fraction in GRADIENT_FRACTIONS})


class Run:
    """One training: its network, loss and optimiser, and what it has produced so far.

    loss: from losses.make. A loss may have ``start_epoch(epoch, epochs)``, ``update(confidence, correct)``
    (called after each epoch with the validation set) and ``log()`` (its moving parts, added to the row).
    name: begins the message where training diverges.
    history: rows as in history.csv; gradients: epoch -> networks.head_gradient_norms of the training set, (N,);
    predictions: val and test -> what ``scored`` gives, after the last epoch that was trained here; selected: the epoch
    whose weights count (settings.select), which train puts back into the model at the end.
    """

    def __init__(self, model: nn.Module, loss, settings: Training, name: str = "Training"):
        self.model, self.loss, self.settings, self.name = model, loss, settings, name
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.fast = settings.mode == "fast" or (settings.mode == "auto" and self.device.type == "cuda")
        self.forward = torch.compile(model, dynamic=False) if settings.compiled and self.fast else model
        if isinstance(loss, nn.Module):
            loss.to(self.device)
        self.optimizers = optimizers.make(model, settings)
        self.batch_losses = self.gradient_norms = torch.zeros(0)  # of the steps of an epoch
        self.history, self.gradients, self.predictions, self.best = [], {}, {}, {}

    @property
    def selected(self) -> int:
        """The epoch whose weights count, of those trained."""
        best = self.settings.select == "best"
        return 1 + int(np.argmin([row["val_error"] for row in self.history])) if best else len(self.history)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; writing into these tensors changes the run."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                state = optimizer.state.get(parameter, {})  # .state[parameter] would make an entry
                named |= {f"{kind}.{name}": tensor for kind, tensor in state.items()}
        if isinstance(self.loss, nn.Module):
            named |= {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        return named

    def start_epoch(self, epoch: int, steps: int) -> None:
        self.model.train()
        if hasattr(self.loss, "start_epoch"):
            self.loss.start_epoch(epoch, self.settings.epochs)
        self.optimizers[0].param_groups[0]["lr"] = self.settings.learning_rate_at(epoch)
        if len(self.batch_losses) != steps:
            self.batch_losses, self.gradient_norms = (torch.zeros(steps, device=self.device) for _ in range(2))

    def step(self, inputs, labels: Tensor, number: Tensor) -> None:
        """One step; loss and gradient norm are noted at ``number`` (1,). Nothing waits for the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            logits = self.forward(inputs)
        per_sample = self.loss(logits.float(), labels)
        batch_loss = per_sample.mean() if self.settings.reduction == "mean" else per_sample.sum()
        if self.settings.reduction == "per_document":  # a document may have many labels
            batch_loss = batch_loss / self.settings.batch_size
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        batch_loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
        self.gradient_norms.index_copy_(0, number, norm.detach()[None])
        self.batch_losses.index_copy_(0, number, per_sample.detach().mean()[None])

    def finish_epoch(self, epoch: int, data: dict[str, Split]) -> dict:
        """Evaluate, update the loss, and add the epoch's row to the history. Raises FloatingPointError."""
        if len(bad := (~self.batch_losses.isfinite()).nonzero()):
            became = f"the loss became {self.batch_losses[bad[0]].item()} in epoch {epoch}, step {bad[0].item() + 1}"
            raise self.diverged(became, epoch)
        row = {"epoch": epoch, "learning_rate": self.settings.learning_rate_at(epoch)}
        row["train_loss"] = self.batch_losses.mean().item()
        row["gradient_norm"] = self.gradient_norms.mean().item()
        row["weight_norm"] = networks.head(self.model).weight.norm().item()
        skip_train = epoch % self.settings.evaluate_train_every and epoch < self.settings.epochs
        for name, split in data.items():
            if name == "train" and skip_train:
                row |= {f"train_{key}": float("nan") for key in metrics.SUMMARY}
                continue
            found = scored(self.model, split)
            if not np.isfinite(found[0]).all():
                raise self.diverged(f"the logits of the {name} set are not finite after epoch {epoch}", epoch)
            row |= {f"{name}_{key}": value for key, value in metrics.summary(*found).items()}
            if name != "train":
                self.predictions[name] = found
        row |= calibrate.after_scaling(self.predictions["val"], self.predictions["test"])
        if epoch in gradient_epochs(self.settings.epochs):
            loss, size = copy.deepcopy(self.loss), self.settings.batch_size  # a copy, since a loss may count
            self.gradients[epoch] = networks.head_gradient_norms(self.model, data["train"], loss, size)
        if hasattr(self.loss, "update"):
            self.loss.update(*metrics.confidence_correct(*self.predictions["val"]))
        if hasattr(self.loss, "log"):
            row |= {name: float(value) for name, value in self.loss.log().items()}
        self.history.append(row)
        if self.settings.select == "best" and self.selected == epoch:
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return row

    def diverged(self, what: str, epoch: int) -> FloatingPointError:
        """To be raised where numbers stop being finite."""
        rate = self.settings.learning_rate_at(epoch)
        return FloatingPointError(f"{self.name}: {what}, at learning rate {rate:g}; lower it or clip, check the loss.")

    def finish(self) -> None:
        """Put the weights of the selected epoch into the model, once training is over."""
        if self.selected < len(self.history):
            self.model.load_state_dict(self.best)
            self.predictions = {}

    def state(self) -> dict[str, Tensor]:
        """A copy of what a checkpoint keeps, besides the history, on the CPU."""
        kept = self.tensors() | {f"best.{name}": tensor for name, tensor in self.best.items()}
        plain = {"device": "cpu", "memory_format": torch.contiguous_format}
        copied = {name: torch.empty_like(tensor, **plain).copy_(tensor) for name, tensor in kept.items()}
        return copied | {f"gradients.{epoch}": torch.from_numpy(norms) for epoch, norms in self.gradients.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], history: list[dict]) -> None:
        """Take up a saved state."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        saved = [name for name in state if name.startswith("gradients.")]
        self.gradients = {int(name.split(".")[1]): state[name].numpy() for name in saved}
        self.best = {name.removeprefix("best."): t.to(self.device) for name, t in state.items() if name[:5] == "best."}
        self.history = history


def take_step(runs: list[Run], batches: Batches, size: int, streams: list, dropout: int | None = None) -> None:
    """One step of every run on the same batch; on a GPU each on its stream, if there are several.

    dropout: what every run's dropout is seeded with, so that none depends on what is trained beside it; in a captured
    step, None, runs draw one after another.
    """
    inputs, labels = batches.next(size)
    main = torch.cuda.current_stream() if streams else None
    for run, stream in zip(runs, streams or [None] * len(runs), strict=True):
        if stream:
            stream.wait_stream(main)
        with torch.cuda.stream(stream) if stream else nullcontext():
            if dropout is not None:
                torch.manual_seed(dropout)
            run.step(inputs, labels, batches.number)
    for stream in streams:
        main.wait_stream(stream)
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

    Raises ValueError unless epochs, batches, augmentation, mode, threads and what is done already are the same for all.
    """
    settings, fast, on, done = runs[0].settings, runs[0].fast, runs[0].device, len(runs[0].history)
    names = ("epochs", "batch_size", "drop_last", "augment", "threads")
    if len({(*(getattr(run.settings, name) for name in names), run.fast, len(run.history)) for run in runs}) > 1:
        raise ValueError(f"Losses trained together need the same {', '.join(names)} and mode, and equal progress.")
    devices.set_numerics(fast, on, settings.threads)
    batches = Batches(data["train"], settings.batch_size, settings.augment, settings.drop_last)
    captured = fast and on.type == "cuda" and data["train"].fixed_shape
    streams = [torch.cuda.Stream() for _ in runs] if on.type == "cuda" and len(runs) > 1 else []
    graphs, rates = {}, None
    for epoch in range(done + 1, settings.epochs + 1):
        for run in runs:
            run.start_epoch(epoch, len(batches.sizes))
        batches.shuffle(seed, epoch)
        if captured and rates != [run.settings.learning_rate_at(epoch) for run in runs]:
            rates = [run.settings.learning_rate_at(epoch) for run in runs]  # constants of the graphs
            graphs.clear()  # and their memory
            graphs = capture(runs, batches, streams)
        torch.manual_seed(seed + 1_000_003 * epoch)  # of dropout in captured steps, which goes on from there
        for step, size in enumerate(batches.sizes, (epoch - 1) * len(batches.sizes)):
            dropout = seed + 1_000_003 * step
            graphs[size].replay() if graphs else take_step(runs, batches, size, streams, dropout)
        yield [run.finish_epoch(epoch, data) for run in runs]
    for run in runs:
        run.finish()


def train(run: Run, data: dict[str, Split], seed: int):
    """Train a run, from the epoch after its history on, and yield a row per epoch, as in history.csv.

    data: the splits train, val and test. A row holds metrics.summary of each as train_*, val_* and test_*, in
    evaluation mode after the epoch (train_* is NaN where settings.evaluate_train_every leaves it out), and
    calibrate.after_scaling; train_loss is the mean of the training steps' own losses, gradient_norm that of the norms
    before clipping; weight_norm is the norm of the head's matrix; then comes what the loss logs. Raises
    FloatingPointError if the loss stops being finite.
    """
    for (row,) in train_together([run], data, seed):
        yield row
