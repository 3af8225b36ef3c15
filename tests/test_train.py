import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from focalcal import feed, losses, networks, train
from focalcal.train import Training

SETTINGS = Training(network="small_resnet", epochs=3, milestones=[2, 3], batch_size=64, augment=True)


@pytest.fixture(scope="module")
def images():
    """Three small splits of bright and dark squares, learnable in seconds."""
    rng = np.random.default_rng(0)
    prepared = {"mean": np.array([0.4]), "std": np.array([0.3])}
    for split, n in (("train", 150), ("val", 60), ("test", 60)):
        labels = rng.integers(0, 3, n)
        noise = rng.integers(0, 60, (n, 8, 8, 1))
        prepared[f"{split}_images"] = (noise + 80 * labels[:, None, None, None]).astype(np.uint8)
        prepared[f"{split}_labels"] = labels
    return feed.splits(prepared, torch.device("cpu"))


def new_run(loss="focal3", seed=0, settings=SETTINGS):
    return train.Run(networks.make(settings.network, 3, 1, seed), losses.make(loss), settings)


def trained(images, loss="focal3", seed=0, settings=SETTINGS):
    run = new_run(loss, seed, settings)
    rows = list(train.train(run, images, seed))
    return rows, train.predict(run.model, images["test"])


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_trains_and_repeats_bit_for_bit(images, name):
    rows, logits = trained(images, name)
    again, logits_again = trained(images, name)
    assert repr(rows) == repr(again) and np.array_equal(logits, logits_again)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(value) for row in rows for name, value in row.items() if "entropy" not in name)
    assert rows[0]["test_nll"] == pytest.approx(rows[0]["test_nll_correct"] + rows[0]["test_nll_incorrect"])


def test_training_learns(images):
    settings = Training(
        network="small_resnet", epochs=8, milestones=[6], batch_size=32, learning_rate=0.02, augment=False
    )
    rows, _ = trained(images, "cross_entropy", settings=settings)
    assert rows[-1]["test_error"] < 0.1 and rows[-1]["train_nll"] < 0.5 * rows[0]["train_nll"]


def test_losses_share_initial_weights_and_batches():
    first, second = (networks.make("small_resnet", 3, 1, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = networks.make("small_resnet", 3, 1, seed=6).state_dict()
    assert not torch.equal(first["0.weight"], other["0.weight"])
    for a, b in zip(feed.epoch_randomness(1, 7, 100), feed.epoch_randomness(1, 7, 100), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(feed.epoch_randomness(1, 7, 100)[0], feed.epoch_randomness(1, 8, 100)[0])


def test_the_first_step_is_clipped_sgd_on_the_sum(images):
    """One batch, by hand: w - lr * (clipped gradient of the summed loss + decay * w)."""
    one = {**images, "train": feed.Split(*slice_of(images["train"], 40))}
    settings = Training(network="small_resnet", epochs=1, milestones=[], batch_size=64, clip=0.5, augment=False)
    run, reference = new_run("cross_entropy", settings=settings), networks.make("small_resnet", 3, 1, 0).train()
    order = feed.epoch_randomness(0, 1, 40)[0]
    batch, labels = one["train"].normalise(one["train"].images[order]), one["train"].labels[order]
    nn.functional.cross_entropy(reference(batch), labels, reduction="sum").backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in reference.parameters()))
    assert norm > 0.5
    row = next(train.train(run, one, 0))
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for trained, start in zip(run.parameters, reference.parameters(), strict=True):
        expected = start - 0.1 * (start.grad * 0.5 / norm + 5e-4 * start)
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def slice_of(split, n):
    images = split.images[:n].permute(0, 2, 3, 1).contiguous().numpy()
    return images, split.labels[:n].numpy(), [0.4], [0.3], torch.device("cpu")


def test_learning_rate_lasts_149_100_and_101_epochs():
    rates = [round(Training(network="small_resnet").learning_rate_at(epoch), 6) for epoch in range(1, 351)]
    assert [rates.count(rate) for rate in (0.1, 0.01, 0.001)] == [149, 100, 101]


def test_crop_and_flip_by_hand():
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    centred, flipped, moved = (
        feed.crop_and_flip(image, torch.tensor([offset]), torch.tensor([flip]), padding=1)[0, 0].tolist()
        for offset, flip in (((1, 1), False), ((1, 1), True), ((0, 2), False))
    )
    assert centred == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert flipped == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert moved == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]  # rows from one above, columns from one to the right


def test_crop_and_flip_moves_all_channels_of_each_sample_alike():
    images = torch.randint(0, 255, (5, 3, 8, 8), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (5, 2)), torch.tensor([True, False, True, False, True])
    moved = feed.crop_and_flip(images, offsets, flips)
    for image, (top, left), flip, result in zip(images, offsets.tolist(), flips, moved, strict=True):
        window = nn.functional.pad(image, (4,) * 4)[:, top : top + 8, left : left + 8]
        assert torch.equal(result, window.flip(2) if flip else window)


def test_every_sample_is_seen_once_and_the_short_batch_is_kept(images):
    batches = feed.Batches(images["train"], SETTINGS)
    for epoch in (1, 2):
        batches.shuffle(0, epoch)
        labels = torch.cat([batches.next(size)[1] for size in batches.sizes])
        assert torch.equal(labels, images["train"].labels[feed.epoch_randomness(0, epoch, 150)[0]])
    assert batches.sizes == [64, 64, 22]
    assert sorted(feed.epoch_randomness(0, 1, 150)[0].tolist()) == list(range(150))


def test_head_gradient_norms_against_autograd(images):
    model = networks.make("small_resnet", 3, 1, 0).eval()
    loss, head = losses.make("focal2"), networks.head(model)
    norms = train.head_gradient_norms(model, images["val"], loss, batch_size=25)
    for i in (0, 31, 59):
        logits = model(images["val"].normalise(images["val"].images[i : i + 1]))
        (slope,) = torch.autograd.grad(loss(logits, images["val"].labels[i : i + 1]).sum(), head.weight)
        assert norms[i] == pytest.approx(slope.norm().item(), rel=1e-4)


def test_adafocal_moves_its_gammas_and_logs_them(images):
    rows, _ = trained(images, "adafocal")
    assert len({row["gamma_bin14"] for row in rows}) > 1 and "edge_bin00" in rows[0]
    assert [row["gamma"] for row in trained(images, "flsc531")[0]] == [5, 3, 1]


def test_divergence_stops_with_epoch_step_and_advice(images):
    settings = Training(network="small_resnet", epochs=3, milestones=[], learning_rate=1e30, clip=1e30, augment=False)
    with pytest.raises(FloatingPointError, match=r"epoch \d, step \d+, at learning rate 1e\+30; lower learning_rate"):
        trained(images, "cross_entropy", settings=settings)


def test_device_by_environment(monkeypatch):
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    assert train.device().type == "cpu"
    monkeypatch.setenv("FOCALCAL_DEVICE", "tpu")
    with pytest.raises(ValueError, match="FOCALCAL_DEVICE is 'tpu'"):
        train.device()


def test_losses_trained_together_are_as_if_trained_alone(images):
    names = ["cross_entropy", "adafocal"]
    together = list(train.train_together([new_run(name) for name in names], images, 0))
    for i, name in enumerate(names):
        assert repr([rows[i] for rows in together]) == repr(trained(images, name)[0])
    other = Training(network="small_resnet", epochs=4, milestones=[])
    with pytest.raises(ValueError, match="trained together need the same epochs, batch_size, augment and mode"):
        next(train.train_together([new_run(), new_run(settings=other)], images, 0))


def test_the_training_set_can_be_evaluated_more_rarely(images):
    every = SETTINGS.model_copy(update={"evaluate_train_every": 2})
    rows = trained(images, settings=every)[0]
    assert [np.isnan(row["train_nll"]) for row in rows] == [True, False, False]
    assert [row["test_nll"] for row in rows] == [row["test_nll"] for row in trained(images)[0]]


@pytest.mark.parametrize(("mode", "limit"), [("exact", 1e-4), ("fast", 0.03)])
@pytest.mark.parametrize("loss", ["cross_entropy", "flsd53", "adafocal", "mmce"])
def test_gradients_of_every_layer_against_float64(monkeypatch, loss, mode, limit):
    """exact is float32, fast bfloat16 autocast; on a GPU this tests what runs there.

    SiLU stands in for ReLU, on both sides: at a kink the smallest rounding error flips a gradient, and what was to be
    measured, whether the path computes the same function, drowns in that.
    """
    monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: nn.functional.silu(x))
    on, labels = train.device(), torch.arange(120) % 10
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 16, 16, generator=generator)[labels]
    images += 0.5 * torch.randn(images.shape, generator=generator)
    reference, model = (networks.make("small_resnet", 10, 3, 0) for _ in range(2))
    reference[2] = model[2] = nn.SiLU()
    losses.make(loss)(reference.double().train()(images.double()), labels).sum().backward()
    settings = Training(network="small_resnet", mode=mode, clip=1e30, learning_rate=1e-30)
    run = train.Run(model.to(on), losses.make(loss), settings)
    run.start_epoch(1, 1)
    run.step(images.to(on), labels.to(on), torch.zeros(1, dtype=torch.long, device=on))
    for (name, exact), parameter in zip(reference.named_parameters(), run.parameters, strict=True):
        error = (parameter.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        assert error < limit, f"{name}: {error}"
        assert mode == "exact" or error > 1e-6, "this was not bfloat16"


def test_noise_has_the_published_standard_deviation():
    grey = np.full((50, 28, 28, 1), 128, np.uint8)
    for severity, deviation in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), start=1):
        noisy = feed.gaussian_noise(grey, severity)
        assert noisy.std() / 255 == pytest.approx(deviation, rel=0.02) and np.array_equal(
            noisy, feed.gaussian_noise(grey, severity)
        )
    assert feed.gaussian_noise(np.full((9, 9, 9, 1), 255, np.uint8), 5).max() == 255


COSTS = {  # parameters at ten classes, and multiply-accumulates of a forward pass at 32x32, in thousand millions
    "resnet50": (23_520_842, 1.298),
    "resnet110": (45_864_522, 2.724),
    "wide_resnet26_10": (36_481_434, 5.243),
    "densenet121": (6_956_298, 0.888),
    "resnet18": (11_173_962, 0.555),
    "resnet20": (272_474, 0.041),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_papers_networks_have_the_papers_size(name):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = networks.NETWORKS[name](10).eval()
        model(torch.zeros(1, 3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == COSTS[name][0]
    assert counter.get_total_flops() / 2e9 == pytest.approx(COSTS[name][1], abs=0.0006)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_by_name(name):
    with FakeTensorMode():
        model = networks.NETWORKS[name](7, 3).eval()
        sizes = (64,) if name == "resnet50_tiny_imagenet" else (28, 32, 64)
        assert all(model(torch.zeros(2, 3, size, size)).shape == (2, 7) for size in sizes)
    head = networks.head(model)
    assert isinstance(head, networks.Head) and head.out_features == 7


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="Unknown network 'resnet9000'"):
        networks.make("resnet9000", 10, 3, 0)
    with pytest.raises(ValueError, match="A seed must be a whole number"):
        networks.make("small_resnet", 10, 3, -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("names", [["adafocal"], ["flsc531", "mmce"]])
def test_captured_steps_are_the_eager_steps(images, monkeypatch, names):
    """The same training with and without CUDA graphs, over two decays (so three captures) and a short last batch."""
    on = torch.device("cuda")
    data = {name: feed.Split(*slice_of(split, len(split))[:4], on) for name, split in images.items()}
    fast = SETTINGS.model_copy(update={"mode": "fast"})

    def rows():
        runs = [train.Run(networks.make("small_resnet", 3, 1, 0).to(on), losses.make(name), fast) for name in names]
        return [row for rows in train.train_together(runs, data, 0) for row in rows]

    captured = rows()
    monkeypatch.setattr(train, "capture", lambda *_: {})
    for row, eager in zip(captured, rows(), strict=True):
        assert row["train_loss"] == pytest.approx(eager["train_loss"], rel=0.05)
        assert row["weight_norm"] == pytest.approx(eager["weight_norm"], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_exact_mode_repeats_bit_for_bit_on_a_gpu(images):
    on = torch.device("cuda")
    data = {name: feed.Split(*slice_of(split, len(split))[:4], on) for name, split in images.items()}
    exact = SETTINGS.model_copy(update={"mode": "exact"})

    def rows():
        run = train.Run(networks.make("resnet20", 3, 1, 0).to(on), losses.make("focal3"), exact)
        return list(train.train(run, data, 0))

    assert repr(rows()) == repr(rows())
