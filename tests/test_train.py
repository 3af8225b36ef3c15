import numpy as np
import pytest
import torch
from torch import nn

from focalcal import losses, networks, train
from focalcal.settings import Training

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
    return train.splits(prepared, torch.device("cpu"))


def run(images, loss="focal3", seed=0, settings=SETTINGS):
    model = networks.make(settings.network, 3, 1, seed)
    rows = list(train.train(model, images, losses.make(loss), settings, seed))
    return rows, train.predict(model, images["test"])


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_trains_and_repeats_bit_for_bit(images, name):
    rows, logits = run(images, name)
    again, logits_again = run(images, name)
    assert repr(rows) == repr(again) and np.array_equal(logits, logits_again)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(value) for row in rows for name, value in row.items() if "entropy" not in name)
    assert rows[0]["test_nll"] == pytest.approx(rows[0]["test_nll_correct"] + rows[0]["test_nll_incorrect"])


def test_training_learns(images):
    settings = Training(
        network="small_resnet", epochs=8, milestones=[6], batch_size=32, learning_rate=0.02, augment=False
    )
    rows, _ = run(images, "cross_entropy", settings=settings)
    assert rows[-1]["test_error"] < 0.1 and rows[-1]["train_nll"] < 0.5 * rows[0]["train_nll"]


def test_losses_share_initial_weights_and_batches():
    first, second = (networks.make("small_resnet", 3, 1, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = networks.make("small_resnet", 3, 1, seed=6).state_dict()
    assert not torch.equal(first["0.weight"], other["0.weight"])
    for a, b in zip(train.epoch_randomness(1, 7, 100), train.epoch_randomness(1, 7, 100), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(train.epoch_randomness(1, 7, 100)[0], train.epoch_randomness(1, 8, 100)[0])


def test_the_first_step_is_clipped_sgd_on_the_sum(images):
    """One batch, by hand: w - lr * (clipped gradient of the summed loss + decay * w)."""
    one = {**images, "train": train.Split(*slice_of(images["train"], 40))}
    settings = Training(network="small_resnet", epochs=1, milestones=[], batch_size=64, clip=0.5, augment=False)
    model, reference = (networks.make("small_resnet", 3, 1, 0) for _ in range(2))
    reference.train()
    order = train.epoch_randomness(0, 1, 40)[0]
    batch, labels = one["train"].normalise(one["train"].images[order]), one["train"].labels[order]
    nn.functional.cross_entropy(reference(batch), labels, reduction="sum").backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in reference.parameters()))
    assert norm > 0.5
    row = next(train.train(model, one, losses.make("cross_entropy"), settings, 0))
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for trained, start in zip(model.parameters(), reference.parameters(), strict=True):
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
        train.crop_and_flip(image, torch.tensor([offset]), torch.tensor([flip]), padding=1)[0, 0].tolist()
        for offset, flip in (((1, 1), False), ((1, 1), True), ((0, 2), False))
    )
    assert centred == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert flipped == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert moved == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]  # rows from one above, columns from one to the right


def test_crop_and_flip_moves_all_channels_of_each_sample_alike():
    images = torch.randint(0, 255, (5, 3, 8, 8), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (5, 2)), torch.tensor([True, False, True, False, True])
    moved = train.crop_and_flip(images, offsets, flips)
    for image, (top, left), flip, result in zip(images, offsets.tolist(), flips, moved, strict=True):
        window = nn.functional.pad(image, (4,) * 4)[:, top : top + 8, left : left + 8]
        assert torch.equal(result, window.flip(2) if flip else window)


def test_every_sample_is_seen_once_and_the_short_batch_is_kept(images):
    model = networks.make("small_resnet", 3, 1, 0)
    sizes = [len(labels) for _, labels in train.epoch_batches(images["train"], SETTINGS, 0, 1, model)]
    assert sizes == [64, 64, 22]
    assert sorted(train.epoch_randomness(0, 1, 150)[0].tolist()) == list(range(150))


def test_head_gradient_norms_against_autograd(images):
    model = networks.make("small_resnet", 3, 1, 0).eval()
    loss, head = losses.make("focal2"), networks.head(model)
    norms = train.head_gradient_norms(model, images["val"], loss, batch_size=25)
    for i in (0, 31, 59):
        logits = model(images["val"].normalise(images["val"].images[i : i + 1]))
        (slope,) = torch.autograd.grad(loss(logits, images["val"].labels[i : i + 1]).sum(), head.weight)
        assert norms[i] == pytest.approx(slope.norm().item(), rel=1e-4)


def test_adafocal_moves_its_gammas_and_logs_them(images):
    rows, _ = run(images, "adafocal")
    assert len({row["gamma_bin14"] for row in rows}) > 1 and "edge_bin00" in rows[0]
    assert [row["gamma"] for row in run(images, "flsc531")[0]] == [5, 3, 1]


def test_divergence_stops_with_epoch_step_and_advice(images):
    settings = Training(network="small_resnet", epochs=3, milestones=[], learning_rate=1e30, clip=1e30, augment=False)
    with pytest.raises(FloatingPointError, match=r"epoch \d, step \d+, at learning rate 1e\+30; lower learning_rate"):
        run(images, "cross_entropy", settings=settings)


def test_device_by_environment(monkeypatch):
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    assert train.device().type == "cpu"
    monkeypatch.setenv("FOCALCAL_DEVICE", "tpu")
    with pytest.raises(ValueError, match="FOCALCAL_DEVICE is 'tpu'"):
        train.device()


def test_networks_by_name():
    for name, make in networks.NETWORKS.items():
        model = make(7)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        assert networks.head(model).out_features == 7, name
    with pytest.raises(ValueError, match="Unknown network 'resnet9000'"):
        networks.make("resnet9000", 10, 3, 0)
    with pytest.raises(ValueError, match="A seed must be a whole number"):
        networks.make("small_resnet", 10, 3, -1)
