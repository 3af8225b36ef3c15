"""Networks by name. Each entry of ``NETWORKS`` makes a module from (num_classes, in_channels=3), those of text (see
``text``) from (num_classes, embedding).

The classifier head is the last ``nn.Linear``; weight norms and gradient histograms are taken there. Those of images end
in average pooling to a fixed size, so any input from 28x28 upwards fits.
Sources: [M] the code published with Mukhoti et al., NeurIPS 2020; [H] He et al., CVPR 2016; [Z] Zagoruyko and
Komodakis, BMVC 2016; [D] Huang et al., CVPR 2017.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """The classifier: a linear layer that keeps its weights' precision under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut [H], projected by 1x1 where the shape changes."""

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


def _three_stages(num_classes: int, in_channels: int, width: int, blocks: int, stem_stride: int = 1) -> nn.Sequential:
    """A 3x3 stem of 16 channels, then stages of width, 2 width and 4 width channels, each of so many blocks."""
    stem = [nn.Conv2d(in_channels, 16, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    channels, body = 16, []
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            body.append(BasicBlock(channels, width << stage, stride))
            channels = width << stage
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Head(channels, num_classes))


def small_resnet(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Three residual blocks of 16, 32 and 64 channels behind a stride-2 stem: 78 thousand parameters.

    The papers' networks in miniature (3x3 stem, no max-pool, batch normalisation, global average pooling,
    one linear head), sized so that a laptop trains it in seconds. The stride-2 stem is what makes it fast.
    """
    return _three_stages(num_classes, in_channels, width=16, blocks=1, stem_stride=2)


def resnet20(num_classes: int, in_channels: int = 3) -> nn.Module:
    """The CIFAR ResNet-20 of [H], with projected shortcuts: 0.27 million parameters."""
    return _three_stages(num_classes, in_channels, width=16, blocks=3)


def wide_resnet26_10(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Wide-ResNet-26-10 of [M] (after [Z], but normalised after each convolution): 36.5 million parameters."""
    model = _three_stages(num_classes, in_channels, width=160, blocks=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # [M]
    return model


def _bottleneck_resnet(layers: list[int], num_classes: int, in_channels: int, pooled: int = 1):
    """torchvision's ResNet with a 3x3 stem of stride 1 and no max-pool, as [M] uses for small images."""
    from torchvision.models import resnet  # slow to import, so only where it is used

    model = resnet.ResNet(resnet.Bottleneck, layers)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.avgpool = nn.AdaptiveAvgPool2d(pooled)
    model.fc = Head(model.fc.in_features * pooled**2, num_classes)
    return model


def _default_initialisation(model: nn.Module) -> nn.Module:
    """The model with PyTorch's own initialisation of convolutions, as in [M], instead of torchvision's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


def resnet50(num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-50 [H] for small images, as in [M]: 23.5 million parameters."""
    return _default_initialisation(_bottleneck_resnet([3, 4, 6, 3], num_classes, in_channels))


def resnet110(num_classes: int, in_channels: int = 3) -> nn.Module:
    """What [M] calls ResNet-110: bottleneck blocks [3, 4, 26, 3], not the CIFAR network of [H]."""
    return _default_initialisation(_bottleneck_resnet([3, 4, 26, 3], num_classes, in_channels))


def resnet50_tiny_imagenet(num_classes: int, in_channels: int = 3) -> nn.Module:
    """The ResNet-50 that [M] uses on Tiny-ImageNet: pooled to 2x2, and initialised after He et al. 2015."""
    return _bottleneck_resnet([3, 4, 6, 3], num_classes, in_channels, pooled=2)


def densenet121(num_classes: int, in_channels: int = 3) -> nn.Module:
    """DenseNet-121 [D] for small images, as in [M]: 7.0 million parameters."""
    from torchvision.models.densenet import DenseNet

    model = DenseNet(growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64)
    model.features.conv0 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(model.features, name, nn.Identity())
    model.classifier = Head(model.classifier.in_features, num_classes)
    return _default_initialisation(model)


def global_pool_cnn(num_classes: int, embedding: Tensor) -> nn.Module:
    """The convolutional network of [M] on documents, see ``text``."""
    from focalcal import text  # which has its heads from here

    return text.GlobalPoolCNN(num_classes, embedding)


def tree_lstm(num_classes: int, embedding: Tensor) -> nn.Module:
    """The Tree-LSTM of [M] on parsed sentences, see ``text``."""
    from focalcal import text

    return text.TreeLSTM(num_classes, embedding)


NETWORKS = {
    "small_resnet": small_resnet,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "resnet50_tiny_imagenet": resnet50_tiny_imagenet,
    "resnet110": resnet110,
    "wide_resnet26_10": wide_resnet26_10,
    "densenet121": densenet121,
    "global_pool_cnn": global_pool_cnn,
    "tree_lstm": tree_lstm,
}
TEXT = ("global_pool_cnn", "tree_lstm")  # of these, those that read text


def make(name: str, num_classes: int, of: int | Tensor, seed: int) -> nn.Module:
    """The network called ``name``, its initial weights drawn from ``seed`` alone (on the CPU).

    of: what it reads, as the number of channels of images or the word vectors of text, float32 (words, D). Raises
    ValueError for an unknown name, a bad seed, or a network that reads the other kind.
    """
    if name not in NETWORKS:
        raise ValueError(f"Unknown network '{name}'; choose one of: {', '.join(NETWORKS)}.")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"A seed must be a whole number from 0 to 2**32 - 1, got {seed!r}.")
    if (name in TEXT) != isinstance(of, Tensor):
        kinds = ("text", "images") if name in TEXT else ("images", "text")
        raise ValueError(f"Network '{name}' reads {kinds[0]}, but the study's data are {kinds[1]}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](num_classes, of).to(memory_format=torch.channels_last)


def head(model: nn.Module) -> nn.Linear:
    """The classifier: the last linear layer."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def head_gradient_norms(model: nn.Module, split, loss, batch_size: int) -> np.ndarray:
    """Norm of each sample's loss gradient with respect to the head's weight matrix, (N,) float32.

    split: a feed.Split; loss: (logits, labels) -> (n,). That gradient is the outer product of d loss / d logits and
    the features, so its norm is the product of theirs; the model is in evaluation mode. batch_size matters for losses
    that couple the samples of a batch.
    """
    model.eval()
    features, norms = [], []
    hook = head(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        for first in range(0, len(split), batch_size):
            at = slice(first, first + batch_size)
            with torch.no_grad():
                logits = model(split.batch(at)).float()
            logits.requires_grad_()
            (slope,) = torch.autograd.grad(loss(logits, split.labels[at]).sum(), logits)
            norms.append(slope.norm(dim=1) * features.pop().float().norm(dim=1))
    finally:
        hook.remove()
    return torch.cat(norms).detach().cpu().numpy()
