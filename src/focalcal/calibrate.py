"""Post-hoc temperatures, and the paper's choice of gamma."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.special import lambertw

from focalcal import metrics

GRID = np.arange(1, 101) / 10  # 0.1, 0.2 ... 10.0, the papers' temperatures


def temperature_by_nll(logits, labels, masked=()) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), to about 1e-6 relative.

    Newton's method on 1 / T, in which the NLL is convex, inside a bracket. T lies in [0.01, 100]: at 0.01 where no
    logit is above the label's, within a thousandth of 100 where labels have nothing to do with the logits.
    """
    logits, labels = metrics.check(logits, labels)
    z = logits - logits.max(axis=1, keepdims=True)
    true = z[np.arange(len(z)), labels]
    if not true.any():  # all are right
        return 0.01
    few = len(z) // 1000 + 1
    beta = _newton(z[::few], true[::few].mean(), 1.0) if few > 1 else 1.0  # from a part of the samples, near it
    return 1 / _newton(z, true.mean(), beta)


def _newton(z: np.ndarray, mean_true: float, beta: float) -> float:
    """The inverse temperature with the lowest NLL of logits z (N, K), each row's largest 0, from a first guess."""
    low, high = 0.01, 100.0
    weights = np.empty_like(z)
    for _ in range(100):
        np.exp(np.multiply(z, beta, out=weights), out=weights)
        total = weights.sum(axis=1)
        weights *= z
        expected = weights.sum(axis=1) / total
        slope = expected.mean() - mean_true
        curvature = (np.einsum("nk,nk->n", weights, z) / total - expected**2).mean()
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else high if slope < 0 else low
        new = step if low <= step <= high else (low * high) ** 0.5
        if abs(new - beta) <= 1e-3 * beta:
            break  # the next step would be of the order of the square of this one
        beta = new
    return float(new)


def temperature_by_ece(logits, labels, masked=(), bins: int = metrics.BINS) -> float:
    """The temperature of the grid 0.1, 0.2 ... 10.0 with the lowest ECE (Mukhoti et al. 2020, sec. 5).

    On ties the lowest temperature wins, as in the published loop. Scaling moves no prediction, so only the
    confidence 1 / sum(exp((z - the predicted class's) / T)) is computed anew.
    """
    logits, labels = metrics.check(logits, labels)
    predicted = metrics.predictions(logits, masked)
    correct, top = predicted == labels, np.take_along_axis(logits, predicted[:, None], axis=1)
    z = np.ascontiguousarray((logits - top).T, dtype=np.float32)
    with ThreadPoolExecutor() as pool:
        count = len(logits) // 2500 + 1
        parts = zip(np.array_split(z, count, axis=1), np.array_split(correct, count), strict=True)
        residuals = sum(pool.map(lambda part: _residuals(*part, bins), parts))
    return float(GRID[int(np.argmin(np.abs(residuals).sum(axis=1)))])


def _residuals(z: np.ndarray, correct: np.ndarray, bins: int) -> np.ndarray:
    """Sum of confidence - correct per temperature of the grid and bin, (100, bins).

    z: logits (K, N), each column's predicted class 0. exp(z / T) is the square of exp(z / 2T), so that half of the
    hundred exponentials are products.
    """
    sums, part = np.empty((1 + len(GRID), z.shape[1]), np.float32), np.empty(z.shape, np.float32)
    with np.errstate(over="ignore"):  # a masked class may be far more probable: infinite sums, confidence 0
        for tenths in range(51, 101):
            np.exp(np.multiply(z, np.float32(10 / tenths), out=part), out=part)
            part.sum(axis=0, out=sums[tenths])
            while tenths % 2 == 0:
                tenths //= 2
                np.square(part, out=part).sum(axis=0, out=sums[tenths])
    confidence = 1 / sums[1:]
    index = metrics.equal_width_index(confidence, bins)
    index += bins * np.arange(len(GRID))[:, None]
    residual = confidence.astype(np.float64) - correct
    return np.bincount(index.ravel(), residual.ravel(), bins * len(GRID)).reshape(-1, bins)


def gradient_factor(p, gamma):
    """g(p, gamma), by which the focal loss scales the gradient of cross-entropy (Mukhoti et al. 2020, prop. 1).

    p: true-class probability in (0, 1); gamma >= 0; broadcast against each other.
    """
    p = np.asarray(p, np.float64)
    return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * np.log(p)


def gamma_for(p0: float) -> float:
    """The gamma > 0 with g(p0, gamma) = 1: focal gradients exceed cross-entropy's below p0, fall short above.

    Lambert-W formula of Mukhoti et al. 2020 (sec. 4, prop. 2). p0 must lie in [1e-6, 0.5 - 1e-6]: above, no such gamma.
    """
    if not 1e-6 <= p0 <= 0.5 - 1e-6:
        raise ValueError(f"gamma_for needs 1e-6 <= p0 <= 0.5 - 1e-6, got {p0}; from 0.5 on there is no such gamma.")
    a, b = 1 - p0, p0 * np.log(p0)
    return float(a / b + lambertw(-(a ** (1 - a / b)) / b * np.log(a), k=-1).real / np.log(a))


FITS = {"nll": temperature_by_nll, "ece": temperature_by_ece}


def temperatures(logits, labels, masked=()) -> dict[str, float]:
    """The three scalings that every table reports: none (1), and those of FITS; to be chosen on validation data."""
    return {"none": 1.0} | {scaling: fit(logits, labels, masked) for scaling, fit in FITS.items()}


def refinement(logits, labels) -> float:
    """The NLL, in nats, at the temperature that is best for these very samples: what no temperature can take away.

    The rest of the NLL is its calibration part (Berta et al. 2025, for temperature scaling).
    """
    logits, labels = metrics.check(logits, labels)
    return metrics.nll(logits / temperature_by_nll(logits, labels), labels)


def after_scaling(val: tuple, test: tuple) -> dict[str, float]:
    """What history.csv keeps of temperature scaling after an epoch; val, test: logits (N, K), labels (N,), and masked.

    val_temperature (of lowest validation NLL), test NLL and ECE at it, and the refinement of either split.
    """
    masked, val, test = test[2:], metrics.check(*val[:2]), metrics.check(*test[:2])
    temperature = temperature_by_nll(*val)
    scaled = test[0] / temperature
    return {
        "val_refinement": metrics.nll(val[0] / temperature, val[1]),
        "test_refinement": refinement(*test),
        "val_temperature": temperature,
        "test_nll_scaled": metrics.nll(scaled, test[1]),
        "test_ece_scaled": metrics.ece(scaled, test[1], *masked),
    }


def measure(splits: dict, chosen: dict[str, float]) -> list[dict]:
    """Every metric and the mean confidence of every split and temperature: tidy rows (split, scaling, metric, value).

    splits: name -> (logits, labels) or (logits, labels, masked); chosen: scaling -> temperature.
    """
    rows = []
    for split, (logits, *rest) in splits.items():
        for scaling, temperature in chosen.items():
            scaled = logits / temperature
            values = {name: metric(scaled, *rest) for name, metric in metrics.METRICS.items()}
            values["confidence"] = float(metrics.confidence_correct(scaled, *rest)[0].mean(dtype=np.float64))
            rows += [{"split": split, "scaling": scaling, "metric": name, "value": x} for name, x in values.items()]
    return rows
