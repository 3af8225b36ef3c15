import numpy as np
import pytest
import torch
from helpers import make_loss, squares
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from focalcal import feed, networks

SIZES = {  # parameters at ten classes, and multiply-accumulates of a forward pass at 32x32, in thousand millions
    "resnet50": (23_520_842, 1.298),
    "resnet110": (45_864_522, 2.724),
    "wide_resnet26_10": (36_481_434, 5.243),
    "densenet121": (6_956_298, 0.888),
    "resnet20": (272_474, 0.041),
    "small_resnet": (78_042, 0.003),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_networks_have_the_papers_size(name):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = networks.NETWORKS[name](10).eval()
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name][0]
    assert counter.get_total_flops() / 2e9 == pytest.approx(SIZES[name][1], abs=0.0006)
    assert isinstance(networks.head(model), networks.Head) and networks.head(model).out_features == 10


def test_smaller_and_grey_images_fit():
    for name in ("small_resnet", "resnet20"):
        assert networks.make(name, 3, 1, 0).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_the_network_for_tiny_imagenet_pools_to_two_by_two():
    with FakeTensorMode():
        model = networks.NETWORKS["resnet50_tiny_imagenet"](200).eval()
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 200)
    assert networks.head(model).in_features == 4 * 2048
    assert set(networks.NETWORKS) == {*SIZES, "resnet50_tiny_imagenet", *networks.TEXT}


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = networks.make("small_resnet", 3, 1, seed=5).state_dict()
    assert torch.equal(torch.rand(1), expected)  # what others draw is left alone
    second, other = (networks.make("small_resnet", 3, 1, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize(
    ("name", "where", "variance"),
    [
        ("resnet50", "layer1.0.conv2", 1 / 3 / 576),  # PyTorch's own: uniform within 1 / sqrt(inputs)
        ("densenet121", "features.denseblock1.denselayer1.conv2", 1 / 3 / 1152),
        ("resnet50_tiny_imagenet", "layer1.0.conv2", 2 / 576),  # He et al. 2015
        ("wide_resnet26_10", "3.conv2", 2 / 1440),
    ],
)
def test_convolutions_start_as_published(name, where, variance):
    weight = networks.make(name, 10, 3, 0).get_submodule(where).weight
    assert weight.std().item() == pytest.approx(variance**0.5, rel=0.03)


def test_unknown_networks_and_seeds_are_refused():
    with pytest.raises(ValueError, match="Unknown network 'resnet9000'; choose one of: small_resnet, resnet20"):
        networks.make("resnet9000", 10, 3, 0)
    for seed in (-1, 1.5, 2**32):
        with pytest.raises(ValueError, match=rf"A seed must be a whole number from 0 to 2\*\*32 - 1, got {seed}"):
            networks.make("small_resnet", 10, 3, seed)


def test_the_head_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    head, features = networks.Head(8, 3), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(features, head.weight).dtype == torch.bfloat16
        assert torch.equal(head(features.bfloat16()), head(features.bfloat16().float()))
        assert head(features.bfloat16()).dtype == torch.float32
    for name in networks.TEXT:
        assert isinstance(networks.head(networks.make(name, 3, torch.randn(9, 100), 0)), networks.Head)


def test_head_gradient_norms_against_autograd():
    val = feed.splits(squares(), torch.device("cpu"))["val"]
    model = networks.make("small_resnet", 3, 1, 0)
    loss, head = make_loss("focal"), networks.head(model)
    norms = networks.head_gradient_norms(model, val, loss, batch_size=25)
    assert norms.shape == (60,) and norms.dtype == np.float32 and not model.training
    for i in (0, 31, 59):
        logits = model(val.batch(slice(i, i + 1)))
        (slope,) = torch.autograd.grad(loss(logits, val.labels[i : i + 1]).sum(), head.weight)
        assert norms[i] == pytest.approx(slope.norm().item(), rel=1e-4)
    assert not head._forward_pre_hooks  # nothing is left on the model
