"""Boxes, targets and average precision against hand-computed values and an independent implementation."""

import sys
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import torch

from focalcal import detection
from focalcal.detection import POSITIONS, STRIDE


@pytest.fixture
def pictures():
    """Eight grey images, dark at the rim, and their classes 0 ... 2."""
    rng = np.random.default_rng(0)
    images = np.zeros((8, 12, 12), np.uint8)
    images[:, 2:10, 3:9] = rng.integers(100, 256, (8, 8, 6))
    return images, rng.integers(0, 3, 8)


def one(boxes, scores, labels):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.tensor(labels, dtype=torch.int64)}


def test_scenes_repeat_and_boxes_hold_their_objects(pictures):
    canvases, boxes, labels = detection.scenes(*pictures, 20, 3)
    again = detection.scenes(*pictures, 20, 3)
    assert (canvases == again[0]).all() and all(map(torch.equal, boxes, again[1]))
    assert (canvases != detection.scenes(*pictures, 20, 4)[0]).any()
    for canvas, these, kinds in zip(canvases, boxes, labels, strict=True):
        assert 1 <= len(these) == len(kinds) <= 4 and set(kinds.tolist()) <= set(pictures[1].tolist())
        outside = canvas.copy()
        for left, top, right, bottom in these.int().tolist():
            outside[top:bottom, left:right] = 0
        assert canvas.any() and not outside.any()
        for a, b in combinations(these.numpy(), 2):
            common = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
            assert common <= 0.3 * min(np.prod(box[2:] - box[:2]) for box in (a, b))
    left, top, right, bottom = next(these[0] for these in boxes if len(these) == 1).int().tolist()
    alone = canvases[[len(these) == 1 for these in boxes].index(True)] > 0
    assert np.flatnonzero(alone.any(axis=0))[[0, -1]].tolist() == [left, right - 1]
    assert np.flatnonzero(alone.any(axis=1))[[0, -1]].tolist() == [top, bottom - 1]
    with pytest.raises(ValueError, match="sides must rise"):
        detection.scenes(*pictures, 1, 0, sides=(16, 80))


def test_a_sides_distribution_becomes_its_expected_distance():
    sides = torch.full((4, POSITIONS), -50.0)
    sides[0, 2] = sides[1, 0] = sides[2, 8] = 50.0
    sides[3, 1] = sides[3, 4] = 50.0
    box = detection.decode(sides, torch.tensor([30.0, 10.0]))
    assert box.tolist() == pytest.approx([30 - 2 * STRIDE, 10, 30 + 8 * STRIDE, 10 + 2.5 * STRIDE])


def test_locations_belong_to_the_smallest_box_around_whose_middle_they_are():
    large, small = [0.0, 0, 32, 32], [12.0, 12, 22, 22]
    classes, matched = detection.targets([torch.tensor([small, large])], [torch.tensor([5, 7])], 64)
    points = detection.centres(256)
    assert points[:2].tolist() == [[2, 2], [6, 2]] and points[16].tolist() == [2, 6]
    found = {tuple(points[i].int().tolist()): classes[0, i].item() for i in torch.nonzero(classes[0] >= 0)[:, 0]}
    near = [(x, y) for x in (10, 14, 18, 22) for y in (10, 14, 18, 22)]  # of both middles, 16 and 17
    assert found == {place: 5 if max(place) < 22 and min(place) > 12 else 7 for place in near}
    assert matched[0, classes[0] == 7].unique(dim=0).tolist() == [large]


def test_iou_and_the_two_focal_losses():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    others = torch.tensor([[0.0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30]])
    assert detection.iou(boxes, others).tolist() == pytest.approx([0.5, 25 / 175, 0])
    logits, hard = torch.tensor([-1.0, 0.3]), torch.tensor([0.0, 1.0])
    assert detection.soft_focal(logits, hard).tolist() == pytest.approx(detection.quality_focal(logits, hard).tolist())
    q, y = torch.linspace(0.001, 0.999, 999).double(), torch.full((999,), 0.9).double()
    least = q[detection.soft_focal(q.logit(), y).argmin()].item()
    a = [(1 - x) ** 2 / x - 2 * (1 - x) * np.log(x) for x in (least, 1 - least)]  # minus the derivative of a part
    assert 0.69 < least < 0.70 and a[1] / sum(a) == pytest.approx(0.9, abs=1e-3)
    z = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: detection.soft_focal(z, torch.tensor([0.2, 0.9, 0.5]).double()), z)


@pytest.mark.parametrize(
    ("score", "scores_own"),
    [("focal", 0.0180), ("soft_focal", 0.5893), ("quality_focal", 0.2779), ("quality_bce", 1.1116)],
)
def test_the_loss_of_one_location_by_hand(score, scores_own):
    """Probability 0.75; every side at position 1, so a box of 8 x 8 around one of 4 x 4: IoU and GIoU 1/4.

    The sides are at 0.5, and position 0 is 50 below position 1, so DFL is 25. The quality's logit is 0.
    """
    sides = torch.zeros(4, detection.POSITIONS)
    sides[:, 1] = 50
    maps = torch.cat([torch.tensor([3.0]).log(), torch.zeros(1), sides.flatten()])[None, :, None, None]
    truth = torch.tensor([[0]]), torch.tensor([[[0.0, 0, 4, 4]]])
    branch = np.log(2) if score == "focal" else 0
    known = scores_own + 2 * 0.75 + branch
    assert detection.losses(maps, *truth, score, 0.0).item() == pytest.approx(known, abs=1e-4)
    assert detection.losses(maps, *truth, score).item() == pytest.approx(known + 0.25 * 25, abs=1e-4)
    slopes = {}
    for name in (score, "focal"):  # a target that is an IoU is a number: the score's loss does not move the box
        moved = (maps / 20).requires_grad_()  # the sides' positions less sure, so that a box can move
        detection.losses(moved, *truth, name).backward()
        slopes[name] = moved.grad[0, 2:, 0, 0]
    torch.testing.assert_close(slopes[score], slopes["focal"])


@pytest.mark.parametrize("score", detection.SCORES)
def test_training_is_finite_lowers_the_loss_and_repeats(pictures, score):
    canvases, boxes, labels = detection.scenes(*pictures, 16, 0)
    options = {"classes": 3, "epochs": 6, "batch": 4, "rate": 0.01, "width": 8}
    nets = [detection.train(canvases, boxes, labels, score, 1, **options) for _ in range(2)]
    assert all(map(torch.equal, *(net.state_dict().values() for net in nets)))
    wanted, inputs = detection.targets(boxes, labels, 64), torch.from_numpy(canvases).float()[:, None] / 255
    before, after = (
        detection.losses(net.train()(inputs), *wanted, score) for net in (detection.network(3, 8, 1), nets[1])
    )
    assert torch.isfinite(after) and after < before
    scores, quality, places = detection.predict(nets[0], canvases)
    assert scores.shape == (16, 256, 3) and quality.shape == (16, 256) and places.shape == (16, 256, 4)
    empty = detection.losses(nets[0](inputs), torch.full_like(wanted[0], -1), wanted[1], score)
    assert torch.isfinite(empty)


def test_suppression_keeps_the_highest_score_of_a_class():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]])
    found = detection.detect(torch.tensor([[[0.5, 0.3], [0.9, 0.0], [0.04, 0.2]]]), boxes)[0]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.3, 0.2]) and found["labels"].tolist() == [0, 1, 1]


def test_a_perfect_detector_has_ap_1_and_fits_every_object(pictures):
    _, boxes, labels = detection.scenes(*pictures, 10, 0)
    found = [one(b.tolist(), [1.0] * len(b), kinds.tolist()) for b, kinds in zip(boxes, labels, strict=True)]
    precise = detection.average_precision(found, boxes, labels, 4)
    assert np.isnan(precise[:, 3]).all() and (precise[:, :3][~np.isnan(precise[:, :3])] == 1).all()
    assert (detection.best_ious(found, boxes, labels)[1] == 1).all()
    assert detection.average_precision([one([], [], [])], boxes[:1], labels[:1], 4)[:, labels[0][0]].max() == 0


def test_average_precision_by_hand():
    """Two objects; right (IoU 0.82), wrong, right (IoU 1): precision 1 up to recall 1/2, then 2/3."""
    truth = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]])
    found = one([[0, 0, 10, 8.2], [20, 20, 30, 30], [40, 40, 50, 50]], [0.9, 0.8, 0.7], [0, 0, 0])
    precise = detection.average_precision([found], [truth], [torch.tensor([0, 0])], 1)[:, 0]
    half = (51 + 50 * 2 / 3) / 101
    assert precise[:7].tolist() == pytest.approx([half] * 7)
    assert precise[7:].tolist() == pytest.approx([51 / 101 / 3] * 3)
    scores, ious = detection.best_ious([found], [truth], [torch.tensor([0, 0])])
    assert ious.tolist() == pytest.approx([0.82, 0, 1])
    measured = detection.quality_calibration(scores, ious, bins=10)
    assert measured["gap"] == pytest.approx((0.08 + 0.8 + 0.3) / 3) and measured["bias"] == pytest.approx(0.58 / 3)


def test_average_precision_against_torchmetrics(pictures, monkeypatch):
    _mean_ap = pytest.importorskip("torchmetrics.detection._mean_ap")
    monkeypatch.setattr(_mean_ap, "_PYCOCOTOOLS_AVAILABLE", True)  # it uses these for masks only
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    _, boxes, labels = detection.scenes(*pictures, 30, 0)
    rng, found = np.random.default_rng(1), []
    for these, kinds in zip(boxes, labels, strict=True):
        near = np.concatenate([these.numpy() + rng.normal(0, size, these.shape) for size in (0.5, 2)])
        said = np.where(rng.random(len(near)) < 0.3, rng.integers(0, 3, len(near)), kinds.tolist() * 2)  # some wrong
        found.append(one(near.tolist(), rng.random(len(near)).astype(np.float32).tolist(), said.tolist()))
    theirs = _mean_ap.MeanAveragePrecision()  # in float32: a recall on one of the 101 points may round to the next
    theirs.update(found, [{"boxes": b, "labels": kinds} for b, kinds in zip(boxes, labels, strict=True)])
    theirs, ours = theirs.compute(), detection.average_precision(found, boxes, labels, 3)
    assert np.nanmean(ours) == pytest.approx(theirs["map"].item(), abs=2e-3)
    assert np.nanmean(ours[0]) == pytest.approx(theirs["map_50"].item(), abs=2e-3)
    assert np.nanmean(ours[5]) == pytest.approx(theirs["map_75"].item(), abs=2e-3)
