"""A small dense detector for the generalized focal loss: scenes, network, training, detections and their scores.

One anchor-free head at one stride, as FCOS (Tian et al., ICCV 2019) has several; its losses are those of Li et al.,
Generalized Focal Loss, NeurIPS 2020. Boxes are (left, top, right, bottom) in pixels, float32. Everything runs on the
CPU. torchvision is needed for boxes' operators, and imported where it is used.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalcal.losses import distribution_focal, quality_focal
from focalcal.metrics import bin_sums, equal_width_edges

STRIDE = 4  # pixels from one location to the next, and the unit of a box's sides
POSITIONS = 9  # positions 0 ... 8 of a side: boxes reach up to 8 strides from a location
RADIUS = 1.5  # strides around the middle of a box in which locations belong to it, as in FCOS
INK = 16  # of 255: darker pixels are background
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU, COCO's


def scenes(images, labels, count: int, seed: int, size: int = 64, sides=(16, 32), most: int = 4, overlap: float = 0.3):
    """Canvases with one to ``most`` images each, at random places and scales; later ones cover earlier ones.

    images: uint8 (N, H, W); labels: (N,). sides: smallest and largest side in pixels to which an image is scaled;
    overlap: largest share of the smaller of two boxes that may be common. Returns canvases, uint8 (count, size, size),
    and for each its boxes, (n, 4), tight around the pixels from INK on, and labels, int64 (n,). ValueError if images do
    not fit or are blank.
    """
    if not 2 <= sides[0] <= sides[1] <= size:
        raise ValueError(f"scenes: sides must rise, from 2 to at most {size}, got {sides}.")
    rng, canvases, boxes, classes = np.random.default_rng(seed), np.zeros((count, size, size), np.uint8), [], []
    for canvas in canvases:
        placed, kinds = [], []
        for _ in range(rng.integers(1, most + 1)):
            chosen, side = rng.integers(len(images)), int(rng.integers(sides[0], sides[1] + 1))
            one = _scaled(images[chosen], side)
            for _ in range(10):  # tries
                x, y = rng.integers(0, size - one.shape[1] + 1), rng.integers(0, size - one.shape[0] + 1)
                box = np.array([x, y, x + one.shape[1], y + one.shape[0]], np.float32)
                if all(_common(box, other) <= overlap for other in placed):
                    part = canvas[y : y + one.shape[0], x : x + one.shape[1]]
                    part[one >= INK] = one[one >= INK]
                    placed.append(box)
                    kinds.append(labels[chosen])
                    break
        boxes.append(torch.from_numpy(np.stack(placed)))
        classes.append(torch.tensor(np.array(kinds), dtype=torch.int64))
    return canvases, boxes, classes


def _scaled(image: np.ndarray, side: int) -> np.ndarray:
    """An image scaled to side x side, cut to its pixels from INK on."""
    as_float = torch.from_numpy(image.astype(np.float32))[None, None]
    scaled = F.interpolate(as_float, (side, side), mode="bilinear", antialias=True)[0, 0].round().byte().numpy()
    rows, columns = (np.flatnonzero((scaled >= INK).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError(f"scenes: an image scaled to {side} pixels has none from {INK} on.")
    return scaled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _common(one: np.ndarray, other: np.ndarray) -> float:
    """The common area of two boxes as a share of the smaller one."""
    width, height = (np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).clip(0)
    return width * height / min(np.prod(box[2:] - box[:2]) for box in (one, other))


def network(classes: int, width: int, seed: int) -> nn.Sequential:
    """A fully convolutional network: (N, 1, S, S) to (N, classes + 1 + 4 x POSITIONS, S / STRIDE, S / STRIDE).

    Its first channels are the classes' logits, the next the quality's, the rest the four sides'; see ``outputs``.
    """

    def block(before, after, stride=1, dilation=1):
        conv = nn.Conv2d(before, after, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Conv2d(width, classes + 1 + 4 * POSITIONS, 3, padding=1)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        nn.init.constant_(head.bias[:classes], -np.log(99))  # at first every score is 0.01, as in RetinaNet
        strided = block(1, width // 2, 2), block(width // 2, width, 2)
        deep = block(width, width), block(width, width, dilation=2), block(width, width)
        return nn.Sequential(*strided, *deep, head).to(memory_format=torch.channels_last)


def outputs(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a network says, by location: logits (N, L, classes), quality (N, L) and sides (N, L, 4, POSITIONS)."""
    flat = maps.flatten(2).transpose(1, 2)
    scores, sides = flat[..., : -4 * POSITIONS], flat[..., -4 * POSITIONS :]
    return scores[..., :-1], scores[..., -1], sides.unflatten(2, (4, POSITIONS))


def centres(count: int) -> Tensor:
    """x and y in pixels of the ``count`` locations of a square grid, row by row, (count, 2)."""
    line = (torch.arange(round(count**0.5)) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)


def decode(sides: Tensor, middle: Tensor) -> Tensor:
    """Boxes (..., 4) from logits over their sides' positions (..., 4, POSITIONS), left, top, right and bottom.

    A side's expected position is its distance from ``middle`` (..., 2), in strides.
    """
    distance = STRIDE * (sides.softmax(dim=-1) @ torch.arange(POSITIONS, dtype=sides.dtype))
    return torch.cat([middle - distance[..., :2], middle + distance[..., 2:]], dim=-1)


def targets(boxes: list[Tensor], labels: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Which object each location of each scene has to find: its class (N, L), -1 for none, and box (N, L, 4).

    A location belongs to a box that it lies in if it is within RADIUS strides of the box's middle in x and in y; of
    several the smallest wins.
    """
    points = centres((size // STRIDE) ** 2)
    classes, matched = torch.full((len(boxes), len(points)), -1), torch.zeros(len(boxes), len(points), 4)
    for scene, (these, kinds) in enumerate(zip(boxes, labels, strict=True)):
        for number in (these[:, 2:] - these[:, :2]).prod(dim=1).argsort(descending=True).tolist():
            box = these[number]
            inside = ((points > box[:2]) & (points < box[2:])).all(dim=1)
            near = ((points - (box[:2] + box[2:]) / 2).abs() <= RADIUS * STRIDE).all(dim=1)
            classes[scene, inside & near], matched[scene, inside & near] = kinds[number], box
    return classes, matched


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes and others, pair by pair, (..., 4) to (...)."""
    common = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    areas = sum((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (one, other))
    return common.prod(dim=-1) / (areas - common.prod(dim=-1))


def soft_focal(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary focal loss, its two parts weighted by target and 1 - target, elementwise: *not* least at the target."""
    q = logits.sigmoid()
    return -targets * (1 - q) ** gamma * F.logsigmoid(logits) - (1 - targets) * q**gamma * F.logsigmoid(-logits)


SCORES = {  # name -> (loss of the classes' scores, their power gamma or beta, whether the target is the IoU)
    "focal": (soft_focal, 2.0, False),
    "soft_focal": (soft_focal, 2.0, True),
    "quality_focal": (quality_focal, 2.0, True),
    "quality_bce": (quality_focal, 0.0, True),
}


def losses(maps: Tensor, classes: Tensor, boxes: Tensor, score: str, dfl: float = 0.25) -> Tensor:
    """Loss of a batch, a sum over locations divided by the number of those that have an object.

    maps: of a network; classes and boxes: of ``targets``. The scores' loss (a name in SCORES) has weight 1, GIoU 2 and
    the distribution focal loss, a mean over four sides, ``dfl``. Where the target is not the IoU, the quality's logit
    learns it by binary cross-entropy, from locations with an object only; else it learns nothing.
    """
    from torchvision.ops import generalized_box_iou_loss

    logits, quality, sides = outputs(maps)
    there = classes >= 0
    middle, wanted = centres(classes.shape[1]).expand(*classes.shape, 2)[there], boxes[there]
    found = decode(sides[there], middle)
    overlap = iou(found, wanted).detach()
    function, power, soft = SCORES[score]
    target = torch.zeros_like(logits)
    target[(*there.nonzero(as_tuple=True), classes[there])] = overlap if soft else 1.0
    total = function(logits, target, power).sum() + 2 * generalized_box_iou_loss(found, wanted, reduction="sum")
    if dfl:
        distance = torch.cat([middle - wanted[:, :2], wanted[:, 2:] - middle], dim=1) / STRIDE
        values = distance.clamp(0, POSITIONS - 1.1).flatten()
        total = total + dfl / 4 * distribution_focal(sides[there].flatten(0, 1), values).sum()
    if not soft:
        total = total + F.binary_cross_entropy_with_logits(quality[there], overlap, reduction="sum")
    return total / there.sum().clamp(min=1)


def train(canvases, boxes, labels, score: str, seed: int, *, classes: int, epochs: int, batch: int, rate: float,
          width: int, dfl: float = 0.25) -> nn.Sequential:  # fmt: skip
    """A trained network (AdamW, one cycle up to the learning rate ``rate``); all chance is drawn from ``seed``.

    canvases, boxes, labels: of ``scenes``; score and dfl: as for ``losses``; batch: scenes.
    """
    net, draw = network(classes, width, seed), torch.Generator().manual_seed(seed)
    inputs, (kinds, matched) = _inputs(canvases), targets(boxes, labels, canvases.shape[-1])
    optimizer, steps = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01), -(-len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=draw).split(batch):
            optimizer.zero_grad()
            losses(net(inputs[rows]), kinds[rows], matched[rows], score, dfl).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            schedule.step()
    return net.eval()


def _inputs(canvases: np.ndarray) -> Tensor:
    return torch.from_numpy(canvases).float()[:, None] / 255


@torch.no_grad()
def predict(net: nn.Module, canvases: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """By location: the classes' probabilities (N, L, classes), the quality (N, L), in [0, 1], and boxes (N, L, 4)."""
    logits, quality, sides = outputs(torch.cat([net(part) for part in _inputs(canvases).split(128)]))
    return logits.sigmoid(), quality.sigmoid(), decode(sides, centres(sides.shape[1]))


def detect(scores: Tensor, boxes: Tensor, least=0.05, suppress=0.6, most=100) -> list[dict[str, Tensor]]:
    """Detections of each scene: boxes (n, 4), scores (n,) from high to low, at most ``most``, and labels (n,).

    scores (N, L, classes) and boxes (N, L, 4): see ``predict``. Scores from ``least`` on count; of boxes of one class
    whose IoU is above ``suppress`` the one with the highest score stays.
    """
    from torchvision.ops import batched_nms

    found = []
    for of_scene, places in zip(scores, boxes, strict=True):
        where, labels = (of_scene >= least).nonzero(as_tuple=True)
        kept = batched_nms(places[where], of_scene[where, labels], labels, suppress)[:most]
        found.append({"boxes": places[where[kept]], "scores": of_scene[where, labels][kept], "labels": labels[kept]})
    return found


def best_ious(found: list[dict], boxes: list[Tensor], labels: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Of all detections the score, and the IoU with the object of their class that they fit best, 0 without one."""
    from torchvision.ops import box_iou

    fit = [torch.zeros(0)]
    for one, these, kinds in zip(found, boxes, labels, strict=True):
        overlap = box_iou(one["boxes"], these) * (one["labels"][:, None] == kinds)
        fit.append(overlap.amax(dim=1) if len(these) else torch.zeros(len(overlap)))
    return torch.cat([one["scores"] for one in found]).double().numpy(), torch.cat(fit).double().numpy()


def quality_calibration(scores, ious, bins: int = 15) -> dict[str, float]:
    """How far scores are from the IoU: gap, as ECE has it, bias, mean score less mean IoU, and Spearman's rank.

    gap: mean over ``bins`` bins of equal width of |mean score - mean IoU|, weighted by the bins' counts. ValueError for
    fewer than two detections.
    """
    from scipy.stats import spearmanr

    if len(scores) < 2:
        raise ValueError(f"quality_calibration: {len(scores)} detections; 2 or more are needed.")

    _, said, true = bin_sums(scores, ious, equal_width_edges(bins))
    gap, bias = np.abs(said - true).sum() / len(scores), (said - true).sum() / len(scores)
    return {"gap": float(gap), "bias": float(bias), "rank": float(spearmanr(scores, ious).statistic)}


def average_precision(found: list[dict], boxes: list[Tensor], labels: list[Tensor], classes: int) -> np.ndarray:
    """COCO's average precision, (THRESHOLDS, classes), NaN for a class of which there is no object; their mean is AP.

    Precision at 101 recalls from 0 to 1, each the highest at that recall or beyond. By falling score a detection takes
    the object of its class that it fits best of those still free; it is right if their IoU reaches the threshold.
    """
    hits = [_hits(*scene) for scene in zip(found, boxes, labels, strict=True)]
    hits, scores = np.concatenate(hits), torch.cat([one["scores"] for one in found]).numpy()
    kinds, result = torch.cat([one["labels"] for one in found]).numpy(), np.full((len(THRESHOLDS), classes), np.nan)
    for kind, there in enumerate(torch.cat(labels).bincount(minlength=classes).tolist()):
        rows = np.flatnonzero(kinds == kind)
        right = hits[rows[np.argsort(-scores[rows], kind="stable")]].cumsum(axis=0)
        precision = np.maximum.accumulate((right / np.arange(1, len(rows) + 1)[:, None])[::-1])[::-1]
        for number in range(len(THRESHOLDS) if there else 0):
            at = np.searchsorted(right[:, number] / there, np.linspace(0, 1, 101))
            result[number, kind] = np.append(precision[:, number], 0)[at].mean()
    return result


def _hits(one: dict, boxes: Tensor, labels: Tensor) -> np.ndarray:
    """Which detections of a scene are right at each threshold, bool (n, THRESHOLDS)."""
    from torchvision.ops import box_iou

    fit = (box_iou(one["boxes"], boxes) * (one["labels"][:, None] == labels)).numpy()
    free, hits = np.ones((len(THRESHOLDS), len(boxes)), bool), np.zeros((len(fit), len(THRESHOLDS)), bool)
    every = np.arange(len(THRESHOLDS))
    for number in np.argsort(-one["scores"].numpy(), kind="stable") if len(boxes) else ():
        best = np.where(free, fit[number], -1.0)
        taken = best.argmax(axis=1)
        hits[number] = best[every, taken] >= THRESHOLDS
        free[every[hits[number]], taken[hits[number]]] = False
    return hits
