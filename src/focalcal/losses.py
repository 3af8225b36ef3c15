"""Training losses of the focal-loss calibration papers.

Every loss maps ``logits`` (N, K) and integer ``labels`` (N,) to a per-sample loss (N,), unreduced and
differentiable; the training loop decides between sum and mean, because that choice moves calibration.
Sources: [M] Mukhoti et al., NeurIPS 2020; [G] Ghosh et al. (AdaFocal), NeurIPS 2022; [T] Tao et al. (dual
focal), ICML 2023; [W] Wang et al. (inverse focal), NeurIPS 2021; [K] Kumar et al. (MMCE), ICML 2018; [Z] Zhou et al.
(AURC), arXiv 2505.23463; [H] Hebbalaguppe et al. (MDCA), CVPR 2022; [L] Liu et al. (margin-based label smoothing), CVPR
2022; [B] Lin et al. (BSCE-GRA), CVPR 2025; [F] Liang et al. (focal calibration loss), arXiv 2410.18321; [Q] Li et al.
(generalized focal loss), NeurIPS 2020. p is the predicted probability of the true class throughout.

A new loss is one function here and one line in ``LOSSES``; params.yaml then names it. On a GPU a step is recorded once
and replayed: a loss copies nothing from the CPU and asks for no ``.item()``, and what changes from epoch to epoch is a
registered buffer that is written in place.
"""

import inspect
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalcal import metrics


def _log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the true class, (N,)."""
    return -F.cross_entropy(logits, labels, reduction="none")


def _power(base: Tensor, gamma) -> Tensor:
    """base**gamma for base >= 0 with a finite gradient at base = 0 also where gamma < 1."""
    return base.clamp_min(1e-20) ** gamma


def _not_negative(name: str, value) -> None:
    if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be 0 or larger, got {value}.")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p, per sample (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def label_smoothing(logits: Tensor, labels: Tensor, alpha: float = 0.05) -> Tensor:
    """Cross-entropy to a target of 1 - alpha on the true class and alpha / (K - 1) on every other [M, sec. 5].

    alpha: smoothing factor in [0, 1). (PyTorch's label_smoothing spreads alpha over all K classes instead.)
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"label_smoothing: alpha must lie in [0, 1), got {alpha}.")
    log_probs = F.log_softmax(logits, dim=1)
    true = log_probs.gather(1, labels[:, None])[:, 0]
    others = log_probs.sum(dim=1) - true
    return -(1 - alpha) * true - alpha / (logits.shape[1] - 1) * others


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over classes of (probability - one-hot)^2, in [0, 2] (Brier 1950; the papers train on its mean)."""
    probs = F.softmax(logits, dim=1)
    return (probs - F.one_hot(labels, logits.shape[1]).to(probs.dtype)).square().sum(dim=1)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p [M, sec. 3]. gamma: focusing parameter >= 0 (a number, or one value per sample)."""
    _not_negative("focal: gamma", gamma)
    log_p = _log_p(logits, labels)
    return -_power(-torch.expm1(log_p), gamma) * log_p


def flsd(logits: Tensor, labels: Tensor, gamma_low=5.0, gamma_high=3.0, threshold=0.2, gamma_top=None) -> Tensor:
    """Sample-dependent focal loss, FLSD-53 by default [M, sec. 4].

    gamma_low where p < threshold, else gamma_high; from p = 0.5 on gamma_top, if that is given, as in a variant among
    the published scripts. gamma itself is not differentiated.
    """
    top = gamma_high if gamma_top is None else gamma_top
    for name, gamma in {"gamma_low": gamma_low, "gamma_high": gamma_high, "gamma_top": top}.items():
        _not_negative(f"flsd: {name}", gamma)
    if not 0 <= threshold <= 1:
        raise ValueError(f"flsd: threshold is a probability, got {threshold}.")
    p = _log_p(logits, labels).detach().exp()
    return focal(logits, labels, torch.where(p < threshold, gamma_low, torch.where(p < 0.5, gamma_high, top)))


def dual_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """-(1 - p + p_j)^gamma log p [T, eq. 6].

    p_j is the largest probability strictly below p (0 where there is none; ties with p do not count), and
    the gradient flows through it.
    """
    _not_negative("dual_focal: gamma", gamma)
    probs = F.softmax(logits, dim=1)
    p = probs.gather(1, labels[:, None])
    runner_up = torch.where(probs < p, probs, 0.0).amax(dim=1)
    return -_power(1 - p[:, 0] + runner_up, gamma) * _log_p(logits, labels)


def inverse_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """-(1 + p)^gamma log p [W, sec. 5]: weighs easy samples up instead of down."""
    _not_negative("inverse_focal: gamma", gamma)
    log_p = _log_p(logits, labels)
    return -((1 + log_p.exp()) ** gamma) * log_p


def mmce_weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """MMCE_w of one batch, a scalar >= 0: the kernel calibration error [K, eq. 6], Laplacian kernel of width 0.4.

    As in the code published with [M], each mean over pairs is divided by the number of pairs once more, so the
    value is smaller than the definition in [K] by about the size of the smaller group (correct or wrong). It is 0
    where a group is empty.
    """
    confidence, predicted = F.softmax(logits, dim=1).max(dim=1)
    correct = (predicted == labels).to(confidence.dtype)
    kernel = torch.exp(-(confidence[:, None] - confidence[None, :]).abs() / 0.4)
    right, wrong = correct * (1 - confidence), (1 - correct) * confidence
    m, n = correct.sum(), (1 - correct).sum()

    def published_mean(a: Tensor, b: Tensor, pairs: Tensor) -> Tensor:
        return (a @ kernel @ b) / pairs.clamp_min(1) / (pairs + 1e-5)

    squared = (
        published_mean(right, right, m * m)
        + published_mean(wrong, wrong, n * n)
        - 2 * published_mean(right, wrong, m * n)
    )
    both = (m > 0) & (n > 0)
    return torch.where(both, squared.clamp_min(0) + 1e-10, 1.0).sqrt() * both


def mmce(logits: Tensor, labels: Tensor, weight: float = 2.0) -> Tensor:
    """Cross-entropy plus weight x MMCE_w of the batch, added to every sample [M, sec. 5; K]."""
    _not_negative("mmce: weight", weight)
    return cross_entropy(logits, labels) + weight * mmce_weighted(logits, labels)


def detached_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The focal loss with a weight that is not differentiated, as [W] train the inverse one."""
    _not_negative("detached_focal: gamma", gamma)
    log_p = _log_p(logits, labels)
    return -_power(-torch.expm1(log_p.detach()), gamma) * log_p


def mdca(logits: Tensor, labels: Tensor) -> Tensor:
    """MDCA of one batch, a scalar in [0, 2 / K]: mean over classes of |mean probability - share of labels| [H]."""
    gap = F.softmax(logits, dim=1).mean(dim=0) - F.one_hot(labels, logits.shape[1]).to(logits.dtype).mean(dim=0)
    return gap.abs().mean()


def focal_mdca(logits: Tensor, labels: Tensor, gamma: float = 1.0, weight: float = 1.0) -> Tensor:
    """Focal loss plus weight x MDCA of the batch, added to every sample [H]."""
    _not_negative("focal_mdca: weight", weight)
    return focal(logits, labels, gamma) + weight * mdca(logits, labels)


def margin_label_smoothing(logits: Tensor, labels: Tensor, margin: float = 10.0, alpha: float = 0.1) -> Tensor:
    """-log p + alpha x mean over classes of how far a logit is more than ``margin`` below the largest one [L]."""
    _not_negative("margin_label_smoothing: margin", margin)
    _not_negative("margin_label_smoothing: alpha", alpha)
    below = logits.amax(dim=1, keepdim=True) - logits
    return cross_entropy(logits, labels) + alpha * F.relu(below - margin).mean(dim=1)


def bsce_gra(logits: Tensor, labels: Tensor, gamma: float = 4.0, norm: float = 2.0) -> Tensor:
    """-log p x ||one-hot - probabilities||^gamma, the weight not differentiated [B].

    norm: of the difference, 1 or larger. With norm 1 this is 2^gamma times ``detached_focal``.
    """
    _not_negative("bsce_gra: gamma", gamma)
    if not 1 <= norm < float("inf"):
        raise ValueError(f"bsce_gra: norm must be 1 or larger, got {norm}.")
    probs = F.softmax(logits.detach(), dim=1)
    gap = torch.linalg.vector_norm(F.one_hot(labels, logits.shape[1]) - probs, norm, dim=1)
    return gap**gamma * cross_entropy(logits, labels)


def focal_brier(logits: Tensor, labels: Tensor, gamma: float = 3.0, weight: float = 1.0) -> Tensor:
    """Focal loss plus weight x Brier score [F]; gamma and weight are ours."""
    _not_negative("focal_brier: weight", weight)
    return focal(logits, labels, gamma) + weight * brier(logits, labels)


def soft_rank(values: Tensor, strength: float) -> Tensor:
    """Ascending soft ranks (n,) in [1, n] of values (n,), differentiable (Blondel et al. 2020, l2-regularised).

    strength > 0: towards 0 they become the ranks (in float32 down to 0.001: below, sums cancel); where the values lie
    within strength x n / 2 of each other they are (n + 1) / 2 + (value - mean) / strength. The non-increasing fit m_k =
    min over i <= k of max over j >= k of mean(y_i ... y_j) to y = s - w, s the sorted values and w their ranks, needs
    no loop.
    """
    n = len(values)
    s, order = (values / strength).sort(descending=True, stable=True)
    y = s - torch.arange(n, 0, -1, device=values.device)
    total = F.pad(y.cumsum(0), (1, 0))
    first, last = torch.arange(n, device=values.device)[:, None], torch.arange(n, device=values.device)
    mean = (total[1:] - total[:-1, None]) / (last - first + 1).clamp_min(1)
    mean = mean.masked_fill(last < first, -torch.inf)
    largest = mean.flip(1).cummax(dim=1).values.flip(1)
    fit = largest.masked_fill(last < first, torch.inf).amin(dim=0)
    return (s - fit)[order.argsort()]


def _negative_entropy(logits: Tensor) -> Tensor:
    """Sum over classes of probability x log-probability, (N,): the score of [Z], larger for surer predictions."""
    log_probs = F.log_softmax(logits, dim=1)
    return (log_probs.exp() * log_probs).sum(dim=1)


def aurc(logits: Tensor, labels: Tensor, strength: float = 0.05) -> Tensor:
    """-log p x -log(1 - r / (n + 1)), r the soft rank of a sample's certainty among the n of its batch [Z].

    The area under the risk-coverage curve as a training loss, with cross-entropy as the risk: the surer a prediction,
    the more it weighs, and the gradient flows through the weight. (The released code's default, its gamma = 1.)
    """
    if not 1e-3 <= strength < float("inf"):
        raise ValueError(f"aurc: strength must be 0.001 or larger, got {strength}.")
    rank = soft_rank(_negative_entropy(logits), strength)
    return -torch.log1p(-rank / (len(labels) + 1)) * cross_entropy(logits, labels)


def aurc_hard(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p x (H_n - H_(n - r)), r the rank of a sample's certainty in its batch, H the harmonic numbers [Z].

    The weight is not differentiated; its mean over a batch is 1.
    """
    n = len(labels)
    rank = _negative_entropy(logits.detach()).argsort(stable=True).argsort() + 1
    weight = torch.digamma(logits.new_full((), n + 1)) - torch.digamma((n - rank + 1).to(logits.dtype))
    return weight * cross_entropy(logits, labels)


def quality_focal(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """|y - q|^beta x binary cross-entropy of q = sigmoid(logit) to y, elementwise [Q].

    targets: y in [0, 1], of any shape, that of logits and of the result. The weight is differentiated; the minimum
    is at q = y: 0, or for beta = 0 the entropy of y. For y in {0, 1} it is the binary focal loss with gamma = beta.
    """
    _not_negative("quality_focal: beta", beta)
    gap = (targets - logits.sigmoid()).abs()
    return _power(gap, beta) * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distribution_focal(logits: Tensor, values: Tensor) -> Tensor:
    """Cross-entropy to a target between two neighbouring whole numbers, (N,) [Q].

    logits: (N, K), of the numbers 0 ... K - 1; values: (N,) in [0, K - 1). With i = floor(value) the target gives i the
    probability i + 1 - value, and i + 1 the rest.
    """
    low = values.floor().long()
    log_probs, upper = F.log_softmax(logits, dim=1), values - low
    at_low, at_high = (log_probs.gather(1, i[:, None])[:, 0] for i in (low, low + 1))
    return -(1 - upper) * at_low - upper * at_high


class ScheduledFocal(nn.Module):
    """FLSc-531: focal loss with gamma 5, then 3, then 1 [M, app. on gamma schedules].

    switches: fractions of the whole training after which the next gamma holds; the paper's are 100 and 250 of
    350 epochs. ``start_epoch`` is called by the training loop.
    """

    def __init__(self, gammas=(5.0, 3.0, 1.0), switches=(100 / 350, 250 / 350)):
        super().__init__()
        if len(gammas) != len(switches) + 1:
            raise ValueError(f"flsc531: needs one gamma more than switches, got {len(gammas)} and {len(switches)}.")
        if list(switches) != sorted(switches) or not all(0 < switch <= 1 for switch in switches):
            raise ValueError(f"flsc531: switches must be above 0, at most 1 and rising, got {list(switches)}.")
        for gamma in gammas:
            _not_negative("flsc531: gamma", gamma)
        self.gammas, self.switches = tuple(gammas), tuple(switches)
        self.register_buffer("gamma", torch.tensor(float(gammas[0])))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """epoch counts from 1 to epochs."""
        stage = sum(epoch - 1 >= round(switch * epochs) for switch in self.switches)
        self.gamma.fill_(self.gammas[stage])

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal(logits, labels, self.gamma)

    def log(self) -> dict:
        return {"gamma": self.gamma.item()}


class AdaFocal(nn.Module):
    """AdaFocal [G, alg. 1]: one gamma per confidence bin, moved after every epoch by validation calibration.

    A training sample's bin is chosen by p (its true-class probability; bins are [lo, hi) as in the published
    code). With E_b = mean confidence - accuracy of validation bin b, ``update`` sets
    gamma_b <- gamma_b exp(rate E_b) where gamma_b > 0, else gamma_b exp(-rate E_b); a |gamma_b| below
    ``switch`` jumps to the other sign at -/+ switch; the result is clipped to [gamma_min, gamma_max].
    The loss is -(1 - p)^gamma log p for gamma > 0 and the inverse focal -(1 + p)^|gamma| log p for gamma < 0.
    """

    def __init__(self, bins=15, rate=1.0, gamma=1.0, gamma_max=20.0, gamma_min=-2.0, switch=0.2):
        super().__init__()
        if not gamma_min <= -switch < 0 < switch <= gamma_max or not gamma_min <= gamma <= gamma_max:
            raise ValueError("adafocal: needs gamma_min <= -switch < 0 < switch <= gamma_max and gamma between them.")
        if not isinstance(bins, int) or bins < 1 or not 0 <= rate < float("inf"):
            raise ValueError(f"adafocal: needs a whole number of bins and a rate of 0 or larger, got {bins}, {rate}.")
        self.rate, self.gamma_max, self.gamma_min, self.switch = rate, gamma_max, gamma_min, switch
        self.register_buffer("gamma", torch.full((bins,), float(gamma)))
        self.register_buffer("edges", torch.linspace(0, 1, bins + 1))
        self.register_buffer("samples", torch.zeros(bins, dtype=torch.long))  # of the epoch, by bin

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.samples.zero_()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = _log_p(logits, labels)
        bin_of = torch.bucketize(log_p.detach().exp(), self.edges[1:-1], right=True)
        self.samples.index_add_(0, bin_of, torch.ones_like(bin_of))
        gamma = self.gamma[bin_of]
        base = torch.where(gamma > 0, -torch.expm1(log_p), 1 + log_p.exp())
        return -_power(base, gamma.abs()) * log_p

    def update(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        """One step from the validation set: confidence (N,) float32 in [0, 1] and correct (N,) bool.

        Bins are those of the adaptive ECE; an empty one (many equal confidences) keeps its gamma. Computed on the CPU,
        so that every device adds up in the same order. Raises ValueError for an empty validation set and for NaN.
        """
        if len(confidence) < 1 or not np.isfinite(confidence).all():
            raise ValueError("AdaFocal.update needs at least one validation sample, and confidences that are finite.")
        edges = metrics.equal_mass_edges(confidence, len(self.gamma))
        count, confidence_sum, correct_sum = metrics.bin_sums(confidence, correct, edges)
        gap = (confidence_sum - correct_sum) / np.maximum(count, 1)
        old = self.gamma.cpu().double().numpy()
        new = old * np.exp(self.rate * gap * np.where(old > 0, 1.0, -1.0))
        new = np.where(np.abs(new) < self.switch, np.where(new > 0, -self.switch, self.switch), new)
        self.gamma.copy_(torch.from_numpy(new.clip(self.gamma_min, self.gamma_max)))
        self.edges.copy_(torch.from_numpy(edges))

    def log(self) -> dict:
        """For history.csv: gamma and upper edge of every bin after the update, and how many training samples each bin
        held in the epoch before it, under the edges of then."""
        moving = {"gamma": self.gamma, "edge": self.edges[1:], "samples": self.samples}
        return {f"{name}_bin{i:02d}": v for name, values in moving.items() for i, v in enumerate(values.tolist())}


LOSSES = {
    "cross_entropy": cross_entropy,
    "label_smoothing": label_smoothing,
    "brier": brier,
    "mmce": mmce,
    "focal": focal,
    "flsd53": flsd,
    "flsc531": ScheduledFocal,
    "adafocal": AdaFocal,
    "dual_focal": dual_focal,
    "inverse_focal": inverse_focal,
    "detached_focal": detached_focal,
    "focal_mdca": focal_mdca,
    "margin_label_smoothing": margin_label_smoothing,
    "bsce_gra": bsce_gra,
    "focal_brier": focal_brier,
    "aurc": aurc,
    "aurc_hard": aurc_hard,
}


def make(name: str, function: str | None = None, **settings):
    """The loss called ``name`` with some settings changed: a callable (logits, labels) -> (N,).

    function: the name in LOSSES, if another one; so one function can be listed under several names, such as
    ``focal7: {function: focal, gamma: 7}``. Raises ValueError for an unknown name or setting, or one that is missing;
    a bad value is refused by the loss itself.
    """
    name = name if function is None else function
    if name not in LOSSES:
        raise ValueError(f"Unknown loss '{name}'; choose one of: {', '.join(LOSSES)}.")
    allowed = {p.name: p.default for p in inspect.signature(LOSSES[name]).parameters.values()}
    allowed = {setting: default for setting, default in allowed.items() if setting not in ("logits", "labels")}
    for setting, value in settings.items():
        if setting not in allowed:
            raise ValueError(f"Loss '{name}' has no setting '{setting}'; it has: {', '.join(allowed) or 'none'}.")
        many = isinstance(allowed[setting], tuple)
        values = value if many and isinstance(value, list | tuple) else [value]
        if many != isinstance(value, list | tuple) or not all(type(v) in (int, float) for v in values):
            kind = "a list of numbers" if many else "a number"
            raise ValueError(f"Setting '{setting}' of loss '{name}' must be {kind}, got {value!r}.")
    if missing := [s for s, default in allowed.items() if default is inspect.Parameter.empty and s not in settings]:
        raise ValueError(f"Loss '{name}' needs the setting '{missing[0]}'.")
    loss = LOSSES[name](**settings) if isinstance(LOSSES[name], type) else partial(LOSSES[name], **settings)
    if not isinstance(loss, nn.Module):
        loss(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))  # a bad value shows now, not hours later
    return loss
