"""Images on their way to the network: splits kept on the device, augmentation, shuffled batches, noise."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviations of CIFAR-10-C's Gaussian noise


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
    """train, val and test on a device, from arrays named as in a prepared .npz.

    prepared: {split}_images, uint8 (N, H, W, C), and {split}_labels, int64 (N,); mean and std (C,) of pixels in
    [0, 1]; test_mean and test_std where the test set has its own.
    """
    found = {}
    for name in ("train", "val", "test"):
        statistics = (prepared["test_mean"], prepared["test_std"]) if name == "test" and "test_mean" in prepared else ()
        mean, std = statistics or (prepared["mean"], prepared["std"])
        found[name] = Split(prepared[f"{name}_images"], prepared[f"{name}_labels"], mean, std, on)
    return found


def gaussian_noise(images: np.ndarray, severity: int) -> np.ndarray:
    """uint8 images with the Gaussian noise of CIFAR-10-C (Hendrycks and Dietterich 2019), severity 1 to 5.

    x / 255 + N(0, s^2), clipped to [0, 1] and cut to whole numbers; the noise depends on the severity alone.
    """
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


def epoch_randomness(seed: int, epoch: int, n: int, padding: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Order (n,), crop offsets (n, 2) and flips (n,) of one epoch.

    Drawn on the CPU from (seed, epoch) alone: the same for every loss and device, whatever came before.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    return order, offsets, torch.rand(n, generator=generator) < 0.5


class Batches:
    """The shuffled, augmented, normalised batches of an epoch, the short last one included.

    What differs from batch to batch, the position included, lies in tensors on the device, so that a captured step
    draws the next batch every time it is replayed.
    """

    def __init__(self, split: Split, batch_size: int, augment: bool):
        n, on = len(split), split.labels.device
        self.split, self.augment = split, augment
        self.sizes = [min(batch_size, n - first) for first in range(0, n, batch_size)]
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

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """Images, float32 (size, C, H, W), and labels of the next batch."""
        at = self.first + torch.arange(size, device=self.first.device)
        chosen = self.order[at]
        images = self.split.images[chosen]
        if self.augment:
            images = crop_and_flip(images, self.offsets[at], self.flips[at])
        self.first += size
        return self.split.normalise(images), self.split.labels[chosen]
