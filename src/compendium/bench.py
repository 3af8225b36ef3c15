"""How fast training and metrics are on this machine, beside the loops they replace.

Writes figures/bench.csv and figures/bench.png. Every comparison is made in one run, one variant after the other, and
the median of several repetitions is kept; absolute numbers hold for the machine and the moment, ratios travel.
"""

import os
import shutil
import statistics
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from compendium import paths, settings, trainings
from focalcal import calibrate, devices, feed, losses, metrics, networks, plots, train
from focalcal.train import Training

BATCH = 128
SHAPES = {"small_resnet": (28, 1)}  # height and width, and channels; the others are for 32x32 in colour


def synchronize(on: torch.device) -> None:
    if on.type != "cpu":
        torch.accelerator.synchronize(on)


def median_seconds(work, repetitions: int, on: torch.device) -> float:
    """Median time of one call, after one that does not count."""
    times = []
    for _ in range(repetitions + 1):
        synchronize(on)
        start = time.perf_counter()
        work()
        synchronize(on)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Pictures(Dataset):
    """What torchvision's data sets do: an array, made a PIL image, made a tensor, for each sample."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i].squeeze())), int(self.labels[i])


def stock_epoch(model: nn.Module, loader: DataLoader, config: Training, on: torch.device):
    """A function training one epoch as tutorials and published code do; PyTorch's default precision."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def epoch():
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(on), labels.to(on)
            loss = F.cross_entropy(model(images), labels, reduction=config.reduction)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
            optimizer.step()
            total += loss.item()
        return total

    return epoch


def stock_speed(name: str, images, labels, config: Training, on: torch.device) -> float:
    """Images per second of the stock loop: torchvision's PIL transforms, DataLoader, .item() each step."""
    from torchvision import transforms

    size, channels = images.shape[1], images.shape[3]
    steps = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()] if config.augment else []
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * channels, [0.25] * channels)]
    workers = min(8, os.cpu_count() or 1)
    pictures = Pictures(images, labels, transforms.Compose(steps))
    loader = DataLoader(
        pictures, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, pin_memory=on.type == "cuda"
    )
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, False
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False  # PyTorch's defaults
    model = networks.NETWORKS[name](10, channels).to(on)
    return len(labels) / median_seconds(stock_epoch(model, loader, config, on), 3, on)


def engine_speed(name: str, images, labels, config: Training, on: torch.device, count=1, graph=False) -> float:
    """Images per second of our step, ``count`` models at a time (all their images counted)."""
    channels = images.shape[3]
    split = feed.Images(images, labels, [0.5] * channels, [0.25] * channels, on)
    batches = feed.Batches(split, config.batch_size, config.augment)
    runs = [
        train.Run(networks.make(name, 10, channels, seed).to(on), losses.make("cross_entropy"), config)
        for seed in range(count)
    ]
    devices.set_numerics(runs[0].fast, runs[0].device, config.threads)
    for run in runs:
        run.start_epoch(1, len(batches.sizes))
    streams = [torch.cuda.Stream() for _ in runs] if on.type == "cuda" and count > 1 else []
    graphs = train.capture(runs, batches, streams) if graph else {}

    def epoch():
        batches.rewind()
        for size in batches.sizes:
            if graphs:
                graphs[size].replay()
            else:
                train.take_step(runs, batches, size, streams)

    return count * len(labels) / median_seconds(epoch, 3, on)


def step_cost(name: str, shape: tuple[int, int]) -> tuple[float, float]:
    """Operations and least bytes (two per number) of training on one image: forward, and twice that for backward.

    Operations are counted by PyTorch; bytes are inputs and outputs of every layer, each moved once.
    """
    size, channels = shape
    model, moved = networks.NETWORKS[name](10, channels).eval(), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, inputs, output: moved.append(inputs[0].numel() + output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    return 3 * counter.get_total_flops(), 3 * 2 * sum(moved)


def ceilings(on: torch.device) -> tuple[float, float]:
    """Measured peaks: operations per second of a matrix product (bfloat16 on a GPU), bytes per second of a copy."""
    n, kind = (8192, torch.bfloat16) if on.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=on, dtype=kind) for _ in range(2))
    product = median_seconds(lambda: a @ b, 5, on)
    big = torch.randn(2**28 if on.type == "cuda" else 2**25, device=on)
    copy = median_seconds(lambda: big.clone(), 5, on)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what follows is the trainings' own
    return 2 * n**3 / product, 2 * big.numel() * 4 / copy


def training_rows(names: list[str], on: torch.device) -> list[dict]:
    """Images per second of every variant; on a GPU also the roofline and the peak memory."""
    rows, cuda, rng = [], on.type == "cuda", np.random.default_rng(0)
    rate, bandwidth = ceilings(on) if cuda else (None, None)
    protocol = settings.params()["shared"]["protocol"] | {"batch_size": BATCH, "learning_rate": 1e-4}
    for name in names:
        size, channels = SHAPES.get(name, (32, 3))
        images_in_epoch = (200 if cuda else 35 if name == "small_resnet" else 4) * BATCH
        images = rng.integers(0, 256, (images_in_epoch, size, size, channels)).astype(np.uint8)
        data = name, images, rng.integers(0, 10, images_in_epoch)
        protocol |= {"network": name, "augment": name != "small_resnet"}
        exact = Training(**protocol | {"mode": "exact"})
        speeds = {"stock loop": stock_speed(*data, exact, on), "exact": engine_speed(*data, exact, on)}
        if cuda:
            fast, compiled = (Training(**protocol | {"mode": "fast", "compiled": how}) for how in (False, True))
            speeds["fast, eager"] = engine_speed(*data, fast, on)
            speeds["fast"] = engine_speed(*data, fast, on, graph=True)
            if any(map(shutil.which, ("gcc", "clang"))):  # Triton builds a small library
                speeds["fast, compiled"] = engine_speed(*data, compiled, on, graph=True)
            speeds["fast, two at a time"] = engine_speed(*data, fast, on, count=2, graph=True)
            operations, moved = step_cost(name, (size, channels))
            speeds["roofline"] = 1 / max(operations / rate, moved / bandwidth)
        for variant, speed in speeds.items():
            print(f"{name}, {variant}: {speed:,.0f} images/s", flush=True)
            rows.append({"what": name, "variant": variant, "value": speed, "unit": "images/s"})
            rows[-1]["ratio"] = speed / speeds["stock loop"]
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 1e9
        for what, value, unit in (
            ("matrix product", rate / 1e9, "Gop/s"),
            ("copy", bandwidth / 1e9, "GB/s"),
            ("peak memory", memory, "GB"),
        ):
            rows.append({"what": "machine", "variant": what, "value": value, "unit": unit})
    return rows


def looped_ece(confidence: torch.Tensor, correct: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """ECE as the published codes have it: a loop over the bins that asks each for its share of the samples."""
    total = torch.zeros(())
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = confidence.gt(low.item()) & confidence.le(high.item())
        share = inside.float().mean()
        if share.item() > 0:
            total += (confidence[inside].mean() - correct[inside].float().mean()).abs() * share
    return total


def looped_metrics(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """ECE, adaptive ECE and classwise ECE by loops over bins and classes."""
    probs = F.softmax(logits, dim=1)
    confidence, predicted = probs.max(dim=1)
    correct, edges = predicted == labels, torch.linspace(0, 1, metrics.BINS + 1)
    mass = torch.from_numpy(metrics.equal_mass_edges(confidence.numpy()))
    classwise = sum(looped_ece(probs[:, k], labels == k, edges) for k in range(logits.shape[1])) / logits.shape[1]
    errors = looped_ece(confidence, correct, edges), looped_ece(confidence, correct, mass), classwise
    return [error.item() for error in errors]


def looped_temperatures(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The papers' loop: NLL and ECE at each of a hundred temperatures, the best of either."""
    edges, best = torch.linspace(0, 1, metrics.BINS + 1), {"nll": (np.inf, 0.0), "ece": (np.inf, 0.0)}
    for temperature in calibrate.GRID:
        scaled = logits / temperature
        confidence, predicted = F.softmax(scaled, dim=1).max(dim=1)
        scores = {"nll": F.cross_entropy(scaled, labels), "ece": looped_ece(confidence, predicted == labels, edges)}
        best = {name: min(best[name], (score.item(), temperature)) for name, score in scores.items()}
    return best["nll"][1], best["ece"][1]


def metric_rows() -> list[dict]:
    """Milliseconds of metrics and temperatures at 10,000 x 100 logits, all on the CPU."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng, cpu = np.random.default_rng(0), torch.device("cpu")
    labels = rng.integers(0, 100, 10_000)
    logits = 2.5 * (rng.normal(size=(10_000, 100)) + 4 * rng.random((10_000, 1)) * np.eye(100)[labels])
    logits = logits.astype(np.float32)
    pair = torch.from_numpy(logits), torch.from_numpy(labels)

    def ours():
        return [metric(logits, labels) for metric in (metrics.ece, metrics.adaptive_ece, metrics.classwise_ece)]

    np.testing.assert_allclose(looped_metrics(*pair), ours(), atol=2e-5)
    work = {
        ("ECE, AdaECE, classwise ECE", "stock loop"): lambda: looped_metrics(*pair),
        ("ECE, AdaECE, classwise ECE", "focalcal"): ours,
        ("ECE", "torchmetrics"): lambda: multiclass_calibration_error(pair[0].softmax(dim=1), pair[1], 100, n_bins=15),
        ("ECE", "focalcal"): lambda: metrics.ece(logits, labels),
        ("temperatures by NLL and ECE", "stock loop"): lambda: looped_temperatures(*pair),
        ("temperatures by NLL and ECE", "focalcal"): lambda: calibrate.temperatures(logits, labels),
    }
    rows = []
    for (what, variant), function in work.items():
        rows.append({"what": what, "variant": variant, "value": 1000 * median_seconds(function, 7, cpu), "unit": "ms"})
        first = next(row for row in rows if row["what"] == what)
        rows[-1]["ratio"] = first["value"] / rows[-1]["value"]
        print(f"{what}, {variant}: {rows[-1]['value']:.1f} ms", flush=True)
    return rows


def draw(table: pd.DataFrame, machine: str) -> None:
    """figures/bench.png: how many times as fast as the first variant of its group each one is."""
    from matplotlib import pyplot as plt

    shown = table[table.ratio.notna()]
    with plt.rc_context(plots.THEME):
        figure, ax = plt.subplots(figsize=(7.5, 0.32 * len(shown) + 0.8), layout="constrained")
        names = [f"{what}: {variant}" for what, variant in zip(shown.what, shown.variant, strict=True)]
        colors = [
            "#BBBBBB" if ratio == 1 else "#CCCC88" if "roof" in v else "#3377BB"
            for ratio, v in zip(shown.ratio, shown.variant, strict=True)
        ]
        ax.barh(names, shown.ratio - 1, left=1, color=colors)
        ax.axvline(1, color="#444444", linewidth=1)
        for y, row in enumerate(shown.itertuples()):
            note = f"{row.ratio:.1f}x  ({row.value:,.0f} {row.unit})"
            ax.text(1.05 * max(1, row.ratio), y, note, verticalalignment="center", fontsize=8)
        ax.set(xscale="log", xlabel="times as fast", title=machine, xlim=(0.7, 4 * shown.ratio.max()))
        plots.plain_log(ax.xaxis)
        ax.invert_yaxis()
        with paths.atomic(paths.root() / "figures" / "bench.png") as part:
            figure.savefig(part, format="png", bbox_inches="tight")
        plt.close(figure)


def bench(names: list[str] | None = None) -> None:
    """Measure these networks (by default two that fit the device) and the metrics; write table and picture."""
    on = devices.device()
    names = names or (["resnet50", "resnet20"] if on.type == "cuda" else ["small_resnet", "resnet20"])
    for name in names:
        networks.make(name, 10, 3, 0)  # a bad name shows now
    made = trainings.provenance(on)
    machine = f"{made['device']}, {made['threads']} CPU threads, torch {made['torch']}"
    rows = training_rows(names, on) + metric_rows()
    table = pd.DataFrame(rows).round({"value": 3, "ratio": 3}).assign(machine=machine)
    paths.save_table(table, paths.root() / "figures", "bench", index=False)
    draw(table, machine)
    print(f"\n{machine}\n{table.drop(columns='machine').to_string(index=False)}")
    print("\nfigures/bench.csv, figures/bench.png")
