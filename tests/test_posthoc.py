import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from focalcal import calibrate, metrics, posthoc


def drawn(samples, seed, distort=lambda z: z):
    """Distorted logits of labels drawn from softmax(z): z is what calibration should give back."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(samples, 4))
    probs = np.exp(metrics.log_softmax(z))
    labels = (probs.cumsum(axis=1) > rng.random((samples, 1))).argmax(axis=1)
    return distort(z), labels, z


FACTORS, OFFSETS = np.array([2.0, 1.0, 0.5, 1.5]), np.array([0.5, -0.5, 0.0, 1.0])
MIXED = np.eye(4) + 0.8 * np.roll(np.eye(4), 1, axis=1)  # every class leaks into the next
DISTORTIONS = {
    "temperature_nll": lambda z: 3 * z,
    "temperature_ece": lambda z: 3 * z,
    "focal_temperature": lambda z: 3 * z,
    "vector": lambda z: (z - OFFSETS) / FACTORS,
    "matrix": lambda z: z @ np.linalg.inv(MIXED),
    "isotonic": lambda z: 3 * z,
    "histogram": lambda z: 3 * z,
    "top_label": lambda z: 3 * z,
}


@pytest.mark.parametrize("method", DISTORTIONS)
def test_each_method_undoes_the_distortion_it_is_made_for(method):
    apply = posthoc.fit(method, *drawn(20_000, 0, DISTORTIONS[method])[:2])
    logits, labels, z = drawn(10_000, 1, DISTORTIONS[method])
    fixed = apply(logits)
    assert np.exp(fixed).sum(axis=1) == pytest.approx(1)
    rough = method in ("isotonic", "histogram")  # one class against the rest cannot undo it exactly
    if method != "top_label":  # of the other classes, it leaves the proportions as they are
        assert metrics.nll(fixed, labels) == pytest.approx(metrics.nll(z, labels), abs=0.06 if rough else 0.003)
    assert metrics.ece(fixed, labels) < (0.03 if rough else 0.02) < 0.1 < metrics.ece(logits, labels)


def test_only_a_full_matrix_undoes_a_mixture_of_classes():
    """The probabilities themselves come back; a factor and an offset per class leave them far off."""
    validation, (logits, _, z) = drawn(20_000, 0, DISTORTIONS["matrix"]), drawn(10_000, 1, DISTORTIONS["matrix"])
    true = np.exp(metrics.log_softmax(z))
    off = {m: np.abs(np.exp(posthoc.fit(m, *validation[:2])(logits)) - true).mean() for m in ("vector", "matrix")}
    assert off["matrix"] < 0.01 and off["vector"] > 0.1


def test_none_changes_nothing_but_the_scale():
    logits, labels, _ = drawn(50, 0)
    assert metrics.nll(posthoc.fit("none", logits, labels)(logits), labels) == pytest.approx(
        metrics.nll(logits, labels)
    )


def test_focal_temperature_undoes_the_focal_loss():
    """Two classes: the focal loss is least at the q with p / (1 - p) = q / g(q) : (1 - q) / g(1 - q)."""
    gamma, q = 3.0, np.linspace(0.02, 0.98, 49)
    odds = q / calibrate.gradient_factor(q, gamma) * calibrate.gradient_factor(1 - q, gamma) / (1 - q)
    p = odds / (1 + odds)
    grid = np.linspace(1e-4, 1 - 1e-4, 9999)
    for true, said in zip(p[::8], q[::8], strict=True):
        risk = -true * (1 - grid) ** gamma * np.log(grid) - (1 - true) * grid**gamma * np.log(1 - grid)
        assert grid[risk.argmin()] == pytest.approx(said, abs=2e-3)
    fixed = posthoc._focal_map(np.log(np.stack([q, 1 - q], axis=1)), gamma)
    assert np.exp(fixed[:, 0]) == pytest.approx(p)


def test_focal_temperature_finds_the_gamma():
    rng = np.random.default_rng(0)
    z = 1.5 * rng.normal(size=(4000, 4))
    true = np.exp(posthoc._focal_map(metrics.log_softmax(z), 3.0))
    labels = (true.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    off = {m: np.abs(np.exp(posthoc.fit(m, z, labels)(z)) - true).mean() for m in posthoc.METHODS if "temp" in m}
    assert off["focal_temperature"] < 0.005 < 0.01 < off["temperature_nll"]


def test_a_masked_class_is_masked_in_the_choice_of_t():
    logits = np.random.default_rng(1).normal(size=(700, 4)) * 3
    labels = np.random.default_rng(2).integers(0, 3, 700)
    wanted = metrics.log_softmax(logits / calibrate.temperature_by_ece(logits, labels, (3,)))
    assert posthoc.fit("temperature_ece", logits, labels, (3,))(logits) == pytest.approx(wanted)


def test_isotonic_and_histogram_by_hand():
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 1])
    isotonic = np.exp(posthoc.fit("isotonic", logits, labels)(logits))[:, 0]
    assert isotonic == pytest.approx([1, 0.5, 0.5, 0], abs=1e-6)
    # two bins: for either class up to the third smallest probability (share 1/3), and the largest (share 1)
    halves = np.exp(posthoc.histogram(logits, labels, bins=2)(logits))[:, 0]
    assert halves == pytest.approx([1 / (1 + 1 / 3), 1 / 2, 1 / 2, 1 / 3 / (1 + 1 / 3)])


def test_top_label_binning_by_hand():
    """Confidences 0.5, 0.6, 0.7 and 0.9 in two bins, cut at the third: one of three is right, and one of one."""
    probs = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7], [0.9, 0.06, 0.04]])
    labels = np.array([1, 1, 0, 0])
    third, apply = 1 / 3, posthoc.top_label(np.log(probs), labels, bins=2)
    # Of the rest, 2/3, the first sample's other classes would get 3/5 and 2/5, and the runner-up would overtake with
    # 0.4; at 1/3 all three are level. The last says 1 - 1e-12 at most.
    fixed = np.exp(apply(np.log(probs)))
    assert fixed[:3] == pytest.approx(np.full((3, 3), third), abs=1e-5)
    assert fixed[3] == pytest.approx([1, 0, 0], abs=1e-9)
    labels = np.array([0, 1, 0, 1])  # two of three, and none of one: lifted to 1/3
    fixed = np.exp(posthoc.top_label(np.log(probs), labels, bins=2)(np.log(probs)))
    assert fixed[0] == pytest.approx([2 / 3, third * 0.3 / 0.5, third * 0.2 / 0.5])
    assert fixed[2] == pytest.approx([third * 0.1 / 0.3, third * 0.2 / 0.3, 2 / 3])
    assert fixed[3] == pytest.approx([third] * 3, abs=1e-5)
    # accuracy 0.5 in one bin, and a runner-up with 0.64 of 0.66: half of the rest is its due, so it ends just below
    z = np.log([[0.34, 0.33 * 0.98, 0.33 * 1.02]])
    fixed = np.exp(posthoc.top_label(np.log(probs), np.array([0, 1, 0, 1]), bins=1)(z))
    assert fixed[0] == pytest.approx([0.5, 0.5 * 0.49, 0.5 * 0.51])


@pytest.mark.parametrize("masked", [(), (2,)])
def test_top_label_binning_keeps_predictions_and_says_the_accuracy_of_its_bin(masked):
    logits, labels, _ = drawn(400, 5, lambda z: 20 * z)  # so sure that a probability of 1 leaves nothing to share
    logits[:3] *= 10
    labels = np.where(np.arange(400) % 3 == 0, (labels + 1) % 4, labels)  # and often wrong
    fixed = posthoc.fit("top_label", logits, labels, masked)(logits)
    assert (metrics.predictions(fixed, masked) == metrics.predictions(logits, masked)).all()
    assert np.exp(fixed).sum(axis=1) == pytest.approx(1)
    confidence, correct = metrics.confidence_correct(fixed, labels, masked)
    assert 3 < len(set(confidence.round(5))) <= metrics.BINS
    for value in set(confidence.round(5)):  # at least 1 / 4, to stay the largest of four
        assert value == pytest.approx(max(1 / 4, correct[confidence.round(5) == value].mean()), abs=1e-4)


def test_matrix_scaling_with_a_class_that_validation_lacks():
    logits, labels, _ = drawn(300, 0)
    labels[labels == 2] = 1
    apply = posthoc.fit("matrix", logits, labels)
    assert apply(logits).shape == (300, 4) and np.exp(apply(logits))[:, 2].max() < 1e-9
    with pytest.raises(ValueError, match="Unknown method 'platt'; choose one of: none"):
        posthoc.fit("platt", logits, labels)


def test_vector_scaling_is_least_among_its_kind():
    logits, labels, _ = drawn(500, 3, lambda z: 2 * z)
    best = metrics.nll(posthoc.fit("vector", logits, labels)(logits), labels)
    assert best <= metrics.nll(posthoc.fit("temperature_nll", logits, labels)(logits), labels) + 1e-9
    full = LogisticRegression(C=1e6, max_iter=5000).fit(logits, labels).predict_proba(logits)
    assert best >= metrics.nll(np.log(full), labels) - 1e-6


def test_fits_run_to_their_end():
    """Where an optimiser stops must not show in the third digit of an ECE, so neither machine nor scale does."""
    logits, labels, _ = drawn(800, 4, lambda z: 5 * z)
    for method in ("temperature_nll", "focal_temperature", "vector"):
        one, other = posthoc.fit(method, logits, labels), posthoc.fit(method, 7 * logits, labels)
        assert one(logits) == pytest.approx(other(7 * logits), abs=1e-4), method
    apart = logits + 40 * np.eye(4)[0] * (labels == 0)[:, None]  # a class told apart without a fault
    one, other = posthoc.fit("vector", apart, labels), posthoc.fit("vector", 7 * apart, labels)
    assert one(apart) == pytest.approx(other(7 * apart), abs=1e-4)
    scaled = logits / np.abs(logits).max()
    exact = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-10).fit(scaled, labels)
    found = posthoc.fit("matrix", logits, labels)(logits)
    assert np.exp(found) == pytest.approx(exact.predict_proba(scaled), abs=1e-5)


@pytest.mark.parametrize("method", ["histogram", "top_label"])
def test_a_bin_without_samples_has_the_share_of_its_neighbour(method):
    """300 confidences of 0.9, 90 % right, and 100 of 0.6, all right: 0.95, beyond them, is as 0.9."""
    logits = np.log(np.repeat([[0.9, 0.1], [0.6, 0.4]], [300, 100], axis=0))
    labels = (np.arange(400) % 10 == 0) & (np.arange(400) < 300)
    found = np.exp(posthoc.fit(method, logits, labels.astype(int))(np.log([[0.95, 0.05], [0.9, 0.1]])))
    assert found == pytest.approx(np.tile([0.9, 0.1], (2, 1)), abs=1e-3)


@pytest.mark.parametrize("method", posthoc.METHODS)
def test_a_map_refuses_logits_that_do_not_fit(method):
    apply = posthoc.fit(method, *drawn(200, 0)[:2])
    for bad, message in ((np.zeros((5, 3)), "fitted on 4 classes"), (np.full((5, 4), np.nan), "NaN")):
        with pytest.raises(ValueError, match=message):
            apply(bad)


def test_the_factors_of_vector_scaling_are_held_to_one_over_the_temperature():
    """Five samples, one of them wrong; held to -1 / T instead, the second factor would be negative."""
    logits = np.array([[40.0, 0], [30, 0], [0, 30], [0, 20], [10, 0]])
    labels = np.array([0, 0, 1, 1, 1])
    none, first, second = np.diff(posthoc.fit("vector", logits, labels)(np.array([[0.0, 0], [1, 0], [0, 1]]))).ravel()
    factors = np.array([none - first, second - none]) * calibrate.temperature_by_nll(logits, labels)
    assert (factors > 0.9).all() and (factors < 3).all()
