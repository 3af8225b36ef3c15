import numpy as np
import pytest
from relplot import smECE
from scipy import stats
from sklearn.metrics import roc_auc_score

from focalcal import calibrate, evidence, metrics


@pytest.fixture
def sharp():
    """Over-confident logits, three classes, 700 samples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 700)
    return 3 * (rng.normal(size=(700, 3)) + np.eye(3)[labels]), labels


def test_resamples_are_counts_of_draws_with_replacement():
    counts = evidence.resamples(50, 400)
    assert counts.shape == (400, 50) and (counts.sum(axis=1) == 50).all()
    assert counts.mean() == 1 and counts.var() == pytest.approx(1 - 1 / 50, abs=0.03)  # of a binomial
    assert np.array_equal(counts, evidence.resamples(50, 400))


def test_a_resample_is_measured_as_if_it_were_a_test_set(sharp):
    logits, labels = sharp
    counts = evidence.resamples(700, 3)
    for masked in ((), (1,)):
        resampled = evidence.resampled_metrics(logits, labels, counts, masked=masked)
        for row, drawn in enumerate(counts.astype(int)):
            again = np.repeat(np.arange(700), drawn)
            for name, metric in metrics.METRICS.items():
                value = metric(logits[again], labels[again], masked)
                assert resampled[name][row] == pytest.approx(value, abs=1e-5), name
    certain = np.tile([1.4, 0.0], (700, 1)), (np.arange(700) % 5 == 0).astype(int)  # one confidence, so one bin
    expected = metrics.adaptive_ece(*certain), metrics.adaptive_ece(certain[0], certain[1][::-1])
    again = evidence.resampled_metrics(*certain, np.ones((1, 700), np.float32), ["adaece"])["adaece"]
    assert expected == pytest.approx((again[0], again[0]), abs=1e-6)


def test_the_interval_of_a_mean_is_that_of_theory():
    wrong = np.arange(2000) < 400
    logits = np.stack([np.ones(2000), np.zeros(2000)], axis=1)
    error = evidence.resampled_metrics(logits, wrong.astype(int), evidence.resamples(2000))["error"]
    half = 1.645 * np.sqrt(0.2 * 0.8 / 2000)
    assert evidence.interval(0.2, error, "error") == pytest.approx((0.2 - half, 0.2 + half), abs=1e-3)


def test_another_validation_set_moves_a_scaled_ece_as_far_as_resamples_of_one_say():
    def draw(samples, seed):
        return *calibrated(samples, seed, 1 / 1.5), ()

    fit, test = calibrate.temperature_by_nll, draw(8000, 0)
    truly = [metrics.ece(test[0] / fit(*draw(400, seed)), *test[1:]) for seed in range(1, 101)]
    found = [evidence.moved_by_validation(fit, draw(400, seed), test, ("ece",))["ece"] for seed in range(1, 11)]
    assert np.std(found, axis=1).mean() == pytest.approx(np.std(truly), rel=0.25)


def test_networks_share_the_resampled_validation_sets(sharp):
    logits, labels = sharp

    def by_labels(logits, labels, masked):
        return 1 + labels.mean()  # knows nothing of the network

    one, other = (
        evidence.moved_by_validation(by_labels, (z, labels, ()), (logits, labels, ()), ("nll", "error"), draws=20)
        for z in (logits, -logits)
    )
    assert one["nll"].std() > 0 and np.array_equal(one["nll"], other["nll"])
    assert not one["error"].any()  # which no temperature changes


def test_an_interval_stays_within_what_the_metric_can_be():
    assert evidence.interval(0.9, np.array([0.5, 1.5]), "mce") == pytest.approx((0.45, 1.0))
    assert evidence.interval(0.1, np.array([-0.4, 0.6]), "nll") == pytest.approx((0.0, 0.55))


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=1000)  # what the test set does to both alike
    noise = 0.01 * rng.normal(size=1000)
    found = evidence.difference([0.5], [0.4], (0.5 + shared)[None], (0.4 + shared + noise)[None])
    assert found["difference"] == pytest.approx(0.1) and found["high"] - found["low"] == pytest.approx(
        2 * 1.645 * 0.01, rel=0.1
    )
    assert found["p"] < 1e-10
    assert evidence.difference([0.5], [0.5], shared[None], shared[None])["p"] == 1


def test_seeds_widen_the_interval():
    ours, theirs, same = np.array([0.2, 0.5, 0.8]), np.zeros(3), np.zeros((3, 100))
    found = evidence.difference(ours, theirs, same, same)
    t = stats.ttest_1samp(ours, 0)  # nothing but the seeds varies
    assert found["p"] == pytest.approx(t.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(t.confidence_interval(0.90)))


def test_the_freedom_of_a_difference_by_hand():
    """Half the variance from two seeds, half from the test set: (2 - 1) x (0.01 + 0.01)^2 / 0.01^2 = 4."""
    drawn = np.sqrt(0.005) * np.array([[1, -1], [1, -1]])
    found = evidence.difference([0.2, 0.4], [0.0, 0.0], drawn, np.zeros((2, 2)))
    half = stats.t.ppf(0.95, 4) * np.sqrt(0.02)
    assert found["freedom"] == pytest.approx(4) and found["high"] - found["difference"] == pytest.approx(half)
    assert found["p"] == pytest.approx(2 * stats.t.sf(0.3 / np.sqrt(0.02), 4))

    # and two validation sets, 0.2 apart: as much variance again, (3 x 0.01)^2 / (0.01^2 + 0.01^2) = 4.5
    sets = np.array([[0.1, 0.3], [0.3, 0.5]])
    found = evidence.difference(sets, np.zeros((2, 2)), drawn, np.zeros((2, 2)))
    half = stats.t.ppf(0.95, 4.5) * np.sqrt(0.03)
    assert found["freedom"] == pytest.approx(4.5) and found["high"] - found["difference"] == pytest.approx(half)


def test_holm_by_hand():
    assert evidence.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm([0.5, 0.9]).tolist() == [1, 1]
    verdicts = evidence.verdicts([-0.1, 0.1, -0.1], [0.1, 0.01, 0.1001])
    assert verdicts == ["better", "worse", "not distinguishable"]


def calibrated(samples, seed, temperature=1.0):
    """Logits whose labels are drawn from their own softmax, then divided by a temperature."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(samples, 4))
    probs = np.exp(metrics.log_softmax(logits))
    labels = (probs.cumsum(axis=1) > rng.random((samples, 1))).argmax(axis=1)
    return logits / temperature, labels


def test_the_bias_of_ece_is_seen_and_removed():
    """A calibrated model: binned ECE grows as the test set shrinks, the debiased error stays near 0."""
    ece = [np.mean([metrics.ece(*calibrated(n, seed)) for seed in range(20)]) for n in (200, 20_000)]
    debiased = [
        np.mean([evidence.debiased_error(*calibrated(n, seed)) ** 2 for seed in range(20)]) for n in (200, 20_000)
    ]
    assert ece[0] > 0.05 and ece[1] < 0.01
    assert np.sqrt(debiased[0]) < 0.05 and np.sqrt(debiased[1]) < 0.006


def test_nine_in_ten_intervals_hold_what_other_test_sets_give():
    """Of a nearly calibrated model, whose resampled ECE is biased by as much as the interval is wide."""
    expected = np.mean([metrics.ece(*calibrated(2000, seed, 1.1)) for seed in range(300)])
    held, counts = [], evidence.resamples(2000)
    for seed in range(1000, 1100):
        logits, labels = calibrated(2000, seed, 1.1)
        drawn, value = evidence.resampled_metrics(logits, labels, counts, ["ece"])["ece"], metrics.ece(logits, labels)
        low, high = evidence.interval(value, drawn, "ece")
        assert 0 <= low <= value <= high
        held.append(low <= expected <= high)
    assert 0.85 <= np.mean(held) <= 0.95  # the plain percentile interval: 0.77


def test_debiased_error_by_hand():
    # one bin of four with confidence 0.9, three right: (0.9 - 0.75)^2 - 0.75 * 0.25 / 3 = -0.04; with one right instead
    logits = np.log([[0.9, 0.1]] * 4)
    assert evidence.debiased_error(logits, np.array([0, 0, 0, 1]), bins=1) == 0
    by_hand = np.sqrt((0.9 - 0.25) ** 2 - 0.25 * 0.75 / 3)
    assert evidence.debiased_error(logits, np.array([0, 1, 1, 1]), bins=1) == pytest.approx(by_hand)


def test_a_debiased_error_needs_a_bin_of_two():
    assert np.isnan(evidence.debiased_error(np.random.default_rng(0).normal(size=(10, 3)), np.zeros(10, int)))


def test_resamples_without_a_value_are_left_out():
    """The AUROC of a resample without a wrong answer is not a number; that decides nothing."""
    ours, theirs = np.array([[0.8, 0.9, np.nan, 0.85]]), np.array([[0.7, np.nan, 0.9, 0.9]])
    kept = evidence.difference([0.85], [0.8], ours[:, [0, 3]], theirs[:, [0, 3]])
    assert evidence.difference([0.85], [0.8], ours, theirs) == kept and 0 < kept["p"] < 1
    assert evidence.interval(0.8, ours[0], "auroc") == evidence.interval(0.8, ours[0, [0, 1, 3]], "auroc")


def direct_smooth_ece(confidence, correct, width):
    """The definition: residuals smoothed by a Gaussian reflected at 0 and 1, integrated by the trapezoidal rule."""
    grid = np.linspace(0, 1, 4001)
    total = np.zeros_like(grid)
    for mirror in (confidence, -confidence, 2 - confidence):
        total += ((correct - confidence) * stats.norm.pdf(grid[:, None], mirror, width)).sum(axis=1) / len(confidence)
    return np.trapezoid(np.abs(total), grid)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_smooth_ece_against_its_definition_and_relplot(temperature):
    logits, labels = calibrated(300, 0, temperature)
    confidence, correct = metrics.confidence_correct(logits, labels)
    value = evidence.smooth_ece(logits, labels)
    assert direct_smooth_ece(confidence.astype(float), correct, value) == pytest.approx(value, abs=2e-4)
    assert smECE(confidence.astype(float), correct.astype(float)) == pytest.approx(value, rel=0.03, abs=1e-3)


def test_proper_scores_split(sharp):
    parts = evidence.brier_split(*sharp)
    confidence, correct = metrics.confidence_correct(*sharp)
    assert parts["brier_top"] == pytest.approx(((confidence - correct) ** 2).mean())
    whole = parts["miscalibration"] - parts["discrimination"] + parts["uncertainty"]
    assert whole == pytest.approx(parts["brier_top"]) and min(parts.values()) >= 0


def test_miscalibration_by_hand():
    # two say 0.8 and one is right, two say 0.6 and both are right: isotonic gives 3/4 to all
    logits = np.log([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
    parts = evidence.brier_split(logits, np.array([0, 1, 0, 0]))
    score = (0.2**2 + 0.8**2 + 2 * 0.4**2) / 4
    assert parts["miscalibration"] == pytest.approx(score - 3 / 16)
    assert parts["discrimination"] == pytest.approx(0) and parts["uncertainty"] == pytest.approx(3 / 16)


def test_the_best_and_what_is_not_told_apart_from_it():
    noise = np.random.default_rng(0).normal(scale=0.01, size=(3, 1, 500))
    values = {"good": np.array([0.10]), "near": np.array([0.105]), "bad": np.array([0.30])}
    draws = {name: value + part for (name, value), part in zip(values.items(), noise, strict=True)}
    assert evidence.best_and_tied(values, draws) == ("good", ["near"])


def test_the_best_is_corrected_for_all_pairs():
    """1.8 and 1.9 standard errors: alone p is 0.07 and 0.06, of three pairs 0.17."""
    draws = {"good": np.zeros(500), "near": np.tile([1.0, -1.0], 250), "far": np.repeat([1.0, -1.0], 250)}
    values = {"good": np.array([10.0]), "near": np.array([11.8]), "far": np.array([11.9])}
    assert evidence.best_and_tied(values, {n: d[None] for n, d in draws.items()}) == ("good", ["near", "far"])


def test_the_floor_of_an_ece():
    """One bin, all confidences q: the ECE is |q - share right|, on average about sqrt(2 q (1 - q) / (pi N))."""
    q, samples = 0.8, 2500
    logits = np.tile(np.log([q, 1 - q]), (samples, 1))
    expected = np.sqrt(2 * q * (1 - q) / (np.pi * samples))
    assert evidence.chance_ece(logits, draws=4000) == pytest.approx(expected, rel=0.04)
    assert evidence.chance_ece(np.tile([50.0, 0.0], (10, 1))) == pytest.approx(0, abs=1e-6)  # certain: always right
    two = np.log(np.repeat([[0.6, 0.4], [0.9, 0.1]], 100, axis=0))  # in one bin their gaps may cancel
    whole = np.sqrt(2 / np.pi * (0.6 * 0.4 + 0.9 * 0.1) / 2 / 200)
    assert evidence.chance_ece(two, draws=4000, bins=1) == pytest.approx(whole, rel=0.04)
    assert evidence.chance_ece(two, draws=4000) > 1.3 * whole


def test_selective_prediction_by_hand():
    """Confidences .9 .8 .7 .6, the second wrong: risks 0, 1/2, 1/3, 1/4; at best 0, 0, 0, 1/4; one pair of three."""
    confidence, correct, once = np.array([0.8, 0.9, 0.6, 0.7]), np.array([0, 1, 1, 1], bool), np.ones((1, 4))
    found = evidence.selective(confidence, correct, once)
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found["eaurc"] == pytest.approx((1 / 2 + 1 / 3) / 4) and found["auroc"] == pytest.approx(1 / 3)
    coverage, risk = evidence.risk_coverage(confidence, correct)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    twice = evidence.selective(np.tile(confidence, 2), np.tile(correct, 2), np.ones((1, 8)))  # ties
    assert twice["aurc"] == pytest.approx(found["aurc"]) and twice["auroc"] == pytest.approx(found["auroc"])
    assert evidence.selective(confidence, correct, 2 * once)["aurc"] == pytest.approx(found["aurc"])


def test_selective_prediction_at_its_ends_and_beside_scikit_learn():
    random = np.random.default_rng(0)
    correct, once = random.random(5000) < 0.8, np.ones((1, 5000))
    assert evidence.selective(correct + random.random(5000), correct, once)["eaurc"] == pytest.approx(0, abs=1e-9)
    confidence = random.random(5000).round(2)  # with ties, and knowing nothing
    found = evidence.selective(confidence, correct, once)
    assert found["aurc"] == pytest.approx(0.2, abs=0.02)
    assert found["auroc"] == pytest.approx(roc_auc_score(correct, confidence))
    counts = evidence.resamples(5000, 3)
    drawn = np.repeat(np.arange(5000), counts[1].astype(int))
    again = evidence.selective(confidence[drawn], correct[drawn], once)
    assert evidence.selective(confidence, correct, counts)["aurc"][1] == pytest.approx(again["aurc"])


def test_a_difference_counts_the_seeds_that_both_have():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 50)), random.normal(size=(3, 50))
    short = evidence.difference([1.0, 2.0], [1.5, 2.7], one, other[:2])
    assert evidence.difference([1.0, 2.0], [1.5, 2.7, 9.0], one, other) == short


def test_a_resampled_auroc_is_that_of_the_samples_drawn():
    rng = np.random.default_rng(2)
    near, far = rng.normal(size=(300, 4)).round(1), 0.7 * rng.normal(size=(80, 4)).round(1)  # rounded: with ties
    near[:40], far[:10] = 0, 0
    counts = [evidence.resamples(len(logits), 4, seed) for seed, logits in enumerate((near, far))]
    for score in ("entropy", "confidence"):
        scores = [metrics.strangeness(logits, score) for logits in (near, far)]
        again = [
            [np.repeat(x, n[row].astype(int), axis=0) for x, n in zip((near, far), counts, strict=True)]
            for row in range(4)
        ]
        expected = [metrics.auroc(*pair, score) for pair in again]
        assert evidence.resampled_auroc(*scores, *counts) == pytest.approx(expected, abs=1e-6)


def test_the_interval_of_an_auroc_is_that_of_theory():
    """Scores without ties: DeLong's standard error, from the spread of each sample's share of pairs won."""
    rng = np.random.default_rng(3)
    near, far = rng.normal(size=900), 0.8 + rng.normal(size=300)
    won = far[:, None] > near
    error = np.sqrt(won.mean(axis=0).var(ddof=1) / 900 + won.mean(axis=1).var(ddof=1) / 300)
    drawn = evidence.resampled_auroc(near, far, evidence.resamples(900, seed=0), evidence.resamples(300, seed=1))
    low, high = evidence.interval(won.mean(), drawn, "auroc")
    assert (low, high) == pytest.approx((won.mean() - 1.645 * error, won.mean() + 1.645 * error), abs=0.1 * error)
