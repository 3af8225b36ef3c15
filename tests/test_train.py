"""The training loop, and how images get to it (feed)."""

import numpy as np
import pytest
import torch
from helpers import make_loss, new_run, protocol, squares
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from focalcal import devices, feed, losses, metrics, networks, train

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def images():
    return feed.splits(squares(), CPU)


def trained(images, loss="focal", seed=0, **changes):
    """A finished training."""
    run = new_run(loss, protocol(**changes), seed)
    for _ in train.train(run, images, seed):
        pass
    return run


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_trains_and_repeats_bit_for_bit(images, name):
    run, again = trained(images, name), trained(images, name)
    assert repr(run.history) == repr(again.history)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in run.tensors().items())
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert all(np.isfinite(value) for row in run.history for name, value in row.items() if "entropy" not in name)
    assert sorted(run.gradients) == train.gradient_epochs(3) and run.gradients[1].shape == (150,)


def test_training_learns(images):
    rows = trained(
        images, "cross_entropy", epochs=8, milestones=[6], batch_size=32, learning_rate=0.02, augment=False
    ).history
    assert rows[-1]["test_error"] < 0.1 and rows[-1]["train_nll"] < 0.5 * rows[0]["train_nll"]


def test_the_steps_are_those_of_pytorchs_own_sgd(images):
    """Two epochs of three steps: clipping, momentum, weight decay, the drop of the rate and the short last batch."""
    one = {**images, "train": feed.Images(*slice_of(images["train"], 40))}
    changes = {"batch_size": 16, "milestones": [2], "clip": 0.5, "weight_decay": 0.05, "augment": False, "epochs": 2}
    run, norms = new_run("cross_entropy", protocol(**changes)), []
    reference = networks.make("small_resnet", 3, 1, 0).train()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    for epoch in (1, 2):
        sgd.param_groups[0]["lr"] = {1: 0.1, 2: 0.01}[epoch]
        for rows in feed.epoch_randomness(0, epoch, 40)[0].split(16):
            sgd.zero_grad()
            nn.functional.cross_entropy(
                reference(one["train"].batch(rows)), one["train"].labels[rows], reduction="sum"
            ).backward()
            norms.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item())
            sgd.step()
    rows = list(train.train(run, one, 0))
    assert min(norms) > 0.5
    assert [row["gradient_norm"] for row in rows] == pytest.approx([np.mean(norms[:3]), np.mean(norms[3:])], rel=1e-4)
    for parameter, expected in zip(run.parameters, reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def slice_of(split, n, on=CPU):
    images = split.inputs[:n].permute(0, 2, 3, 1).contiguous().numpy()
    return images, split.labels[:n].numpy(), [0.4], [0.3], on


def test_a_row_of_history_against_other_implementations(images):
    """Every number of the last epoch, from the logits of the network as it then is."""
    run = trained(images, "cross_entropy", learning_rate=0.02, reduction="mean")
    row = run.history[-1]
    logits = {name: train.predict(run.model, split).astype(np.float64) for name, split in images.items()}
    labels = {name: split.labels.numpy() for name, split in images.items()}

    def nll(name, temperature=1.0):
        return -log_softmax(logits[name] / temperature, axis=1)[np.arange(len(labels[name])), labels[name]].mean()

    def ece(name, temperature=1.0):
        probs = torch.tensor(logits[name] / temperature).softmax(1)
        return multiclass_calibration_error(probs, torch.tensor(labels[name]), num_classes=3, n_bins=15).item()

    def best(name):
        return minimize_scalar(lambda t: nll(name, t), bounds=(0.01, 100), options={"xatol": 1e-9}, method="bounded").x

    for name in ("train", "val", "test"):
        confidence = torch.tensor(logits[name]).softmax(1).amax(1).mean().item()
        assert row[f"{name}_confidence"] == pytest.approx(confidence, abs=1e-6)
        assert row[f"{name}_nll"] == pytest.approx(nll(name)) and row[f"{name}_ece"] == pytest.approx(
            ece(name), abs=1e-6
        )
        assert row[f"{name}_error"] == pytest.approx((logits[name].argmax(1) != labels[name]).mean())
    temperature = best("val")
    assert row["val_temperature"] == pytest.approx(temperature, rel=1e-4)
    assert row["val_refinement"] == pytest.approx(nll("val", temperature), abs=1e-9)
    assert row["test_refinement"] == pytest.approx(nll("test", best("test")), abs=1e-9)
    assert row["test_nll_scaled"] == pytest.approx(nll("test", temperature), abs=1e-5)
    assert row["test_ece_scaled"] == pytest.approx(ece("test", temperature), abs=1e-5)
    assert row["test_refinement"] < row["test_nll_scaled"] != row["test_nll"]
    assert row["weight_norm"] == pytest.approx(np.linalg.norm(networks.head(run.model).weight.detach().numpy()))
    assert row["learning_rate"] == pytest.approx(0.02 / 100)
    for name in ("val", "test"):
        assert np.array_equal(run.predictions[name][0], logits[name].astype(np.float32))
        assert np.array_equal(run.predictions[name][1], labels[name])


def test_adafocal_logs_gammas_edges_and_how_many_samples_each_bin_held(images):
    run = trained(images, "adafocal")
    assert len({row["gamma_bin14"] for row in run.history}) > 1
    held = [tuple(row[f"samples_bin{i:02d}"] for i in range(15)) for row in run.history]
    assert [sum(bins) for bins in held] == [150] * 3 and len(set(held)) == 3
    confidence, _ = metrics.confidence_correct(*run.predictions["val"])
    edges = [run.history[-1][f"edge_bin{i:02d}"] for i in range(14)]
    assert edges == pytest.approx(metrics.equal_mass_edges(confidence, 15)[1:-1], abs=1e-6)


def test_the_first_epoch_of_the_least_validation_error_is_kept(images, monkeypatch):
    """Of four samples 2, 1, 1 and 2 are wrong: the second epoch's weights come back."""
    run, said, wrong = new_run("cross_entropy", protocol(epochs=4, select="best")), np.array([0, 1, 2, 0]), 0
    bias = networks.head(run.model).bias
    monkeypatch.setattr(train, "scored", lambda *_: (np.eye(3)[said], (said + (np.arange(4) < wrong)) % 3, ()))
    for epoch, wrong in enumerate((2, 1, 1, 2), start=1):  # noqa: B007
        with torch.no_grad():
            bias.fill_(epoch)
        run.finish_epoch(epoch, images)
    run.finish()
    assert run.selected == 2 and bias.tolist() == [2, 2, 2] and run.predictions == {}


def test_scheduled_gammas_are_logged(images):
    assert [row["gamma"] for row in trained(images, "flsc531").history] == [5, 3, 1]


def test_training_goes_on_after_its_history(images):
    whole, parts = trained(images, "adafocal"), new_run("adafocal", protocol())
    first = next(train.train(parts, images, 0))
    rest = list(train.train(parts, images, 0))
    assert [row["epoch"] for row in rest] == [2, 3] and repr([first, *rest]) == repr(whole.history)
    assert list(train.train(parts, images, 0)) == []


def test_losses_trained_together_are_as_if_trained_alone(images):
    names = ["cross_entropy", "adafocal"]
    together = list(train.train_together([new_run(name, protocol()) for name in names], images, 0))
    for i, name in enumerate(names):
        assert repr([rows[i] for rows in together]) == repr(trained(images, name).history)


def test_only_what_shares_its_batches_is_trained_together(images):
    begun = new_run("focal", protocol())
    next(train.train(begun, images, 0))
    others = ({"epochs": 4}, {"batch_size": 32}, {"augment": False}, {"threads": 2})
    for other in (begun, *(new_run("focal", protocol(**changes)) for changes in others)):
        with pytest.raises(ValueError, match="need the same epochs, batch_size, drop_last, augment, threads and mode"):
            next(train.train_together([new_run("focal", protocol()), other], images, 0))
    next(train.train_together([new_run("focal", protocol()), new_run("focal", protocol(clip=1.0))], images, 0))


def test_the_training_set_can_be_evaluated_more_rarely(images):
    rows, always = (trained(images, evaluate_train_every=every).history for every in (2, 1))
    for name in (f"train_{key}" for key in metrics.SUMMARY if "entropy" not in key):
        assert [np.isnan(row[name]) for row in rows] == [True, False, False], name
    assert list(rows[0]) == list(always[0]) and rows[-1]["train_nll"] == always[-1]["train_nll"]
    assert [row["test_nll"] for row in rows] == [row["test_nll"] for row in always]


def test_divergence_stops_with_epoch_step_and_advice(images):
    with pytest.raises(
        FloatingPointError,
        match=r"^cross_entropy: the loss became .* in epoch \d, step \d+, at learning rate 1e\+30; lower it",
    ):
        trained(images, "cross_entropy", milestones=[], learning_rate=1e30, clip=1e30, augment=False)


def test_divergence_that_only_evaluation_sees_is_named_too(images):
    words = r"the logits of the train set are not finite after epoch 1, at learning rate 1e\+10; lower it"
    with pytest.raises(FloatingPointError, match=words):
        trained(images, "cross_entropy", milestones=[], learning_rate=1e10, batch_size=150, augment=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"evaluate_train_every": 0}, "evaluate_train_every must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and above 0, got nan"),
        ({"clip": float("inf")}, "clip must be finite and above 0, got inf"),
        ({"momentum": -0.1}, "momentum must be finite and 0 or more, got -0.1"),
        ({"milestones": [2, 4]}, r"milestones must be epochs from 1 to 3, got \[2, 4\]"),
        ({"milestones": [0]}, r"milestones must be epochs from 1 to 3, got \[0\]"),
        ({"reduction": "total"}, "reduction must be one of sum, mean, per_document, got 'total'"),
        ({"mode": "faster"}, "mode must be one of auto, exact, fast, got 'faster'"),
    ],
)
def test_bad_training_settings_are_named(changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        protocol(**changes)


def test_training_settings_at_their_limits():
    protocol(momentum=0.0, weight_decay=0.0, milestones=[1, 3], threads=None)


def test_learning_rate_lasts_149_100_and_101_epochs():
    papers = protocol(epochs=350, milestones=[150, 250])
    rates = [round(papers.learning_rate_at(epoch), 6) for epoch in range(1, 351)]
    assert [rates.count(rate) for rate in (0.1, 0.01, 0.001)] == [149, 100, 101]


def test_gradient_histograms_are_taken_early_midway_and_late():
    assert train.gradient_epochs(350) == [10, 100, 200]
    assert train.gradient_epochs(30) == [1, 9, 17] and train.gradient_epochs(1) == [1]


def test_device_by_environment(monkeypatch):
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    assert devices.device().type == "cpu"
    for name in ("tpu", "cpu:1", "cpu:abc", "cpu:", "cuda:99"):
        monkeypatch.setenv("FOCALCAL_DEVICE", name)
        words = f"FOCALCAL_DEVICE is '{name}', which PyTorch does not find here; use auto, "
        with pytest.raises(ValueError, match=words):
            devices.device()


def test_the_gpu_may_be_named_or_not(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    try:
        for name in ("cuda", "cuda:1"):  # PyTorch refuses to choose one that has no number
            devices.set_numerics(False, torch.device(name), None)
        assert torch.backends.cudnn.deterministic and not torch.backends.cuda.matmul.allow_tf32
        devices.set_numerics(True, torch.device("cuda"), None)
        assert torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.deterministic
    finally:
        devices.set_numerics(False, CPU, None)
        torch.use_deterministic_algorithms(False)
    assert chosen == [torch.device("cuda:1")]


def test_threads_are_those_of_the_settings():
    before = torch.get_num_threads()
    try:
        devices.set_numerics(False, CPU, 3)
        assert torch.get_num_threads() == 3
        devices.set_numerics(False, CPU, None)
        assert torch.get_num_threads() == 3  # as it was
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("mode", "limit"), [("exact", 1e-4), ("fast", 0.03)])
@pytest.mark.parametrize("loss", ["cross_entropy", "flsd53", "adafocal", "mmce"])
def test_gradients_of_every_layer_against_float64(monkeypatch, loss, mode, limit):
    """exact is float32, fast bfloat16 autocast; on a GPU this tests what runs there.

    SiLU stands in for ReLU, on both sides: at a kink the smallest rounding error flips a gradient, and what was to be
    measured, whether the path computes the same function, drowns in that.
    """
    monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: nn.functional.silu(x))
    on, labels = devices.device(), torch.arange(120) % 10
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 16, 16, generator=generator)[labels]
    images += 0.5 * torch.randn(images.shape, generator=generator)
    reference, model = (networks.make("small_resnet", 10, 3, 0) for _ in range(2))
    reference[2] = model[2] = nn.SiLU()
    losses.make(loss)(reference.double().train()(images.double()), labels).sum().backward()
    run = train.Run(model.to(on), losses.make(loss), protocol(mode=mode, clip=1e30, learning_rate=1e-30))
    devices.set_numerics(run.fast, on, None)
    run.start_epoch(1, 1)
    run.step(images.to(on), labels.to(on), torch.zeros(1, dtype=torch.long, device=on))
    for (name, exact), parameter in zip(reference.named_parameters(), run.parameters, strict=True):
        error = (parameter.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
        assert error < limit, f"{name}: {error}"
        assert mode == "exact" or error > 1e-6, "this was not bfloat16"


# Images on their way to the network


def test_batches_depend_on_seed_and_epoch_alone():
    for a, b in zip(feed.epoch_randomness(1, 7, 100), feed.epoch_randomness(1, 7, 100), strict=True):
        assert torch.equal(a, b)
    for other in (feed.epoch_randomness(1, 8, 100), feed.epoch_randomness(2, 7, 100)):
        assert not torch.equal(feed.epoch_randomness(1, 7, 100)[0], other[0])


def test_every_sample_is_seen_once_shifted_and_flipped_and_the_short_batch_is_kept(images):
    split = images["train"]
    batches = feed.Batches(split, 64, augment=True)
    for epoch in (1, 2):
        batches.shuffle(0, epoch)
        inputs, labels = (torch.cat(part) for part in zip(*map(batches.next, batches.sizes), strict=True))
        order, offsets, flips = feed.epoch_randomness(0, epoch, 150)
        assert torch.equal(labels, split.labels[order])
        assert torch.equal(inputs, split.normalise(feed.crop_and_flip(split.inputs[order], offsets, flips)))
    assert batches.sizes == [64, 64, 22]
    assert sorted(feed.epoch_randomness(0, 1, 150)[0].tolist()) == list(range(150))


def test_the_short_batch_may_be_left_out(images):
    assert feed.Batches(images["train"], 64, augment=False, drop_last=True).sizes == [64, 64]
    assert feed.Batches(images["train"], 50, augment=False, drop_last=True).sizes == [50, 50, 50]
    with pytest.raises(ValueError, match="150 samples give no batch of 200; lower batch_size, or drop_last to false"):
        feed.Batches(images["train"], 200, augment=False, drop_last=True)
    texts = feed.Split(np.zeros((4, 2), np.int64), np.zeros(4, np.int64), torch.device("cpu"))
    with pytest.raises(ValueError, match="Only images can be augmented"):
        feed.Batches(texts, 2, augment=True)


def test_images_have_their_channels_last():
    with pytest.raises(
        ValueError, match=r"Images must be \(N, H, W, 3\), a mean and std per channel; got \(2, 3, 8, 8\)"
    ):
        feed.Images(np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, np.int64), [0.5] * 3, [0.2] * 3, torch.device("cpu"))


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
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (5, 3, 8, 8), dtype=torch.uint8, generator=generator)
    offsets = torch.randint(0, 9, (5, 2), generator=generator)
    flips = torch.tensor([True, False, True, False, True])
    moved = feed.crop_and_flip(images, offsets, flips)
    for image, (top, left), flip, result in zip(images, offsets.tolist(), flips, moved, strict=True):
        window = nn.functional.pad(image, (4,) * 4)[:, top : top + 8, left : left + 8]
        assert torch.equal(result, window.flip(2) if flip else window)


def test_noise_has_the_published_standard_deviation():
    grey = np.full((50, 28, 28, 1), 128, np.uint8)
    for severity, deviation in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), start=1):
        noisy = feed.gaussian_noise(grey, severity)
        assert noisy.std() / 255 == pytest.approx(deviation, rel=0.02)
        assert noisy.mean() == pytest.approx(127.5, abs=0.25), "cut to whole numbers, not rounded"
        assert np.array_equal(noisy, feed.gaussian_noise(grey, severity))
    assert feed.gaussian_noise(np.full((9, 9, 9, 1), 255, np.uint8), 5).max() == 255
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity must be a whole number from 1 to 5, got {severity}"):
            feed.gaussian_noise(grey, severity)


def test_a_training_on_the_cpu_asks_cuda_for_nothing(images, monkeypatch):
    """It would take memory of a GPU that is there, and PyTorch cannot answer on a Mac."""
    for name in ("stream", "current_stream", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"torch.cuda.{name} was called"))
    assert len(trained(images).history) == 3


# On a GPU


@needs_gpu
@pytest.mark.parametrize(
    ("names", "compiled"),
    [(["adafocal"], False), (["flsc531", "mmce"], False), (["aurc", "aurc_hard", "focal_mdca"], False)]
    + [(["adafocal"], True)],
)
def test_captured_steps_are_the_eager_steps(images, monkeypatch, names, compiled):
    """The same training with and without CUDA graphs, with a short last batch.

    A decay makes the graphs anew. FLSc-531 and AdaFocal change their gammas after the first epoch, between two replays.
    Kernels are deterministic and the rate is low, since otherwise roundings grow into differences of that size.
    """
    on = torch.device("cuda")
    data = {name: feed.Images(*slice_of(split, len(split), on)) for name, split in images.items()}
    fast = protocol(mode="fast", epochs=4, milestones=[4], learning_rate=0.001, compiled=compiled)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(devices, "set_numerics", lambda *_: None)

    def rows():
        runs = [train.Run(networks.make("small_resnet", 3, 1, 0).to(on), losses.make(name), fast) for name in names]
        return [row for rows in train.train_together(runs, data, 0) for row in rows]

    captured = rows()
    monkeypatch.setattr(train, "capture", lambda *_: {})
    for row, eager in zip(captured, rows(), strict=True):
        assert row["train_loss"] == pytest.approx(eager["train_loss"], rel=0.05)
        assert row["weight_norm"] == pytest.approx(eager["weight_norm"], rel=0.02)
        if "samples_bin00" in row:
            assert sum(row[f"samples_bin{i:02d}"] for i in range(15)) == 150


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_documents_train(device):
    """With what images do not have: Adam, dropout, an epoch that is selected. The word tells the class."""
    on, labels = torch.device(device), np.arange(150) % 3
    tokens = np.repeat(1 + labels[:, None], 30, axis=1)
    data = {name: feed.Split(tokens, labels, on) for name in ("train", "val", "test")}
    adam = {"network": "global_pool_cnn", "optimizer": "adam", "learning_rate": 0.001, "weight_decay": 0.0}
    settings = protocol(mode="fast", epochs=6, milestones=[], augment=False, select="best", **adam)
    model = networks.make("global_pool_cnn", 3, torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), 0)
    rows = list(train.train(train.Run(model.to(on), losses.make("adafocal"), settings), data, 0))
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"] and rows[-1]["test_error"] == 0


@needs_gpu
def test_exact_mode_repeats_bit_for_bit_on_a_gpu(images):
    on = torch.device("cuda")
    data = {name: feed.Images(*slice_of(split, len(split), on)) for name, split in images.items()}

    def rows():
        run = train.Run(networks.make("resnet20", 3, 1, 0).to(on), make_loss("focal"), protocol(mode="exact"))
        return list(train.train(run, data, 0))

    assert repr(rows()) == repr(rows())
