"""How far a number can be trusted: resampled test sets, differences between losses, and the bias of binned errors.

A resampled test set is a row of counts, how often each test sample is drawn; all losses, seeds and temperatures share
the rows, so that differences are paired. Fractions throughout, as in metrics.
"""

from itertools import combinations

import numpy as np
from scipy import stats
from scipy.special import digamma
from sklearn.isotonic import IsotonicRegression

from focalcal import metrics

SMALLEST = 1e-3  # p-value that is told from a smaller one
RESAMPLES, LEVEL = 1000, 0.90  # Mukhoti et al. 2020: 1000 resamples, intervals of 90 %
LARGEST = {"nll": np.inf, "brier": 2.0}  # a metric's largest value, where it is not 1


def resamples(samples: int, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of ``samples`` is in each bootstrap resample: (count, samples) float32, rows sum to samples."""
    drawn = np.random.default_rng(seed).integers(samples, size=(count, samples))
    drawn += samples * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples).astype(np.float32)


def resampled_metrics(logits, labels, counts, names=tuple(metrics.METRICS), masked=()) -> dict[str, np.ndarray]:
    """The named metrics of metrics.METRICS on every resample: name -> (len(counts),).

    As there, but for rounding; bins of equal mass are cut anew in every resample.
    """
    logits, labels = metrics.check(logits, labels)
    n, bins, samples = len(labels), metrics.BINS, np.arange(len(labels))
    log_probs = metrics.log_softmax(logits)
    probs = np.exp(log_probs)
    confidence, correct = metrics.confidence_correct(logits, labels, masked)
    brier = (probs**2).sum(axis=1) - 2 * probs[samples, labels] + 1
    means = counts @ np.stack([~correct, -log_probs[samples, labels], brier], axis=1).astype(np.float32) / n
    found = {"error": means[:, 0], "nll": means[:, 1], "brier": means[:, 2]}

    residual, index = (confidence - correct).astype(np.float32), metrics.equal_width_index(confidence, bins)
    inside = np.zeros((n, 2 * bins), np.float32)
    inside[samples, index], inside[samples, bins + index] = residual, 1
    sums = counts @ inside
    gaps, held = np.abs(sums[:, :bins]), sums[:, bins:]
    found |= {"ece": gaps.sum(axis=1) / n, "mce": (gaps / np.maximum(held, 1)).max(axis=1)}
    if "adaece" in names:
        found["adaece"] = _equal_mass(confidence, residual, counts, bins)
    if "classwise_ece" in names:
        found["classwise_ece"] = _classwise(probs.astype(np.float32), labels, counts, bins)
    return {name: found[name] for name in names}


def _equal_mass(confidence, residual, counts, bins: int) -> np.ndarray:
    """Adaptive ECE on every resample; samples of one confidence share a bin."""
    order, n, errors = np.argsort(confidence, kind="stable"), len(confidence), np.zeros(len(counts))
    residual, last = residual[order], np.searchsorted(confidence[order], confidence[order], "right")
    for row, unordered in enumerate(counts):
        drawn = unordered[order]
        edges = np.searchsorted(np.cumsum(drawn) - drawn, n * np.arange(1, bins) / bins, "right") - 1
        total = np.append(0, np.cumsum(drawn * residual, dtype=np.float64))
        errors[row] = np.abs(np.diff(total[[0, *last[edges], n]])).sum() / n
    return errors


def _classwise(probs, labels, counts, bins: int) -> np.ndarray:
    """Classwise ECE on every resample, over the classes 0..max(label)."""
    n, classes = len(labels), np.arange(labels.max() + 1)
    probs = probs[:, classes]
    index = metrics.equal_width_index(probs, bins) + bins * classes
    inside = np.zeros((n, bins * len(classes)), np.float32)
    np.put_along_axis(inside, index, probs - (labels[:, None] == classes), axis=1)
    return np.abs(counts @ inside).sum(axis=1) / n / len(classes)


def moved_by_validation(fit, val, test, names=tuple(metrics.METRICS), draws: int = 50) -> dict[str, np.ndarray]:
    """How far the named metrics of a scaled test set move with another validation set: name -> (draws,).

    fit: a choice of T, such as calibrate.temperature_by_nll; val, test: logits, labels and masked classes. T, to a
    hundredth, is chosen on bootstrap resamples of val, which are the same for every network; less what val gives.
    """
    logits, labels, masked = val
    again = np.random.default_rng(0).integers(len(labels), size=(draws, len(labels)))
    chosen = [round(fit(logits[rows], labels[rows], masked), 2) for rows in (np.arange(len(labels)), *again)]
    once = np.ones((1, len(test[1])), np.float32)
    found = {t: resampled_metrics(test[0] / t, test[1], once, names, test[2]) for t in set(chosen)}
    return {name: np.array([found[t][name][0] - found[chosen[0]][name][0] for t in chosen[1:]]) for name in names}


def interval(value: float, resampled: np.ndarray, metric: str) -> tuple[float, float]:
    """Where the mean of a metric over sets of this size lies, measured once as ``value``: (low, high).

    The percentile interval of the resampled values (Mukhoti et al. 2020), less their bias, mean(resampled) - value:
    resampling adds noise to every bin, and binned errors add up absolute values, in which noise does not cancel. The
    same bias is in ``value`` once, and stays there. Cut to what the metric, a name in metrics.METRICS, can be. NaN, an
    AUROC without wrong answers, is left out.
    """
    ends = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - (np.nanmean(resampled) - value)
    low, high = ends.clip(0.0, LARGEST.get(metric, 1.0)).tolist()
    return low, high


def difference(ours: np.ndarray, theirs: np.ndarray, resampled_ours, resampled_theirs) -> dict[str, float]:
    """Mean paired difference of a metric between two losses, its interval and p-value.

    ours, theirs: a value per seed (S,), or per seed and validation set (S, V); resampled_*: (S, resamples), from the
    same resamples. The standard error joins that of the resampled sets (bootstrap of the mean over seeds; it counts as
    known, though that of a validation set may come from few draws), that of the seeds (their differences' standard
    deviation / sqrt(S)) and that of the V validation sets (likewise); what there is one of is unknown and left out.
    Student's t with Satterthwaite's degrees of freedom (``freedom``; infinite with one seed and one validation set).
    Far in its tail, below SMALLEST, that is no approximation any more. Values in one place are of one seed; where one
    loss has more seeds, the first ones count. NaN resamples are left out.
    """
    seeds = min(len(ours), len(theirs))
    gap = np.reshape(np.asarray(ours)[:seeds] - np.asarray(theirs)[:seeds], (seeds, -1))
    variance = np.nanvar((np.asarray(resampled_ours)[:seeds] - resampled_theirs[:seeds]).mean(axis=0), ddof=1)
    unsure = 0.0  # of the variance: sum of squares over degrees of freedom
    for means in (gap.mean(axis=1), gap.mean(axis=0)):
        if len(means) > 1:
            variance += means.var(ddof=1) / len(means)
            unsure += (means.var(ddof=1) / len(means)) ** 2 / (len(means) - 1)
    error, freedom = np.sqrt(variance), variance**2 / unsure if unsure > 0 else np.inf
    p = float(gap.mean() == 0) if error == 0 else 2 * stats.t.sf(abs(gap.mean()) / error, freedom)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    ends = {"low": gap.mean() - half, "high": gap.mean() + half}
    return {"difference": gap.mean()} | ends | {"freedom": float(freedom), "p": float(p)}


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number (Holm 1979): reject where at most 1 - LEVEL."""
    p = np.asarray(p, np.float64)
    order, corrected = np.argsort(p, kind="stable"), np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return corrected


def verdicts(gap, corrected_p) -> list[str]:
    """better (lower), worse or not distinguishable, for differences of a metric and their corrected p-values."""
    sure = np.asarray(corrected_p) <= 1 - LEVEL + 1e-12
    sides = np.where(np.asarray(gap) < 0, "better", "worse")
    return np.where(sure, sides, "not distinguishable").tolist()


def best_and_tied(values: dict, draws: dict) -> tuple[str, list[str]]:
    """The name with the lowest mean, and those that are not distinguishable from it.

    Of all pairs, since it is the same data that choose the best: paired differences, corrected for their number.
    values: name -> (S,), a value per seed; draws: name -> (S, resamples). Where S differs, a pair has the seeds that
    come first in both.
    """
    best, pairs = min(values, key=lambda name: np.mean(values[name])), list(combinations(values, 2))
    found = [difference(values[one], values[other], draws[one], draws[other]) for one, other in pairs]
    judged = verdicts([row["difference"] for row in found], holm([row["p"] for row in found]))
    undecided = [set(pair) for pair, verdict in zip(pairs, judged, strict=True) if verdict == "not distinguishable"]
    return best, [name for name in values if {best, name} in undecided]


def debiased_error(logits, labels, masked=(), bins: int = metrics.BINS) -> float:
    """Root-mean-square top-label calibration error, its sampling bias subtracted (Kumar et al. 2019, sec. 5).

    In bins of equal mass, sum_b n_b / N [(mean confidence - accuracy)^2 - accuracy (1 - accuracy) / (n_b - 1)]; the
    root of it, or 0 where it is negative: calibrated as far as this sample can tell. NaN if no bin has two samples.
    """
    confidence, correct = metrics.confidence_correct(logits, labels, masked)
    edges = metrics.equal_mass_edges(confidence, bins)
    count, confident, right = metrics.bin_sums(confidence, correct, edges)
    filled = count > 1
    count, confident, right = count[filled], confident[filled] / count[filled], right[filled] / count[filled]
    squared = (confident - right) ** 2 - right * (1 - right) / (count - 1)
    return float(np.sqrt(max(0.0, (count * squared).sum() / count.sum()))) if len(count) else float("nan")


def smooth_ece(logits, labels, masked=()) -> float:
    """Smooth ECE of the top label (Blasiok and Nakkiran 2024, definition 3): no bins.

    The residual (correct - confidence), smoothed over confidence by a Gaussian that is reflected at 0 and 1, and the
    absolute value of that averaged; at the kernel's width s at which the result is s itself.
    """
    confidence, correct = metrics.confidence_correct(logits, labels, masked)
    cells = 2000
    at = (confidence.astype(np.float64) * cells).round().astype(int)
    residual = np.bincount(at, correct - confidence.astype(np.float64), cells + 1) / len(confidence)

    waves = np.fft.rfftfreq(2 * cells, 1 / (2 * cells)) * np.pi  # cosines with zero slope at 0 and 1
    mirrored = np.concatenate([residual, residual[-2:0:-1]])
    mirrored[[0, cells]] *= 2  # the ends are their own mirror images
    spectrum = np.fft.rfft(mirrored)

    def smoothed(width):
        density = np.fft.irfft(spectrum * np.exp(-((waves * width) ** 2) / 2), 2 * cells)[: cells + 1]
        density[[0, -1]] /= 2
        return np.abs(density).sum()

    low, high = 1e-3, 1.0  # smoothed(width) - width falls with the width
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if smoothed(middle) > middle else (low, middle)
    return float(smoothed(high))


def brier_split(logits, labels, masked=()) -> dict[str, float]:
    """The top label's Brier score as miscalibration - discrimination + uncertainty (Dimitriadis et al. 2021).

    Of (confidence - correct)^2; miscalibration is what an isotonic map fitted on these very samples would take away,
    discrimination what its output is better by than always saying the accuracy, uncertainty accuracy (1 - accuracy).
    All three are 0 or more and the score is exactly their sum with these signs.
    """
    confidence, correct = metrics.confidence_correct(logits, labels, masked)
    confidence, correct = confidence.astype(np.float64), correct.astype(np.float64)
    score, uncertainty = ((confidence - correct) ** 2).mean(), correct.mean() * (1 - correct.mean())
    refined = ((IsotonicRegression().fit_transform(confidence, correct) - correct) ** 2).mean()
    parts = {"miscalibration": score - refined, "discrimination": uncertainty - refined, "uncertainty": uncertainty}
    return {name: float(value) for name, value in ({"brier_top": score} | parts).items()}


def chance_ece(logits, draws: int = 100, masked=(), bins: int = metrics.BINS) -> float:
    """The floor of an ECE: its mean for a network with these confidences (logits: (N, K)) that is perfectly calibrated.

    Each of ``draws`` test sets calls a prediction right with the probability of its confidence. In [0, 1].
    """
    confidence, _ = metrics.confidence_correct(logits, np.zeros(len(logits), int), masked)
    random, edges = np.random.default_rng(0), metrics.equal_width_edges(bins)
    sets = (random.random(len(confidence)) < confidence for _ in range(draws))
    return float(np.mean([metrics.calibration_error(confidence, correct, edges) for correct in sets]))


def selective(confidence, correct, counts) -> dict[str, np.ndarray]:
    """How well confidence (N,) tells right predictions, correct (N,) bool, from wrong ones, on each resample of counts.

    - aurc: area under the risk-coverage curve, the mean over samples of the error among all that are at least as
      confident (Geifman and El-Yaniv 2017); from 0 to 1, and about the error if the order says nothing.
    - eaurc: what that lies above the best order, all right ones before all wrong ones (Geifman et al. 2019).
    - auroc: how often a right prediction has more confidence than a wrong one, ties half; NaN without either.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, wrong, found = -confidence[order], ~np.asarray(correct, bool)[order], np.empty((3, len(counts)))
    first, last = (np.searchsorted(ranked, ranked, side) for side in ("left", "right"))  # of those as confident
    for row, unordered in enumerate(counts):
        drawn = unordered[order].astype(np.float64)
        lost = drawn * wrong
        kept, bad = (np.concatenate([[0.0], np.cumsum(part)]) for part in (drawn, lost))
        n, k, good = kept[-1], bad[-1], kept - bad
        found[0, row] = drawn @ (bad[last] / np.maximum(kept[last], 1)) / n
        found[1, row] = found[0, row] - (k - (n - k) * (digamma(n + 1) - digamma(n - k + 1))) / n
        won = lost @ (good[first] + good[last]) / 2
        found[2, row] = won / (k * (n - k)) if 0 < k < n else np.nan
    return dict(zip(("aurc", "eaurc", "auroc"), found, strict=True))


def risk_coverage(confidence, correct) -> tuple[np.ndarray, np.ndarray]:
    """Coverage, the share of samples at least as confident as each, and risk, their error: (N,) both, by coverage."""
    order = np.argsort(-confidence, kind="stable")
    last = np.searchsorted(-confidence[order], -confidence[order], "right")
    bad = np.concatenate([[0], np.cumsum(~np.asarray(correct, bool)[order])])
    return last / len(order), bad[last] / last


def resampled_auroc(in_scores, out_scores, in_counts, out_counts) -> np.ndarray:
    """The AUROC on every pair of resamples, (resamples,), as a mean of weighted ranks; ties count half.

    in_scores (N,), out_scores (M,): strangeness of the two sets; in_counts (resamples, N), out_counts (resamples, M):
    see resamples.
    """
    order, below, won = np.argsort(in_scores), np.zeros(len(in_scores) + 1), np.empty(len(in_counts))
    left, right = (np.searchsorted(in_scores[order], out_scores, side) for side in ("left", "right"))
    tied = (left != right).any()
    for row, (drawn, times) in enumerate(zip(in_counts, out_counts, strict=True)):
        np.cumsum(drawn[order], out=below[1:])  # of the lowest 0, 1 ... N, how many
        won[row] = times @ (below[left] + below[right]) / 2 if tied else times @ below[left]
    return won / len(in_scores) / len(out_scores)
