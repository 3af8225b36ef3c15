"""Post-hoc calibration: maps fitted on validation logits that make a trained network's probabilities better.

``fit(method, logits, labels)`` returns a function from logits (N, K) to calibrated log-probabilities (N, K), float64,
which every function of ``metrics`` takes as logits. Sources: [G] Guo et al., ICML 2017; [M] Mukhoti et al., NeurIPS
2020; [Z] Zadrozny and Elkan, ICML 2001 and KDD 2002; [K] Komisarenko and Kull, ECAI 2024; [R] Gupta and Ramdas, ICLR
2022, "Top-label calibration and multiclass-to-binary reductions".
"""

from functools import partial

import numpy as np
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from focalcal import calibrate, metrics

TINY = 1e-12  # the least probability that a map without a floor of its own may give
STRENGTH = 100.0  # of the data against the penalty on factors of logits scaled to 1: scikit-learn's C


def _log(probs: np.ndarray) -> np.ndarray:
    """Logarithm of rows scaled to sum 1; a row of zeros becomes uniform."""
    probs = np.maximum(probs, TINY)
    return np.log(probs / probs.sum(axis=1, keepdims=True))


def temperature(logits, labels, masked=(), scaling="nll"):
    """One temperature, chosen by calibrate.FITS: of lowest NLL [G, sec. 4.2] or of lowest ECE [M, sec. 5]."""
    found = calibrate.FITS[scaling](logits, labels, masked)
    return lambda z: metrics.log_softmax(z / found)


def vector(logits, labels):
    """A factor and an offset per class, lowest NLL [G, sec. 4.2]; the factors are held, loosely, to 1 / T.

    Without that, the factor of a class that the validation set tells apart without a fault would grow for ever.
    """
    (n, classes), scale = logits.shape, np.abs(logits).max()
    own, start = np.eye(classes)[labels], np.full(classes, 1 / calibrate.temperature_by_nll(logits, labels))

    def loss(parameters):
        factor, offset = parameters[:classes], parameters[classes:]
        log_probs, away = metrics.log_softmax(logits * factor + offset), scale * (factor - start)
        slope = (np.exp(log_probs) - own) / n
        value = -(own * log_probs).sum() / n + (away**2).sum() / (2 * STRENGTH * n)
        return value, np.concatenate([(slope * logits).sum(axis=0) + scale * away / (STRENGTH * n), slope.sum(axis=0)])

    to_the_end = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000, "maxfun": 20_000}  # results then hold on any machine
    first = np.concatenate([start, np.zeros(classes)])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=to_the_end).x
    return lambda z: metrics.log_softmax(z * found[:classes] + found[classes:])


def matrix(logits, labels):
    """A full linear map of the logits, lowest NLL [G, sec. 4.2]: multinomial logistic regression.

    Its factors are held to 0 (STRENGTH), on which results depend. A class that is missing in the labels gets TINY.
    """
    scale = np.abs(logits).max() or 1.0
    model = LogisticRegression(C=STRENGTH, solver="newton-cg", tol=1e-8, max_iter=2000).fit(logits / scale, labels)

    def apply(z):
        probs = np.zeros(z.shape)
        probs[:, model.classes_] = model.predict_proba(z / scale)
        return _log(probs)

    return apply


def isotonic(logits, labels):
    """A rising function per class (level steps, joined by lines), one against the rest, then scaled to sum 1 [Z]."""
    probs = np.exp(metrics.log_softmax(logits))
    maps = [IsotonicRegression(out_of_bounds="clip").fit(p, labels == k) for k, p in enumerate(probs.T)]

    def apply(z):
        columns = np.exp(metrics.log_softmax(z)).T
        return _log(np.stack([step.predict(column) for step, column in zip(maps, columns, strict=True)], axis=1))

    return apply


def _equal_mass(confidence, correct, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the bins of equal mass that hold samples, and the share that is right in each."""
    edges = metrics.equal_mass_edges(confidence, bins)
    count, _, right = metrics.bin_sums(confidence, correct, edges)
    return np.append(edges[0], edges[1:][count > 0]), right[count > 0] / count[count > 0]


def histogram(logits, labels, bins: int = metrics.BINS):
    """The share of each class in bins of equal mass of its probability, one against the rest, scaled to sum 1 [Z]."""
    probs = np.exp(metrics.log_softmax(logits))
    maps = [_equal_mass(p, labels == k, bins) for k, p in enumerate(probs.T)]

    def apply(z):
        columns = np.exp(metrics.log_softmax(z)).T
        found = [shares[metrics.bin_index(p, edges)] for (edges, shares), p in zip(maps, columns, strict=True)]
        return _log(np.stack(found, axis=1))

    return apply


def top_label(logits, labels, masked=(), bins: int = metrics.BINS):
    """The confidence becomes the accuracy of its bin, of equal mass; the other classes share the rest as before [R].

    All predicted classes share the bins (confidence calibration in [R], which also bins each predicted class alone; a
    thousand samples are few for that). Predictions stay: where the runner-up would overtake, the rest is mixed with
    equal shares, just enough to leave it a hair behind; an accuracy below 1/K is lifted a hair above it.
    """
    classes, hair = logits.shape[1], 1 + 1e-6

    def top(z):
        is_top = np.arange(classes) == metrics.predictions(z, masked)[:, None]
        return is_top, np.exp(metrics.log_softmax(z))[is_top]

    is_top, confidence = top(logits)
    edges, accuracy = _equal_mass(confidence, is_top[np.arange(len(labels)), labels], bins)
    accuracy = np.maximum(accuracy, hair / classes)

    def apply(z):
        is_top, confidence = top(z)
        said = accuracy[metrics.bin_index(confidence, edges)][:, None]
        rest = np.exp(metrics.log_softmax(np.where(is_top, -np.inf, z)))  # each other class's share of what is left
        rival = np.delete(rest, list(masked), axis=1).max(axis=1, keepdims=True)
        most = said / np.maximum(1 - said, TINY) / hair  # the share at which a class would draw level
        mixed = np.where(rival > most, (rival - most) / np.maximum(rival - 1 / (classes - 1), TINY), 0)
        rest = (1 - mixed) * rest + mixed / (classes - 1)
        return _log(np.where(is_top, said, (1 - said) * rest))

    return apply


def _focal_map(log_probs: np.ndarray, gamma: float) -> np.ndarray:
    """log of p / g(p, gamma), scaled to sum 1: what a minimiser of the focal loss should have said [K; Charoenphakdee
    et al. 2021], g being calibrate.gradient_factor."""
    probs = np.exp(log_probs).clip(TINY, 1 - TINY)
    return metrics.log_softmax(np.log(probs / calibrate.gradient_factor(probs, gamma)))


def focal_temperature(logits, labels):
    """Temperature, then the focal map of one gamma from 0 to 25, both of lowest NLL [K, focal temperature scaling]."""

    def apply(z, parameters):
        return _focal_map(metrics.log_softmax(z / np.exp(parameters[0])), min(abs(parameters[1]), 25.0))

    def loss(parameters):
        return -apply(logits, parameters)[np.arange(len(labels)), labels].mean()

    start = np.log(calibrate.temperature_by_nll(logits, labels))
    search = {"method": "Nelder-Mead", "options": {"xatol": 1e-6, "fatol": 1e-12}}
    found = min((minimize(loss, [start, gamma], **search) for gamma in (0.1, 2.0)), key=lambda r: r.fun).x
    return lambda z: apply(z, found)


METHODS = {  # the order of tables
    "none": lambda logits, labels: metrics.log_softmax,  # the network as trained
    "temperature_nll": temperature,
    "temperature_ece": partial(temperature, scaling="ece"),
    "focal_temperature": focal_temperature,
    "vector": vector,
    "matrix": matrix,
    "isotonic": isotonic,
    "histogram": histogram,
    "top_label": top_label,
}


def fit(method: str, logits, labels, masked=()):
    """The map called ``method``, fitted on validation logits (N, K) and labels (N,); masked: see metrics.

    A constant added to a row's logits, which softmax ignores, changes vector and matrix scaling, and no other method.
    Raises ValueError for an unknown method, and for logits that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method '{method}'; choose one of: {', '.join(METHODS)}.")
    logits, labels = metrics.check(logits, labels)
    found = METHODS[method](logits, labels, *([masked] if method in ("temperature_ece", "top_label") else []))

    def apply(z):
        z, _ = metrics.check(z, np.zeros(len(z), int))
        if z.shape[1] != logits.shape[1]:
            raise ValueError(f"'{method}' was fitted on {logits.shape[1]} classes, but got logits of {z.shape[1]}.")
        return found(z)

    return apply
