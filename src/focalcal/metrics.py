"""Calibration metrics on logits, in NumPy. All values are fractions (0.05, not 5 %).

Conventions, shared by every function and equal to the code published with Mukhoti et al. (NeurIPS 2020):
``logits`` (N, K) are unnormalised log-probabilities, ``labels`` (N,) integers in [0, K). Bins are (lo, hi];
confidence 0 falls into the first bin, 1 into the last. Confidences are float32 and compared with bin edges as such;
sums over samples, and all that is not binned, are float64.

``masked`` are classes that are never predicted: the prediction is the most probable of the others and the confidence
its probability, not renormalised, so that it may lie below 1/K (the published reading of SST, whose neutral class is
trained but not tested). What asks for no prediction (NLL, Brier score, classwise ECE) does not depend on it.
"""

import numpy as np

BINS = 15  # as in all the papers


def check(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """The pair as float64 (N, K) and int64 (N,) arrays; ValueError with one clear sentence if they do not fit."""
    logits, labels = _checked(logits, labels)
    return logits.astype(np.float64), labels


def _checked(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """As ``check``, but logits in the precision given."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.dtype.kind in "biu":
        logits = logits.astype(np.float64)  # differences of small integers wrap around
    if logits.dtype.kind != "f":
        raise ValueError(f"logits must be real numbers, got {logits.dtype}.")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape (samples, classes) with 2 classes or more, got {logits.shape}.")
    if labels.shape != (len(logits),):
        raise ValueError(f"labels must have shape ({len(logits)},) to go with these logits, got {labels.shape}.")
    if len(logits) == 0:
        raise ValueError("logits and labels are empty; at least one sample is needed.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if not np.isfinite(logits).all():
        raise ValueError(f"logits hold {np.count_nonzero(~np.isfinite(logits))} values that are NaN or infinite.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}.")
    return logits, labels.astype(np.int64, copy=False)  # of int8 the sums would wrap around


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, K), stable for any finite logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def predictions(logits: np.ndarray, masked=()) -> np.ndarray:
    """The class of the largest logit (the first, on ties) that is not masked, (N,)."""
    if not len(masked):
        return logits.argmax(axis=1)
    allowed = np.setdiff1d(np.arange(logits.shape[1]), masked)
    if len(allowed) < 2 or max(masked) >= logits.shape[1] or min(masked) < 0:
        raise ValueError(f"masked must leave 2 of the {logits.shape[1]} classes or more, got {list(masked)}.")
    return allowed[logits[:, allowed].argmax(axis=1)]


def confidence_correct(logits, labels, masked=()) -> tuple[np.ndarray, np.ndarray]:
    """What every top-label metric needs: confidence (N,) float32 and correct (N,) bool.

    Confidence lies in [1/K, 1]; where a masked class is likelier, it may be less.
    """
    logits, labels = _checked(logits, labels)
    confidence, predicted, _ = _softmax(logits, masked)
    return confidence, predicted == labels


def _softmax(logits: np.ndarray, masked=()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence (N,) float32, predicted class (N,), and exp(logits - the predicted one) (N, K) float32."""
    predicted = predictions(logits, masked)
    shifted = logits - np.take_along_axis(logits, predicted[:, None], axis=1)
    relative = np.exp(np.minimum(shifted, 80).astype(np.float32, copy=False))  # a masked one may be large
    return 1 / relative.sum(axis=1), predicted, relative


def _ends(largest: int, bins: int) -> np.ndarray:
    """bins + 1 numbers from 0 to the largest, evenly spaced; ValueError for bins that cannot be."""
    if not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins must be a whole number from 1 on, got {bins!r}.")
    return np.linspace(0, largest, bins + 1)


def equal_width_edges(bins: int = BINS) -> np.ndarray:
    """bins + 1 edges from 0 to 1, float32."""
    return _ends(1, bins).astype(np.float32)


def equal_width_index(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The equal-width bin of each float32 value: as bin_index finds it, but faster where there are millions."""
    edges = np.append(equal_width_edges(bins), np.float32(np.inf))
    index = (confidence * np.float32(bins)).astype(np.intp)
    index -= (confidence <= edges[index]) & (index > 0)  # products round
    index += confidence > edges[index + 1]
    return index


def equal_mass_edges(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """bins + 1 edges with (nearly) the same number of samples between them, float32 (published AdaECE edges)."""
    n = len(confidence)
    return np.interp(_ends(n, bins), np.arange(n), np.sort(confidence)).astype(np.float32)


def bin_index(values, edges) -> np.ndarray:
    """The bin of each value, by its float32: the one binning of this package, but for ``equal_width_index``.

    Values at or below the first edge go to the first bin, values above the last edge to the last. (The published
    adaptive ECE drops its least confident sample; here it counts.)
    """
    return np.searchsorted(edges[1:-1], np.asarray(values, np.float32), side="left")


def bin_sums(confidence, correct, edges) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per bin: number of samples, sum of confidences, number correct; each (bins,) float64."""
    bins, index = len(edges) - 1, bin_index(confidence, edges)
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    sums = [np.bincount(index, weights, bins) for weights in (np.ones(len(index)), confidence, correct)]
    return sums[0], sums[1], sums[2]


def calibration_error(confidence, correct, edges) -> float:
    """Sum over bins of |confidence - correct| residuals, divided by N."""
    count, confidence_sum, correct_sum = bin_sums(confidence, correct, edges)
    return float(np.abs(confidence_sum - correct_sum).sum() / count.sum())


def nll(logits, labels, masked=()) -> float:
    """Mean negative log-likelihood over all classes, in nats."""
    logits, labels = check(logits, labels)
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def error(logits, labels, masked=()) -> float:
    """Share of samples whose largest logit (the first, on ties) is not the label's."""
    logits, labels = check(logits, labels)
    return float((predictions(logits, masked) != labels).mean())


def brier(logits, labels, masked=()) -> float:
    """Mean over samples of the sum over classes of (probability - one-hot)^2, in [0, 2] (Brier 1950)."""
    logits, labels = check(logits, labels)
    residual = np.exp(log_softmax(logits))
    residual[np.arange(len(labels)), labels] -= 1
    return float((residual**2).sum(axis=1).mean())


def ece(logits, labels, masked=(), bins: int = BINS) -> float:
    """Expected calibration error, equal-width bins (Naeini et al. 2015; Guo et al. 2017)."""
    return calibration_error(*confidence_correct(logits, labels, masked), equal_width_edges(bins))


def adaptive_ece(logits, labels, masked=(), bins: int = BINS) -> float:
    """Adaptive ECE: equal-mass bins (Nguyen and O'Connor 2015), edges as in the published code."""
    confidence, correct = confidence_correct(logits, labels, masked)
    return calibration_error(confidence, correct, equal_mass_edges(confidence, bins))


def mce(logits, labels, masked=(), bins: int = BINS) -> float:
    """Maximum calibration error: the largest |mean confidence - accuracy| of a bin (Naeini et al. 2015)."""
    count, confidence, correct = bin_sums(*confidence_correct(logits, labels, masked), equal_width_edges(bins))
    return float((np.abs(confidence - correct) / np.maximum(count, 1)).max())


def classwise_ece(logits, labels, masked=(), bins: int = BINS) -> float:
    """Mean over classes 0..max(label) of the ECE of that class's probability (Kull et al. 2019)."""
    logits, labels = _checked(logits, labels)
    confidence, _, relative = _softmax(logits)
    probs = relative * confidence[:, None]
    above = np.flatnonzero(probs > equal_width_edges(bins)[1])  # few; the first bin has what is left of all sums
    classes, residual = labels.max() + 1, np.zeros((bins, probs.shape[1]))
    value, kind = probs.ravel()[above], above % probs.shape[1]
    np.add.at(residual, (equal_width_index(value, bins), kind), value.astype(np.float64))
    residual[0] = probs.sum(axis=0, dtype=np.float64) - residual.sum(axis=0)
    own = probs[np.arange(len(labels)), labels]
    np.add.at(residual, (equal_width_index(own, bins), labels), -1.0)
    return float(np.abs(residual[:, :classes]).sum() / len(labels) / classes)


def strangeness(logits, score: str = "entropy") -> np.ndarray:
    """What ``auroc`` compares, (N,): the entropy of the softmax in nats, or, for 'confidence', less its largest
    log-probability. ValueError for another score, and for logits (N, K) that are none."""
    if score not in ("entropy", "confidence"):
        raise ValueError(f"score must be entropy or confidence, got {score!r}.")
    log_probs = log_softmax(check(logits, np.zeros(len(logits), int))[0])
    return -log_probs.max(axis=1) if score == "confidence" else -(np.exp(log_probs) * log_probs).sum(axis=1)


def auroc(in_logits, out_logits, score: str = "entropy") -> float:
    """Chance that a sample from elsewhere is stranger than one of the test set, ties counting half.

    As in Mukhoti et al. 2020, sec. 5. in_logits (N, K): of the distribution trained on; out_logits (M, K): of another;
    score: of ``strangeness``.
    """
    from sklearn.metrics import roc_auc_score

    is_out = np.repeat([0, 1], [len(in_logits), len(out_logits)])
    return float(roc_auc_score(is_out, np.concatenate([strangeness(in_logits, score), strangeness(out_logits, score)])))


METRICS = {  # the order of the results table
    "error": error,
    "nll": nll,
    "ece": ece,
    "adaece": adaptive_ece,
    "classwise_ece": classwise_ece,
    "mce": mce,
    "brier": brier,
}


SUMMARY = ("nll", "nll_correct", "nll_incorrect", "entropy_correct", "entropy_incorrect", "error", "ece", "adaece")
SUMMARY += ("confidence",)


def summary(logits, labels, masked=()) -> dict[str, float]:
    """What history.csv keeps of a split, by the names of SUMMARY.

    The NLL, its parts from correctly and wrongly classified samples (each divided by all N, so that they add up),
    the mean softmax entropy in nats of either group (NaN where a group is empty), error, ECE, adaptive ECE and the
    mean confidence.
    """
    confidence, correct = confidence_correct(logits, labels, masked)
    logits, labels = check(logits, labels)
    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    loss = -log_probs[np.arange(len(labels)), labels]
    entropy = -(probs * log_probs).sum(axis=1)
    values = (
        loss.mean(),
        loss[correct].sum() / len(loss),
        loss[~correct].sum() / len(loss),
        entropy[correct].mean() if correct.any() else np.nan,
        entropy[~correct].mean() if not correct.all() else np.nan,
        1 - correct.mean(),
        calibration_error(confidence, correct, equal_width_edges()),
        calibration_error(confidence, correct, equal_mass_edges(confidence)),
        confidence.mean(dtype=np.float64),
    )
    return dict(zip(SUMMARY, map(float, values), strict=True))
