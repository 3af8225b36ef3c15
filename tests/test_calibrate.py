import numpy as np
import pytest
import torch

from focalcal import calibrate, losses, metrics


def labels_from(logits, temperature, seed=1):
    """Labels drawn from softmax(logits / temperature)."""
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    return (logits / temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_a_known_temperature_comes_back(true):
    logits = np.random.default_rng(0).normal(size=(40_000, 5)) * 3
    labels = labels_from(logits, true)
    assert calibrate.temperature_by_nll(logits, labels) == pytest.approx(true, rel=0.02)
    assert calibrate.temperature_by_ece(logits, labels) == pytest.approx(true, abs=0.11)


def test_nll_temperature_is_the_optimum():
    logits = np.random.default_rng(0).normal(size=(500, 10)) * 4
    labels = labels_from(logits, 1.7)
    best = calibrate.temperature_by_nll(logits, labels)
    here = metrics.nll(logits / best, labels)
    assert here <= min(metrics.nll(logits / (best * step), labels) for step in (0.999, 1.001))


def test_nll_temperature_by_hand():
    logits = np.array([[2.0, 0.0]] * 4)  # three of four right: 1 / (1 + exp(-2 / T)) = 3 / 4
    assert calibrate.temperature_by_nll(logits, np.array([0, 0, 0, 1])) == pytest.approx(2 / np.log(3), rel=1e-6)


def test_nll_temperature_stops_at_its_bounds():
    logits = np.random.default_rng(0).normal(size=(100, 3))
    for margin in (1, 1000):
        assert calibrate.temperature_by_nll(margin * logits, logits.argmax(1)) == 0.01
    assert calibrate.temperature_by_nll(logits, logits.argmin(1)) == pytest.approx(100, rel=1e-3)
    assert np.isfinite(calibrate.temperature_by_nll(np.zeros((4, 3)), np.zeros(4, int)))


@pytest.mark.parametrize("masked", [(), (3,)])
def test_ece_temperature_against_the_plain_grid(masked):
    logits = np.random.default_rng(1).normal(size=(700, 4)) * 3
    labels = np.random.default_rng(2).integers(0, 3, 700)
    scores = [metrics.ece(logits / t, labels, masked) for t in np.arange(1, 101) / 10]
    assert calibrate.temperature_by_ece(logits, labels, masked) == pytest.approx((1 + np.argmin(scores)) / 10)
    assert calibrate.temperature_by_ece(logits, labels, (3,)) != calibrate.temperature_by_ece(logits, labels)
    assert calibrate.temperatures(logits, labels, masked)["ece"] == calibrate.temperature_by_ece(logits, labels, masked)


def test_ece_temperature_takes_the_first_of_equals():
    logits, labels = np.array([[1e6, 0.0], [1e6, 0.0]]), np.array([0, 0])  # ECE 0 at every temperature
    assert calibrate.temperature_by_ece(logits, labels) == 0.1


def test_gamma_for_gives_the_printed_values():
    printed = {0.15: 8.0320, 0.19: 5.3370, 0.2: 4.8506, 0.25: 3.0702, 0.3: 1.9572, 0.35: 1.2092, 0.4: 0.6805}
    for p0, gamma in printed.items():
        assert calibrate.gamma_for(p0) == pytest.approx(gamma, abs=5e-5)
        assert calibrate.gradient_factor(p0, calibrate.gamma_for(p0)) == pytest.approx(1)
    for impossible in (0, 1e-17, 0.49999999, 0.5, 1, -0.1):
        with pytest.raises(ValueError, match="p0"):
            calibrate.gamma_for(impossible)


def test_gradient_factor_relates_the_two_losses():
    torch.manual_seed(0)
    z, y = torch.randn(20, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (20,))
    (focal,) = torch.autograd.grad(losses.focal(z, y, 3.0).sum(), z)
    (plain,) = torch.autograd.grad(losses.cross_entropy(z, y).sum(), z)
    p = z.softmax(1).gather(1, y[:, None]).detach().numpy()
    np.testing.assert_allclose(focal, calibrate.gradient_factor(p, 3.0) * plain.numpy(), rtol=1e-6, atol=1e-12)


QUARTER = np.array([[2.0, 0.0]] * 4), np.array([0, 0, 0, 1])  # three of four right: T = 2 / log 3, confidence 3 / 4
HALF = np.array([[2.0, 0.0]] * 2), np.array([0, 1])


def test_refinement_is_the_nll_that_no_temperature_takes_away():
    entropy = -(3 * np.log(3 / 4) + np.log(1 / 4)) / 4
    for factor in (1, 7):  # scaling the logits is what it does not see
        assert calibrate.refinement(factor * QUARTER[0], QUARTER[1]) == pytest.approx(entropy, abs=1e-9)
    assert metrics.nll(*QUARTER) > entropy + 0.05


def test_after_scaling_by_hand():
    """The temperature comes from val; only the refinement of test is by its own."""
    found = calibrate.after_scaling(QUARTER, HALF)
    assert found == {
        "val_refinement": pytest.approx(-(3 * np.log(3 / 4) + np.log(1 / 4)) / 4),
        "test_refinement": pytest.approx(np.log(2), abs=1e-4),  # a coin, at T = 100
        "val_temperature": pytest.approx(2 / np.log(3), rel=1e-6),
        "test_nll_scaled": pytest.approx(-(np.log(3 / 4) + np.log(1 / 4)) / 2, rel=1e-6),
        "test_ece_scaled": pytest.approx(3 / 4 - 1 / 2, abs=1e-6),
    }


def test_three_temperatures():
    found = calibrate.temperatures(*QUARTER)
    assert found == {"none": 1, "nll": pytest.approx(2 / np.log(3)), "ece": 1.8}  # the grid's next to 1.82


def test_measure_gives_every_metric_under_every_scaling():
    rows = calibrate.measure({"val": QUARTER, "test": HALF}, {"none": 1.0, "nll": 2 / np.log(3)})
    value = {(row["split"], row["scaling"], row["metric"]): row["value"] for row in rows}
    assert len(rows) == len(value) == 2 * 2 * (len(metrics.METRICS) + 1)
    assert [row["metric"] for row in rows[:8]] == [*metrics.METRICS, "confidence"]
    assert value["test", "none", "error"] == value["test", "nll", "error"] == 1 / 2
    assert value["test", "nll", "confidence"] == pytest.approx(3 / 4, abs=1e-6)
    assert value["val", "nll", "ece"] == pytest.approx(0, abs=1e-6)
    assert value["val", "none", "nll"] == metrics.nll(*QUARTER)


def test_a_masked_class_is_masked_in_every_measure():
    """The middle class of three is never predicted: confidence is what is left for the larger of the others."""
    z = np.log(np.array([[0.2, 0.7, 0.1], [0.3, 0.1, 0.6]]))
    split = z, np.array([0, 0]), (1,)
    rows = calibrate.measure({"test": split}, {"none": 1.0})
    value = {row["metric"]: row["value"] for row in rows}
    assert (value["error"], value["confidence"]) == (0.5, pytest.approx(0.4)) and value["ece"] == pytest.approx(0.7)
    scaled = calibrate.after_scaling(split, split)
    assert scaled["test_ece_scaled"] == pytest.approx(metrics.ece(z / scaled["val_temperature"], split[1], (1,)))
    assert scaled["test_ece_scaled"] != pytest.approx(metrics.ece(z / scaled["val_temperature"], split[1]))
