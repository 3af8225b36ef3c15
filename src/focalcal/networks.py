"""Networks by name. Each entry of ``NETWORKS`` makes a module from (num_classes, in_channels=3).

The classifier head is the last ``nn.Linear``; weight norms and gradient histograms are taken there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016), projected by 1x1 where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def small_resnet(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Three residual blocks of 16, 32 and 64 channels behind a stride-2 stem: 78 thousand parameters.

    The papers' networks in miniature (3x3 stem, no max-pool, batch normalisation, global average pooling,
    one linear head), sized so that a laptop trains it in seconds. The stride-2 stem is what makes it fast.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 32, 2),
        BasicBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


NETWORKS = {
    "small_resnet": small_resnet,
}


def make(name: str, num_classes: int, in_channels: int, seed: int) -> nn.Module:
    """The network called ``name`` with PyTorch's default initialisation drawn from ``seed`` (on the CPU)."""
    if name not in NETWORKS:
        raise ValueError(f"Unknown network '{name}'; choose one of: {', '.join(NETWORKS)}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"A seed must be a whole number, 0 or larger, got {seed!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](num_classes, in_channels).to(memory_format=torch.channels_last)


def head(model: nn.Module) -> nn.Linear:
    """The classifier: the last linear layer."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
