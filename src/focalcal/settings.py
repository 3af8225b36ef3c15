"""The parameters of params.yaml: read, typed and checked before anything runs."""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Literal, get_args, get_origin

import yaml

from focalcal import paths


@dataclass(frozen=True)
class Data:
    """Which images a study sees."""

    dataset: str  # a name in data.DATASETS
    train: int  # samples to train on
    val: int  # samples held out of the published training set; temperatures and AdaFocal's gammas come from them
    test: int  # samples of the published test set; all of them for every number that is quoted
    seed: int = 1  # of the draw of train and val; the papers use 1


@dataclass(frozen=True)
class Training:
    """How a study trains. Defaults: Mukhoti et al. 2020, their published code."""

    network: str  # a name in networks.NETWORKS
    epochs: int = 350
    milestones: tuple = (150, 250)  # epochs, counted from 1, from which on the learning rate is 10 x lower
    batch_size: int = 128  # samples
    learning_rate: float = 0.1  # of SGD
    momentum: float = 0.9  # no Nesterov
    weight_decay: float = 5e-4
    reduction: Literal["sum", "mean"] = "sum"  # of the batch loss
    clip: float = 2.0  # largest gradient norm (L2, all parameters)
    augment: bool = True  # random crop after 4 pixels of zero padding, and horizontal flip

    def __post_init__(self):
        if not all(isinstance(m, int) and 1 < m <= self.epochs for m in self.milestones):
            raise ValueError(f"milestones must be epochs in 2..{self.epochs}, got {list(self.milestones)}.")

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.learning_rate * 0.1 ** sum(epoch >= m for m in self.milestones)


def _build(kind, values: dict, where: dict | str):
    """A ``kind`` from ``values``; where: the place in params.yaml of every value, or of all of them."""
    known = {f.name: f for f in fields(kind)}
    places = where if isinstance(where, dict) else dict.fromkeys(values, where)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{places[name]} has no setting '{name}'; it has: {', '.join(known)}.")
        wanted, place = known[name].type, f"{places[name]}.{name}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if get_origin(wanted) is Literal:
            fits, wanted = value in get_args(wanted), " or ".join(get_args(wanted))
        elif wanted is tuple:
            fits, wanted = isinstance(value, list | tuple), "a list"
        elif wanted is float:
            fits, wanted = number and math.isfinite(value), "a finite number"
        else:
            fits, wanted = (
                type(value) is wanted,
                {"int": "a whole number", "bool": "true or false"}.get(wanted.__name__, "a name"),
            )
        if not fits:
            raise ValueError(f"{place} must be {wanted}, got {value!r}.")
        positive = name not in ("momentum", "weight_decay", "seed")
        if number and (value < 0 or positive and value == 0):
            raise ValueError(f"{place} must be {'above 0' if positive else '0 or larger'}, got {value}.")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if missing:
        raise ValueError(f"The {kind.__name__.lower()} settings in params.yaml lack: {', '.join(missing)}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def params() -> dict:
    """params.yaml as a dictionary."""
    return yaml.safe_load((paths.root() / "params.yaml").read_text())


def _study(name: str) -> dict:
    studies = params()["studies"]
    if name not in studies:
        raise ValueError(f"Unknown study '{name}'; params.yaml defines: {', '.join(studies)}.")
    return studies[name]


def data(study: str) -> Data:
    """Data settings of a study. Raises ValueError, in one sentence, for anything unknown, missing or misfit."""
    return _build(Data, _study(study)["data"], f"studies.{study}.data")


def training(study: str, loss: str) -> tuple[Training, dict]:
    """Training settings of a study for one loss, and that loss's own settings.

    Later blocks win: shared.protocol, the study's training, shared.losses.<loss>, the study's exceptions for the
    loss. In the last two, names that are no training setting belong to the loss function.
    """
    entry, shared = _study(study), params()["shared"]
    if loss not in shared["losses"]:
        raise ValueError(
            f"Unknown loss '{loss}'; params.yaml lists under shared.losses: {', '.join(shared['losses'])}."
        )
    blocks = {
        "shared.protocol": shared["protocol"],
        f"studies.{study}.training": entry["training"],
        f"shared.losses.{loss}": shared["losses"][loss] or {},
        f"studies.{study}.exceptions.{loss}": (entry.get("exceptions") or {}).get(loss) or {},
    }
    names, merged, where, special = {f.name for f in fields(Training)}, {}, {}, {}
    for number, (place, block) in enumerate(blocks.items()):
        for name, value in block.items():
            if name in names or number < 2:
                merged[name], where[name] = value, place
            else:
                special[name] = value
    return _build(Training, merged, where), special
