import math

import numpy as np
import pytest
import torch
from helpers import make_loss
from sklearn.isotonic import isotonic_regression
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import sigmoid_focal_loss

from focalcal import losses


def logits_of(*probabilities):
    return torch.log(torch.tensor(probabilities, dtype=torch.float64))


def test_values_by_hand():
    z, y = logits_of([0.5, 0.3, 0.2]), torch.tensor([1])
    log_p = math.log(0.3)
    expected = {
        losses.cross_entropy: -log_p,
        losses.brier: 0.5**2 + (0.3 - 1) ** 2 + 0.2**2,
        lambda z, y: losses.label_smoothing(z, y, 0.1): -0.9 * log_p - 0.05 * (math.log(0.5) + math.log(0.2)),
        lambda z, y: losses.focal(z, y, 2): -(0.7**2) * log_p,
        lambda z, y: losses.inverse_focal(z, y, 2): -(1.3**2) * log_p,
        lambda z, y: losses.dual_focal(z, y, 2): -((1 - 0.3 + 0.2) ** 2) * log_p,
        lambda z, y: losses.flsd(z, y): -(0.7**3) * log_p,
        lambda z, y: losses.flsd(z, y, threshold=0.31): -(0.7**5) * log_p,
        lambda z, y: losses.detached_focal(z, y, 2): -(0.7**2) * log_p,
        lambda z, y: losses.bsce_gra(z, y, 4, 2): -((0.5**2 + 0.7**2 + 0.2**2) ** 2) * log_p,
        lambda z, y: losses.focal_brier(z, y, 2, 0.5): -(0.7**2) * log_p + 0.5 * (0.25 + 0.49 + 0.04),
        lambda z, y: losses.focal_mdca(z, y, 1, 2.0): -0.7 * log_p + 2 * (0.5 + 0.7 + 0.2) / 3,
        # log 0.5 - log 0.3 = 0.511 and log 0.5 - log 0.2 = 0.916 are the margins of the two smaller logits
        lambda z, y: losses.margin_label_smoothing(z, y, 0.6, 0.3): -log_p + 0.3 * (math.log(0.5 / 0.2) - 0.6) / 3,
        lambda z, y: losses.aurc(z, y): math.log(2) * -log_p,  # alone in its batch: rank 1 of 1
        losses.aurc_hard: -log_p,
    }
    for loss, value in expected.items():
        assert loss(z, y).item() == pytest.approx(value, rel=1e-9)


def test_focal_at_gamma_zero_is_cross_entropy_and_brier_ends_at_two():
    torch.manual_seed(0)
    z, y = torch.randn(50, 7), torch.randint(0, 7, (50,))
    reference = F.cross_entropy(z, y, reduction="none")
    for same in (losses.focal(z, y, 0.0), losses.inverse_focal(z, y, 0.0), losses.dual_focal(z, y, 0.0)):
        torch.testing.assert_close(same, reference)
    torch.testing.assert_close(losses.label_smoothing(z, y, 0.0), reference)
    # PyTorch spreads alpha over all K classes, so its alpha is ours times K / (K - 1)
    smoothed = F.cross_entropy(z, y, reduction="none", label_smoothing=0.06 * 7 / 6)
    torch.testing.assert_close(losses.label_smoothing(z, y, 0.06), smoothed)
    assert losses.brier(torch.tensor([[40.0, -40.0]]), torch.tensor([1])).item() == pytest.approx(2)


class NothingWaitsForTheGPU(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: a copy from the CPU, and an answer that the CPU waits for."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result, name = operator(*arguments, **(options or {})), str(operator)
        assert not name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh")), name
        moved = [x.device for x in arguments if isinstance(x, torch.Tensor)][:1]
        assert "copy" not in name or moved == [result.device] or not moved, f"{name} copies from {moved[0]}"
        return result


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_gpu_can_record_every_loss(name):
    """On tensors without content, which say that they are a GPU's: so that this runs anywhere."""
    with FakeTensorMode():
        loss, gpu = make_loss(name), torch.device("cuda:0")
        loss = loss.to(gpu) if isinstance(loss, torch.nn.Module) else loss
        logits, labels = torch.empty(12, 5, device=gpu), torch.empty(12, dtype=torch.int64, device=gpu)
        with NothingWaitsForTheGPU():
            assert loss(logits, labels).device == gpu


DETACHED = ("detached_focal", "bsce_gra", "aurc_hard")  # whose weight is not differentiated


@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name not in DETACHED])
def test_gradients_against_finite_differences(name):
    torch.manual_seed(3)
    z, y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (6,))
    loss = make_loss(name)
    if isinstance(loss, losses.AdaFocal):
        loss = loss.double()
        loss.gamma.copy_(torch.linspace(-2, 5, 15))
    assert loss(z, y).shape == (6,)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_extreme_logits_give_finite_losses_and_gradients(name):
    z = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = make_loss(name)
    if isinstance(loss, losses.AdaFocal):
        loss.gamma.fill_(0.3)
    value = loss(z, torch.tensor([0, 0, 0]))
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()


@pytest.mark.parametrize("loss", [losses.focal, losses.dual_focal])
def test_gammas_below_one_have_finite_gradients_where_p_is_one(loss):
    z = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss(z, torch.tensor([0]), 0.5).sum().backward()
    sure = torch.tensor([40.0], requires_grad=True)
    losses.quality_focal(sure, torch.tensor([1.0]), 0.5).sum().backward()
    assert z.grad.isfinite().all() and sure.grad.isfinite().all()


def test_flsd_does_not_differentiate_gamma():
    z = logits_of([0.1, 0.9], [0.6, 0.4]).requires_grad_()
    y = torch.tensor([0, 0])
    (slope,) = torch.autograd.grad(losses.flsd(z, y).sum(), z)
    (parts,) = torch.autograd.grad(losses.focal(z[:1], y[:1], 5).sum() + losses.focal(z[1:], y[1:], 3).sum(), z)
    torch.testing.assert_close(slope, parts)


def test_dual_focal_takes_the_largest_probability_strictly_below():
    y = torch.tensor([0])
    for probabilities, runner_up in (
        ([0.5, 0.3, 0.2], 0.3),
        ([0.4, 0.4, 0.2], 0.2),  # a tie with the true class does not count
        ([0.2, 0.5, 0.3], 0.0),  # nothing below
        ([1 / 3, 1 / 3, 1 / 3], 0.0),
    ):
        p = probabilities[0]
        value = losses.dual_focal(logits_of(probabilities), y, 3.0).item()
        assert value == pytest.approx(-((1 - p + runner_up) ** 3) * math.log(p))


def mmce_by_pairs(confidence, correct):
    """MMCE_w as published, one pair at a time."""
    kernel = lambda a, b: math.exp(-abs(a - b) / 0.4)  # noqa: E731
    right, wrong = confidence[correct], confidence[~correct]
    m, n = len(right), len(wrong)
    cc = sum((1 - a) * (1 - b) * kernel(a, b) for a in right for b in right) / m**2
    ii = sum(a * b * kernel(a, b) for a in wrong for b in wrong) / n**2
    ci = sum((1 - a) * b * kernel(a, b) for a in right for b in wrong) / (m * n)
    return math.sqrt(cc / (m * m + 1e-5) + ii / (n * n + 1e-5) - 2 * ci / (m * n + 1e-5) + 1e-10)


def test_mmce_against_pairs_and_its_empty_groups():
    torch.manual_seed(1)
    z, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 5, (40,))
    confidence, predicted = z.softmax(1).max(1)
    expected = mmce_by_pairs(confidence.numpy(), (predicted == y).numpy())
    assert losses.mmce_weighted(z, y).item() == pytest.approx(expected)
    torch.testing.assert_close(losses.mmce(z, y), losses.cross_entropy(z, y) + 2 * expected)
    for all_right_or_wrong in (z.argmax(1), (z.argmax(1) + 1) % 5):
        z_grad = z.clone().requires_grad_()
        penalty = losses.mmce_weighted(z_grad, all_right_or_wrong)
        assert penalty.item() == 0
        penalty.backward()
        assert z_grad.grad.isfinite().all()


def test_flsc531_switches_where_the_published_schedule_does():
    loss = losses.ScheduledFocal()
    seen = {}
    for epoch in range(1, 351):
        loss.start_epoch(epoch, 350)
        seen.setdefault(loss.gamma.item(), []).append(epoch)
    # published for epochs counted from 0: gamma 5 below 100, 3 below 250, then 1
    ranges = {gamma: (epochs[0], epochs[-1]) for gamma, epochs in seen.items()}
    assert ranges == {5: (1, 100), 3: (101, 250), 1: (251, 350)}


def test_adafocal_update_by_hand():
    loss = losses.AdaFocal(bins=2)
    assert loss.gamma.tolist() == [1, 1]
    # the middle edge is the sample at position 2 of 4, 0.8; bins are (lo, hi], so 0.2, 0.4 and 0.8 (two right: gap
    # (1.4 - 2) / 3 = -0.2) go to the first bin and 0.9 (wrong: gap 0.9) to the second
    loss.update(np.array([0.2, 0.9, 0.4, 0.8], np.float32), np.array([True, False, True, False]))
    np.testing.assert_allclose(loss.gamma, [math.exp(-0.2), math.exp(0.9)], rtol=1e-6)
    np.testing.assert_allclose(loss.edges, [0.2, 0.8, 0.9])


def test_adafocal_switches_sign_and_clips():
    def after(gamma, gap):
        """The gamma after one step from twenty samples whose confidence is off by a gap."""
        loss = losses.AdaFocal(bins=1)
        loss.gamma.fill_(gamma)
        loss.update(np.full(20, 0.5 + gap / 2, np.float32), np.arange(20) < round(20 * (0.5 - gap / 2)))
        return loss.gamma.item()

    assert after(0.25, -0.5) == pytest.approx(-0.2)  # 0.25 exp(-0.5) = 0.15 < 0.2: over to the inverse focal loss
    assert after(-0.25, 0.5) == pytest.approx(0.2)  # and back: -0.25 exp(-0.5) = -0.15
    assert after(-1.0, -0.5) == pytest.approx(-math.exp(0.5))  # under-confident: more inverse focus
    assert after(-1.9, -0.9) == pytest.approx(-2)
    assert after(15.0, 0.9) == pytest.approx(20)


def test_adafocal_uses_the_bin_of_the_true_class_probability():
    """Bins are [lo, hi): the second and the fourth sample lie on edges, to the last bit, and belong above them."""
    loss, said = losses.AdaFocal(bins=4), [0.1, 0.25, 0.4, 0.5, 0.9]
    z, y = torch.tensor([[math.log(p), math.log(1 - p)] for p in said]), torch.zeros(5, dtype=torch.int64)
    loss.edges[1:3] = (-losses.cross_entropy(z, y)).exp()[[1, 3]]
    loss.gamma.copy_(torch.tensor([5.0, 3.0, 1.0, -1.0]))
    expected = [-w * math.log(p) for w, p in zip((0.9**5, 0.75**3, 0.6**3, 0.5, 1.9), said, strict=True)]
    assert loss(z, y).tolist() == pytest.approx(expected, rel=1e-4)


def test_adafocal_counts_the_training_samples_of_an_epoch_by_bin():
    loss = losses.AdaFocal(bins=4)
    for batch in ([0.1, 0.3, 0.4], [0.6, 0.9]):
        p = torch.tensor(batch)
        loss(torch.stack([p.log(), (1 - p).log()], dim=1), torch.zeros(len(batch), dtype=torch.long))
    logged = loss.log()
    assert [logged[f"samples_bin{i:02d}"] for i in range(4)] == [1, 2, 1, 1]
    assert [logged[f"edge_bin{i:02d}"] for i in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [logged[f"gamma_bin{i:02d}"] for i in range(4)] == [1, 1, 1, 1] and len(logged) == 12
    loss.start_epoch(2, 3)
    assert loss.samples.tolist() == [0, 0, 0, 0]


def test_adafocal_keeps_the_gamma_of_an_empty_bin():
    loss = losses.AdaFocal(bins=3)  # all confidences alike: the first bin holds every sample
    loss.gamma.copy_(torch.tensor([2.0, 3.0, -1.0]))
    loss.update(np.ones(100, np.float32), np.arange(100) < 50)
    assert loss.gamma.tolist() == pytest.approx([2 * math.exp(0.5), 3, -1]) and loss.edges.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="needs at least one validation sample"):
        loss.update(np.zeros(0, np.float32), np.zeros(0, bool))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("focal4", {}, "Unknown loss 'focal4'; choose one of: cross_entropy, "),
        ("focal4", {"function": "fokal"}, "Unknown loss 'fokal'"),
        ("focal", {}, "Loss 'focal' needs the setting 'gamma'"),
        ("focal3", {"function": "focal"}, "Loss 'focal' needs the setting 'gamma'"),
        ("dual_focal", {}, "Loss 'dual_focal' needs the setting 'gamma'"),
        ("focal", {"gama": 1}, "Loss 'focal' has no setting 'gama'; it has: gamma."),
        ("brier", {"gamma": 1}, "Loss 'brier' has no setting 'gamma'; it has: none."),
        ("focal", {"gamma": -1}, "gamma must be 0 or larger"),
        ("focal", {"gamma": "three"}, "must be a number, got 'three'"),
        ("focal", {"gamma": True}, "must be a number, got True"),
        ("label_smoothing", {"alpha": 1.5}, "alpha must lie in"),
        ("mmce", {"weight": -2}, "weight must be 0 or larger"),
        ("focal", {"gamma": float("inf")}, "gamma must be 0 or larger"),
        ("focal", {"gamma": [1, 2]}, "must be a number"),
        ("flsd53", {"threshold": 5}, "threshold is a probability"),
        ("flsd53", {"gamma_top": -2.0}, "flsd: gamma_top must be 0 or larger"),
        ("adafocal", {"gamma_min": 1}, "needs gamma_min <= -switch < 0"),
        ("adafocal", {"bins": 2.5}, "whole number of bins"),
        ("adafocal", {"rate": -1}, "rate of 0 or larger, got 15, -1"),
        ("flsc531", {"gammas": [5, 3]}, "one gamma more than switches, got 2 and 2"),
        ("flsc531", {"switches": [0.7, 0.3]}, "must be above 0, at most 1 and rising, got"),
        ("flsc531", {"gammas": 5}, "must be a list of numbers"),
    ],
)
def test_bad_settings_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        losses.make(name, **settings)


def test_one_function_under_several_names():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for gamma in (3.0, 7.0):
        loss = losses.make(f"focal{gamma:.0f}", function="focal", gamma=gamma)
        assert torch.equal(loss(logits, labels), losses.focal(logits, labels, gamma))


def test_weights_that_are_not_differentiated_only_weigh():
    torch.manual_seed(0)
    z, y = torch.randn(40, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (40,))
    (slope,) = torch.autograd.grad(losses.cross_entropy(z, y).sum(), z)
    for name in DETACHED:
        values = make_loss(name)(z, y)
        weight = (values / losses.cross_entropy(z, y)).detach()
        (found,) = torch.autograd.grad(values.sum(), z)
        torch.testing.assert_close(found, weight[:, None] * slope)
    torch.testing.assert_close(losses.bsce_gra(z, y, 3.0, 1.0), 2**3 * losses.detached_focal(z, y, 3.0))
    torch.testing.assert_close(losses.detached_focal(z, y, 3.0), losses.focal(z, y, 3.0))


def test_defaults_are_the_papers():
    torch.manual_seed(0)
    z, y = 8 * torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 5, (40,))
    log_p, probs, own = -losses.cross_entropy(z, y), z.softmax(dim=1), F.one_hot(y, 5)
    beyond = (z.amax(dim=1, keepdim=True) - z - 10).clamp(min=0)
    assert (beyond > 0).any(), "else the margin is not seen"
    expected = {
        losses.focal_mdca: -(1 - log_p.exp()) * log_p + (probs.mean(dim=0) - own.double().mean(dim=0)).abs().mean(),
        losses.focal_brier: -((1 - log_p.exp()) ** 3) * log_p + (probs - own).square().sum(dim=1),
        losses.margin_label_smoothing: -log_p + 0.1 * beyond.mean(dim=1),
        losses.bsce_gra: -((probs - own).square().sum(dim=1) ** 2) * log_p,
        losses.aurc: losses.aurc(z, y, strength=0.05),
        losses.label_smoothing: -0.95 * log_p - 0.05 / 4 * (z.log_softmax(dim=1).sum(dim=1) - log_p),
    }
    for loss, values in expected.items():
        torch.testing.assert_close(loss(z, y), values)
    at = torch.tensor([0.199, 0.201, 0.499, 0.501], dtype=torch.float64)
    for top, gammas in ((None, [5, 3, 3, 3]), (2.0, [5, 3, 3, 2])):
        values = losses.flsd(torch.stack([at, 1 - at], dim=1).log(), torch.zeros(4, dtype=torch.long), gamma_top=top)
        torch.testing.assert_close(values, -((1 - at) ** torch.tensor(gammas)) * at.log())
    assert torch.autograd.gradcheck(lambda z: losses.margin_label_smoothing(z, y), z.requires_grad_())


def test_mdca_by_hand():
    z = logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8])
    assert losses.mdca(z, torch.tensor([1, 1])).item() == pytest.approx((0.3 + (1 - 0.2) + 0.5) / 3)
    assert losses.mdca(z, torch.tensor([0, 2])).item() == pytest.approx((0.2 + 0.2 + 0.0) / 3)


def test_soft_ranks():
    """Blondel et al. 2020: the projection of s onto the permutahedron, here by scikit-learn's isotonic regression."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 60):
        for strength in (1e-6, 0.05, 0.3, 100.0):
            values = rng.normal(size=n)
            ranks = losses.soft_rank(torch.tensor(values), strength).numpy()
            order = np.argsort(-values)
            y = values[order] / strength - np.arange(n, 0, -1)
            expected = np.empty(n)
            expected[order] = values[order] / strength - isotonic_regression(y, increasing=False)
            assert ranks == pytest.approx(expected, abs=1e-6)
            assert ranks.sum() == pytest.approx(n * (n + 1) / 2) and 1 - 1e-6 <= ranks.min() <= ranks.max() <= n + 1e-6
    assert losses.soft_rank(torch.tensor([0.3, -2.0, 5.0]).double(), 1e-6).tolist() == pytest.approx(
        [2, 1, 3], abs=1e-4
    )
    torch.manual_seed(0)
    close = torch.rand(128, dtype=torch.float64) * 2.3  # negative entropies of ten classes differ by log 10 at most
    affine = 129 / 2 + (close - close.mean()) / 0.05
    torch.testing.assert_close(losses.soft_rank(close, 0.05), affine)


def test_aurc_weighs_by_certainty():
    z, y = logits_of([0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]), torch.tensor([0, 0, 0])
    certainty = [sum(p * math.log(p) for p in row) for row in ([0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.4, 0.3, 0.3])]
    mean = sum(certainty) / 3
    for strength in (1.0, 5.0):  # all within 1.5 strengths: the affine form
        weights = [-math.log(1 - (2 + (c - mean) / strength) / 4) for c in certainty]
        expected = [-w * math.log(p) for w, p in zip(weights, (0.5, 0.9, 0.4), strict=True)]
        assert losses.aurc(z, y, strength).tolist() == pytest.approx(expected)
    # ranks 2, 3, 1 of 3: weights 1/3 + 1/2, 1/3 + 1/2 + 1, 1/3
    weights = (1 / 3 + 1 / 2, 1 / 3 + 1 / 2 + 1, 1 / 3)
    expected = [-w * math.log(p) for w, p in zip(weights, (0.5, 0.9, 0.4), strict=True)]
    assert losses.aurc_hard(z, y).tolist() == pytest.approx(expected, rel=1e-6)
    z, y = torch.randn(128, 10, generator=torch.Generator().manual_seed(0)).double(), torch.arange(128) % 10
    assert (losses.aurc_hard(z, y) / losses.cross_entropy(z, y)).mean().item() == pytest.approx(1)


def test_generalized_focal_losses_have_their_minimum_at_the_target():
    q = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    z = torch.log(q / (1 - q))
    for target in (0.0, 0.2, 0.5, 0.83, 1.0):
        values = losses.quality_focal(z, torch.full_like(z, target))
        assert values.argmin().item() == min(max(round(100 * target) - 1, 0), 98) and values.min() < 1e-3
    both = torch.stack([-z / 2, z / 2], dim=1)  # two classes, the second with probability q
    torch.testing.assert_close(
        losses.quality_focal(z, torch.ones_like(z), 3.0), losses.focal(both, torch.ones(99).long(), 3.0)
    )
    half = torch.tensor(0.5, dtype=torch.float64)
    assert losses.quality_focal(torch.zeros(()).double(), half * 1.6).item() == pytest.approx(0.3**2 * math.log(2))

    torch.manual_seed(0)
    z, y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.rand(6, 4, dtype=torch.float64)
    for beta in (0.0, 0.5, 2.0):
        assert torch.autograd.gradcheck(lambda z, beta=beta: losses.quality_focal(z, y, beta), z)
    hard = (y > 0.5).double()
    known = sigmoid_focal_loss(z, hard, alpha=-1, gamma=2)
    torch.testing.assert_close(losses.quality_focal(z, hard), known)


def test_distribution_focal():
    spread = logits_of([0.1, 0.2, 0.3, 0.4])
    value = losses.distribution_focal(spread, torch.tensor([1.25], dtype=torch.float64)).item()
    assert value == pytest.approx(-0.75 * math.log(0.2) - 0.25 * math.log(0.3))
    z = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.distribution_focal(z, torch.tensor([3.5])).sum(), z)
    assert slope[0].tolist() == pytest.approx([0.2, 0.2, 0.2, -0.3, -0.3])  # towards a half and a half
    at_a_number = losses.distribution_focal(spread, torch.tensor([2.0], dtype=torch.float64))
    assert at_a_number.item() == pytest.approx(-math.log(0.3))
    values = torch.tensor([0.0, 0.3, 2.0, 2.99], dtype=torch.float64)
    torch.manual_seed(0)
    z = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: losses.distribution_focal(z, values), z)
