"""Samples on their way to the network: splits kept on the device, augmentation, shuffled batches, noise."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviations of CIFAR-10-C's Gaussian noise


class Split:
    """Samples of one split on a device: inputs (N, ...) and labels (N,), and what the network is given of them.

    As it stands, that is the inputs themselves, say tokens (N, L). masked: classes that are never predicted, see
    metrics.
    """

    fixed_shape = True  # batches of one size have one shape, as a captured step needs

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, on: torch.device, masked: tuple[int, ...] = ()):
        self.inputs, self.labels = torch.from_numpy(inputs).to(on), torch.from_numpy(labels).to(on)
        self.masked = masked

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, at):
        """What the network is given in evaluation of the samples ``at``, a slice or numbers (n,)."""
        return self.inputs[at]

    def training_batch(self, at: Tensor):
        """What the network is given in training, and labels."""
        return self.batch(at), self.labels[at]


class Images(Split):
    """Images, uint8 (N, H, W, C), kept as (N, C, H, W) and normalised batch by batch.

    mean, std: (C,), of pixel values in [0, 1]. Raises ValueError where their number is not that of the channels.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean, std, on: torch.device):
        if images.ndim != 4 or not images.shape[-1] == len(mean) == len(std):
            raise ValueError(f"Images must be (N, H, W, {len(mean)}), a mean and std per channel; got {images.shape}.")
        super().__init__(images, labels, on)
        self.inputs = self.inputs.permute(0, 3, 1, 2)
        scale = 255 * torch.as_tensor(std, dtype=torch.float32)
        self.scale = (1 / scale).view(-1, 1, 1).to(on)
        self.shift = (-torch.as_tensor(mean, dtype=torch.float32) * 255 / scale).view(-1, 1, 1).to(on)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (n, C, H, W) to float32, channels last in memory."""
        return (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)

    def batch(self, at) -> Tensor:
        return self.normalise(self.inputs[at])

    def training_batch(self, at: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None):
        """As of any split; offsets and flips of crop_and_flip augment."""
        images = self.inputs[at]
        if offsets is not None:
            images = crop_and_flip(images, offsets, flips)
        return self.normalise(images), self.labels[at]


class TreeBatch(NamedTuple):
    """The nodes of some binary trees, leaves first, then by rising height, so that children come before parents."""

    words: Tensor  # (leaves,) their word numbers
    left: Tensor  # (nodes - leaves,) of the others, the place of the left child among all nodes of the batch
    right: Tensor
    levels: list[int]  # how many nodes of height 1, 2, ... there are
    roots: Tensor  # (trees,) places of the roots, in the order asked for


class Trees(Split):
    """Binary trees whose every node has a label; a network is trained on the nodes and evaluated on the roots.

    words, left, right, node_labels: int64 (nodes,) of all trees one after another, children before parents and each
    root last; left and right count from the tree's first node and are -1 for a leaf, words is -1 for other nodes.
    first: int64 (N + 1,), where each tree starts, and the number of nodes. labels are those of the roots.
    """

    fixed_shape = False

    def __init__(self, words, left, right, node_labels, first, on: torch.device, masked: tuple[int, ...] = ()):
        super().__init__(first[:-1], node_labels[first[1:] - 1], on, masked)
        self.words, self.first, self.node_labels = words, first, torch.from_numpy(node_labels)
        offset = np.repeat(first[:-1], np.diff(first))
        self.left, self.right = left + offset, right + offset  # only read where there are children
        self.height = np.zeros(len(words), np.int64)
        for node in np.flatnonzero(words < 0):  # children come before parents
            self.height[node] = 1 + max(self.height[self.left[node]], self.height[self.right[node]])

    def _nodes(self, at: Tensor) -> tuple[TreeBatch, np.ndarray]:
        """The batch, and its nodes' numbers among all nodes of the split."""
        trees, on = at.cpu().numpy(), self.labels.device
        nodes = np.concatenate([np.arange(self.first[tree], self.first[tree + 1]) for tree in trees])
        nodes = nodes[np.argsort(self.height[nodes], kind="stable")]
        place = np.empty(len(self.words), np.int64)
        place[nodes] = np.arange(len(nodes))
        inner = nodes[self.height[nodes] > 0]
        found = self.words[nodes[: len(nodes) - len(inner)]], place[self.left[inner]], place[self.right[inner]]
        words, left, right, roots = (torch.from_numpy(x).to(on) for x in (*found, place[self.first[trees + 1] - 1]))
        return TreeBatch(words, left, right, np.bincount(self.height[nodes])[1:].tolist(), roots), nodes

    def batch(self, at) -> TreeBatch:
        return self._nodes(torch.arange(len(self))[at])[0]

    def training_batch(self, at: Tensor):
        """The trees, and the labels of their nodes, in the order of the batch."""
        batch, nodes = self._nodes(at)
        return batch, self.node_labels[nodes].to(self.labels.device)


def splits(prepared, on: torch.device) -> dict[str, Split]:
    """train, val and test on a device, from arrays named as in a prepared .npz, each with the split's name in front.

    Images: _images, uint8 (N, H, W, C), and _labels, int64 (N,); mean and std (C,) of pixels in [0, 1]; test_mean
    and test_std where the test set has its own. Documents: _tokens, int64 (N, L), and _labels. Trees: _words, _left,
    _right, _node_labels and _first, see ``Trees``. masked (m,), where there are such classes.
    """
    found, masked = {}, tuple(prepared["masked"].tolist()) if "masked" in prepared else ()
    for name in ("train", "val", "test"):
        if f"{name}_tokens" in prepared:
            found[name] = Split(prepared[f"{name}_tokens"], prepared[f"{name}_labels"], on, masked)
        elif f"{name}_first" in prepared:
            arrays = [prepared[f"{name}_{kind}"] for kind in ("words", "left", "right", "node_labels", "first")]
            found[name] = Trees(*arrays, on, masked)
        else:
            own = "test_" if name == "test" and "test_mean" in prepared else ""
            statistics = prepared[f"{own}mean"], prepared[f"{own}std"]
            found[name] = Images(prepared[f"{name}_images"], prepared[f"{name}_labels"], *statistics, on)
    return found


def gaussian_noise(images: np.ndarray, severity: int) -> np.ndarray:
    """uint8 images with the Gaussian noise of CIFAR-10-C (Hendrycks and Dietterich 2019), severity 1 to 5.

    x / 255 + N(0, s^2), clipped to [0, 1] and cut to whole numbers; the noise depends on the severity alone.
    """
    if not isinstance(severity, int) or not 1 <= severity <= 5:
        raise ValueError(f"severity must be a whole number from 1 to 5, got {severity!r}.")
    noise = np.random.default_rng(severity).normal(0, SEVERITIES[severity - 1], images.shape).astype(np.float32)
    return (np.clip(images / np.float32(255) + noise, 0, 1) * 255).astype(np.uint8)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by offsets (n, 2) - padding pixels, zeros moving in, and mirrored where flips (n,)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    samples = torch.arange(n, device=images.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def epoch_randomness(seed: int, epoch: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order (n,), crop offsets (n, 2) and flips (n,) of one epoch.

    Drawn on the CPU from (seed, epoch) alone: the same for every loss and device, whatever came before.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 9, (n, 2), generator=generator)  # 4 pixels of padding on either side
    return order, offsets, torch.rand(n, generator=generator) < 0.5


class Batches:
    """The shuffled, augmented batches of an epoch, with or without the short last one.

    What differs from batch to batch, the position included, lies in tensors on the device, so that a captured step
    draws the next batch every time it is replayed.
    """

    def __init__(self, split: Split, batch_size: int, augment: bool, drop_last: bool = False):
        if augment and not isinstance(split, Images):
            raise ValueError("Only images can be augmented; set augment to false.")
        n, on = len(split), split.labels.device
        self.split, self.augment = split, augment
        self.sizes = [min(batch_size, n - first) for first in range(0, n, batch_size)]
        if drop_last and self.sizes and self.sizes[-1] < batch_size:
            self.sizes.pop()
        if not self.sizes:
            raise ValueError(f"{n} samples give no batch of {batch_size}; lower batch_size, or drop_last to false.")
        self.order, self.offsets, self.flips = (t.to(on) for t in epoch_randomness(0, 0, n))
        self.first, self.number = (torch.zeros(1, dtype=torch.long, device=on) for _ in range(2))

    def shuffle(self, seed: int, epoch: int) -> None:
        """Start an epoch."""
        drawn = epoch_randomness(seed, epoch, len(self.order))
        for mine, new in zip((self.order, self.offsets, self.flips), drawn, strict=True):
            mine.copy_(new)
        self.rewind()

    def rewind(self) -> None:
        """Back to the first batch."""
        self.first.zero_()
        self.number.zero_()

    def next(self, size: int) -> tuple:
        """What the network is given of the next ``size`` samples, and labels."""
        at = self.first + torch.arange(size, device=self.first.device)
        chosen = self.order[at]
        random = (self.offsets[at], self.flips[at]) if self.augment else ()
        self.first += size
        return self.split.training_batch(chosen, *random)
