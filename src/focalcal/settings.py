"""The parameters of params.yaml: read, typed and checked before anything runs."""

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from focalcal import paths

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(_Settings):
    """Which images a study sees."""

    dataset: str  # a name in data.DATASETS
    train: PositiveInt  # samples to train on
    val: PositiveInt  # samples held out of the published training set, for temperatures and AdaFocal's gammas
    test: PositiveInt  # samples of the published test set; all of them for every number that is quoted
    seed: Annotated[int, Field(ge=0)] = 1  # of the draw of train and val; the papers use 1


class Training(_Settings):
    """How a study trains. Defaults: Mukhoti et al. 2020, their published code."""

    network: str  # a name in networks.NETWORKS
    epochs: PositiveInt = 350
    milestones: list[PositiveInt] = [150, 250]  # epochs, counted from 1, from which on the learning rate is 10 x lower
    batch_size: PositiveInt = 128  # samples
    learning_rate: Positive = 0.1  # of SGD
    momentum: NotNegative = 0.9  # no Nesterov
    weight_decay: NotNegative = 5e-4
    reduction: Literal["sum", "mean"] = "sum"  # of the batch loss
    clip: Positive = 2.0  # largest gradient norm (L2, all parameters)
    augment: bool = True  # random crop after 4 pixels of zero padding, and horizontal flip

    @field_validator("milestones")
    @classmethod
    def _within_training(cls, milestones, info: ValidationInfo):
        if any(milestone > info.data.get("epochs", milestone) for milestone in milestones):
            raise ValueError(f"input should be epochs up to {info.data['epochs']}")
        return milestones

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.learning_rate * 0.1 ** sum(epoch >= m for m in self.milestones)


def _build(kind, values: dict, where: dict):
    """A ``kind`` from ``values``, or ValueError in one sentence; where: each value's block in params.yaml."""
    try:
        return kind(**values)
    except ValidationError as problems:
        first = problems.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise ValueError(f"The {kind.__name__.lower()} settings in params.yaml lack '{name}'.") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ValueError(f"{where[name]} has no setting '{name}'; it has: {known}.") from None
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[0].lower() + reason[1:]
        raise ValueError(f"{where[name]}.{name}: {reason}, got {first['input']!r}.") from None


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
    values = _study(study)["data"]
    return _build(Data, values, dict.fromkeys(values, f"studies.{study}.data"))


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
    names, merged, where, special = Training.model_fields, {}, {}, {}
    for number, (place, block) in enumerate(blocks.items()):
        for name, value in block.items():
            if name in names or number < 2:
                merged[name], where[name] = value, place
            else:
                special[name] = value
    return _build(Training, merged, where), special
