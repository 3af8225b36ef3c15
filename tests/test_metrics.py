import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from focalcal import metrics


@pytest.fixture
def random():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2000, 6)) * 2, rng.integers(0, 6, 2000)


def binary(*confidence_correct):
    """Two-class logits and labels with the given (confidence, is right) pairs; class 0 is always predicted."""
    p = np.array([confidence for confidence, _ in confidence_correct])
    with np.errstate(divide="ignore"):
        return np.stack([np.log(p), np.log(1 - p)], axis=1), np.array([0 if ok else 1 for _, ok in confidence_correct])


def test_values_by_hand():
    z, y = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]), np.array([1, 1])
    assert metrics.nll(z, y) == pytest.approx(-(math.log(0.2) + math.log(0.6)) / 2)
    assert metrics.error(z, y) == 0.5
    assert metrics.brier(z, y) == pytest.approx(((0.7**2 + 0.8**2 + 0.1**2) + (0.1**2 + 0.4**2 + 0.3**2)) / 2)
    assert metrics.ece(z, y) == pytest.approx((0.7 + 0.4) / 2)
    assert metrics.mce(z, y) == pytest.approx(0.7)
    # classes 0 and 1 only, since no label 2 occurs: |0.7| + |0.1|, then |0.2 - 1| + |0.6 - 1|, each over 2 samples
    assert metrics.classwise_ece(z, y) == pytest.approx(((0.7 + 0.1) / 2 + (0.8 + 0.4) / 2) / 2)


def test_ece_by_hand_with_shared_and_empty_bins():
    # 15 bins of 1/15: 0.62, 0.64 share (0.6, 0.667]; 0.9 is alone in (0.867, 0.933]; the others are empty
    z, y = binary((0.62, True), (0.64, False), (0.9, True))
    assert metrics.ece(z, y) == pytest.approx(2 / 3 * abs((0.62 + 0.64) / 2 - 1 / 2) + 1 / 3 * (1 - 0.9), abs=1e-7)
    assert metrics.mce(z, y) == pytest.approx(abs((0.62 + 0.64) / 2 - 1 / 2), abs=1e-7)


def test_bins_are_open_below_and_closed_above_and_take_zero_and_one():
    edges = metrics.equal_width_edges(5)
    count, _, _ = metrics.bin_sums([0, 0.2, 0.2000001, 0.6, 1], [0] * 5, edges)
    assert count.tolist() == [2, 1, 1, 0, 1]
    count, _, _ = metrics.bin_sums(edges, [0] * 6, edges)
    assert count.tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("bins", [1, 5, 15, 100])
def test_the_fast_index_is_right_next_to_every_edge(bins):
    edges = metrics.equal_width_edges(bins)
    values = np.concatenate([edges, np.nextafter(edges[1:], np.float32(0)), np.nextafter(edges[:-1], np.float32(1))])
    assert np.array_equal(metrics.equal_width_index(values, bins), np.searchsorted(edges[1:-1], values))


def test_certainty_is_legal():
    z, y = np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0])
    assert metrics.ece(z, y) == pytest.approx(0.5)  # one right and one wrong, both at confidence 1
    assert metrics.nll(z, y) == pytest.approx(5000)
    assert metrics.classwise_ece(z, y) == pytest.approx(0.5)
    assert metrics.adaptive_ece(z, y) == pytest.approx(0.5)


def test_adaptive_bins_hold_equal_numbers(random):
    confidence, correct = metrics.confidence_correct(*random)
    count, _, _ = metrics.bin_sums(confidence, correct, metrics.equal_mass_edges(confidence, 10))
    assert count.sum() == 2000 and count.min() >= 199 and count.max() <= 202


def test_one_bin_holds_the_difference_of_the_means(random):
    confidence, correct = metrics.confidence_correct(*random)
    for error in (metrics.ece, metrics.adaptive_ece):
        assert error(*random, bins=1) == pytest.approx(abs(confidence.mean() - correct.mean()))
        assert error(*random, bins=15) == error(*random)


def published_loop(confidence, correct, edges):
    """ECE as in the published code: a loop over bins, lower edge open."""
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += abs(confidence[inside].mean() - correct[inside].mean()) * inside.mean()
    return total


def test_against_the_published_loops(random):
    z, y = random
    confidence, correct = metrics.confidence_correct(z, y)
    assert metrics.ece(z, y) == pytest.approx(
        published_loop(confidence, correct, metrics.equal_width_edges()), abs=1e-6
    )
    edges = metrics.equal_mass_edges(confidence)
    # the published adaptive ECE drops the least confident sample, ours keeps it: at most 1 / N apart
    assert metrics.adaptive_ece(z, y) == pytest.approx(published_loop(confidence, correct, edges), abs=1 / 2000)
    probs = torch.tensor(z).softmax(1).float().numpy()
    classes = [published_loop(probs[:, k], y == k, metrics.equal_width_edges()) for k in range(6)]
    assert metrics.classwise_ece(z, y) == pytest.approx(np.mean(classes), abs=1e-6)


def test_against_torchmetrics_and_scikit_learn(random):
    z, y = random
    torch_z, torch_y, probs = torch.tensor(z), torch.tensor(y), torch.tensor(z).softmax(1).numpy()
    for ours, norm in ((metrics.ece, "l1"), (metrics.mce, "max")):
        theirs = multiclass_calibration_error(torch_z.softmax(1), torch_y, num_classes=6, n_bins=15, norm=norm).item()
        assert ours(z, y) == pytest.approx(theirs, abs=1e-6)
    assert metrics.nll(z, y) == pytest.approx(sklearn_metrics.log_loss(y, probs))
    assert metrics.error(z, y) == pytest.approx(1 - sklearn_metrics.accuracy_score(y, z.argmax(1)))
    one_hot = np.eye(6)[y]
    each = sum(sklearn_metrics.brier_score_loss(one_hot[:, k], probs[:, k]) for k in range(6))
    assert metrics.brier(z, y) == pytest.approx(each)


def test_a_class_that_no_label_names(random):
    z, y = random
    y = np.where(y == 3, 2, y)
    assert np.isfinite([metric(z, y) for metric in metrics.METRICS.values()]).all()
    probs, edges = torch.tensor(z).softmax(1).numpy(), metrics.equal_width_edges()
    each = [metrics.calibration_error(probs[:, k], y == k, edges) for k in range(6)]
    assert metrics.classwise_ece(z, y) == pytest.approx(np.mean(each), abs=1e-6)


def test_auroc_by_hand():
    familiar, strange = (np.log([[p, 1 - p] for p in ps]) for ps in ((0.9, 0.6), (0.7, 0.5)))
    assert metrics.auroc(familiar, strange) == metrics.auroc(familiar, strange, "confidence") == 3 / 4
    assert metrics.auroc(familiar, familiar) == 1 / 2
    one, other = np.log([[0.6, 0.2, 0.2]]), np.log([[0.55, 0.45 - 1e-9, 1e-9]])  # less entropy, and less confidence
    assert (metrics.auroc(one, other), metrics.auroc(one, other, "confidence")) == (0, 1)
    with pytest.raises(ValueError, match="score must be entropy or confidence, got 'confidnce'"):
        metrics.auroc(familiar, strange, "confidnce")
    with pytest.raises(ValueError, match="logits must have shape"):
        metrics.auroc(familiar, strange[:, 0])


def test_summary_by_hand():
    z, y = binary((0.9, True), (0.8, False), (0.6, True))

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    row = metrics.summary(z, y)
    assert tuple(row) == metrics.SUMMARY
    assert row["nll_correct"] == pytest.approx(-(math.log(0.9) + math.log(0.6)) / 3)  # parts of the mean over all three
    assert row["nll_incorrect"] == pytest.approx(-math.log(0.2) / 3)
    assert row["entropy_correct"] == pytest.approx((entropy(0.9) + entropy(0.6)) / 2)
    assert row["entropy_incorrect"] == pytest.approx(entropy(0.8))
    assert row["error"] == pytest.approx(1 / 3) and row["confidence"] == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    certain = metrics.summary(np.array([[9.0, 0.0]]), np.array([0]))
    assert certain["nll_incorrect"] == 0 and np.isnan(certain["entropy_incorrect"])


def test_summary_repeats_the_metrics(random):
    row = metrics.summary(*random)
    for name in ("nll", "error", "ece", "adaece"):
        assert row[name] == pytest.approx(metrics.METRICS[name](*random), abs=1e-12), name
    assert row["nll_correct"] + row["nll_incorrect"] == pytest.approx(row["nll"])


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), "labels must have shape"),
        (np.zeros(3), np.zeros(3, int), "logits must have shape"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty"),
        (np.zeros((2, 2)), np.array([0, 2]), "labels must lie in 0..1"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "integers"),
        (np.array([[0.0, np.nan]]), np.zeros(1, int), "NaN or infinite"),
        (np.array([["1", "2"]]), np.zeros(1, int), "logits must be real numbers, got <U1"),
    ],
)
def test_bad_input_is_named(logits, labels, words):
    with pytest.raises(ValueError, match=words):
        metrics.ece(logits, labels)


@pytest.mark.parametrize("bins", [0, -1, 15.0])
def test_bins_are_counted(random, bins):
    for metric in (metrics.ece, metrics.adaptive_ece, metrics.classwise_ece):
        with pytest.raises(ValueError, match=f"bins must be a whole number from 1 on, got {bins}"):
            metric(*random, bins=bins)


def test_whole_numbers_are_logits_too():
    small, labels = np.array([[3, 5], [9, 1]], np.uint8), np.array([1, 0])
    for metric in metrics.METRICS.values():
        assert metric(small, labels) == metric(small.astype(float), labels)


def test_labels_of_few_bits_count_as_others_do():
    logits, labels = np.random.default_rng(0).normal(size=(300, 128)), np.random.default_rng(1).integers(128, size=300)
    labels[0] = 127
    for metric in metrics.METRICS.values():
        assert metric(logits, labels.astype(np.int8)) == metric(logits, labels)


def test_a_masked_class_is_never_predicted_and_keeps_its_share():
    """Three classes, the middle one masked: (0.2, 0.7, 0.1) is a prediction of class 0 with confidence 0.2."""
    z, y = np.log([[0.2, 0.7, 0.1], [0.3, 0.1, 0.6]]), np.array([0, 0])
    confidence, correct = metrics.confidence_correct(z, y, (1,))
    assert confidence == pytest.approx([0.2, 0.6]) and correct.tolist() == [True, False]
    assert metrics.error(z, y, (1,)) == 0.5 and metrics.error(z, y) == 1
    assert metrics.ece(z, y, (1,)) == pytest.approx((0.8 + 0.6) / 2)
    assert metrics.mce(z, y, (1,)) == pytest.approx(0.8) == metrics.mce(z, y, np.array([1]))
    for plain in (metrics.nll, metrics.brier, metrics.classwise_ece):  # which ask for no prediction
        assert plain(z, y, (1,)) == plain(z, y)
    summary = metrics.summary(z, y, (1,))
    assert summary["ece"] == metrics.ece(z, y, (1,)) and summary["confidence"] == pytest.approx(0.4)
    sure = np.array([[0.0, 500.0, -1.0]])  # far beyond what exp can hold
    assert metrics.confidence_correct(sure, [0], (1,))[0] == pytest.approx(0, abs=1e-30)
    assert np.isfinite([metric(sure, np.array([0]), (1,)) for metric in metrics.METRICS.values()]).all()
    for masked in ((1, 2), (3,), (-1,)):
        with pytest.raises(ValueError, match="masked must leave 2 of the 3 classes or more"):
            metrics.error(z, y, masked)
