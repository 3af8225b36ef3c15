"""Post-hoc temperatures, and the paper's choice of gamma."""

import numpy as np
from scipy.special import lambertw

from focalcal import metrics

GRID = np.arange(1, 101) / 10  # 0.1, 0.2 ... 10.0, the papers' temperatures


def temperature_by_nll(logits, labels) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), to 1e-6 relative.

    Newton's method on the inverse temperature, in which the NLL is convex, kept inside a bracket. The result
    lies in [0.01, 100]; a bound is returned where the optimum is outside (all samples classified correctly
    pushes T towards 0, labels unrelated to the logits push it towards infinity).
    """
    logits, labels = metrics.check(logits, labels)
    z = logits - logits.max(axis=1, keepdims=True)
    mean_true = z[np.arange(len(z)), labels].mean()
    low, high, beta = 0.01, 100.0, 1.0
    for _ in range(100):
        weights = np.exp(beta * z)
        weights /= weights.sum(axis=1, keepdims=True)
        expected = (weights * z).sum(axis=1)
        slope = expected.mean() - mean_true
        curvature = ((weights * z**2).sum(axis=1) - expected**2).mean()
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else high if slope < 0 else low
        new = step if low <= step <= high else (low * high) ** 0.5
        if abs(new - beta) <= 1e-7 * beta:
            break
        beta = new
    return float(1 / new)


def temperature_by_ece(logits, labels, bins: int = metrics.BINS) -> float:
    """The temperature of the grid 0.1, 0.2 ... 10.0 with the lowest ECE (Mukhoti et al. 2020, sec. 5).

    On ties the lowest temperature wins, as in the published loop. Scaling moves no prediction, so only the
    confidence 1 / sum(exp((z - max z) / T)) is computed anew.
    """
    logits, labels = metrics.check(logits, labels)
    correct = logits.argmax(axis=1) == labels
    z = (logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    edges = metrics.equal_width_edges(bins)
    confidences = (1 / np.exp(z * np.float32(1 / t)).sum(axis=1) for t in GRID)
    scores = [metrics.calibration_error(confidence, correct, edges) for confidence in confidences]
    return float(GRID[int(np.argmin(scores))])


def gradient_factor(p, gamma):
    """g(p, gamma), by which the focal loss scales the gradient of cross-entropy (Mukhoti et al. 2020, prop. 1).

    p: true-class probability in (0, 1]; gamma >= 0; broadcast against each other.
    """
    p = np.asarray(p, np.float64)
    return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * np.log(p)


def gamma_for(p0: float) -> float:
    """The gamma > 0 with g(p0, gamma) = 1: focal gradients exceed cross-entropy's below p0, fall short above.

    Lambert-W formula of Mukhoti et al. 2020 (sec. 4, prop. 2). p0 must lie in (0, 0.5): above, no such gamma.
    """
    if not 0 < p0 < 0.5:
        raise ValueError(f"gamma_for needs 0 < p0 < 0.5, got {p0}; for larger p0 the equation has no positive root.")
    a, b = 1 - p0, p0 * np.log(p0)
    return float(a / b + lambertw(-(a ** (1 - a / b)) / b * np.log(a), k=-1).real / np.log(a))


def temperatures(logits, labels) -> dict[str, float]:
    """The three scalings that every table reports: none (1), nll and ece; to be chosen on validation data."""
    return {"none": 1.0, "nll": temperature_by_nll(logits, labels), "ece": temperature_by_ece(logits, labels)}


def measure(splits: dict, chosen: dict[str, float]) -> list[dict]:
    """Every metric of every split under every temperature, as tidy rows (split, scaling, metric, value).

    splits: name -> (logits, labels); chosen: scaling -> temperature.
    """
    return [
        {"split": split, "scaling": scaling, "metric": name, "value": metric(logits / temperature, labels)}
        for split, (logits, labels) in splits.items()
        for scaling, temperature in chosen.items()
        for name, metric in metrics.METRICS.items()
    ]
