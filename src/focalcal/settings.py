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
    mean: list[Positive] | None = None  # per channel, of pixel values in [0, 1]; by default measured on train
    std: list[Positive] | None = None
    test_mean: list[Positive] | None = None  # for the test set alone, by default the same
    test_std: list[Positive] | None = None
    per_class: bool = False  # draw val evenly from the classes
    shifted: list[str] = []  # data sets from elsewhere that the networks are tried on, names in data.DATASETS


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
    # Ours, not the papers':
    mode: Literal["auto", "exact", "fast"] = "auto"  # see train.py; auto: exact on a CPU, fast on a GPU
    compiled: bool = False  # by torch.compile, in fast mode
    evaluate_train_every: PositiveInt = 1  # epochs between evaluations of the training set (and at the last)

    @field_validator("milestones")
    @classmethod
    def _within_training(cls, milestones, info: ValidationInfo):
        if any(milestone > info.data.get("epochs", milestone) for milestone in milestones):
            raise ValueError(f"input should be epochs up to {info.data['epochs']}")
        return milestones

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.learning_rate * 0.1 ** sum(epoch >= m for m in self.milestones)


class Study(_Settings):
    """A block under studies in params.yaml."""

    data: dict  # settings of Data
    training: dict  # settings of Training that hold for every loss
    exceptions: dict[str, dict] = {}  # for single losses: settings of Training or of the loss
    papers: dict[str, str] = {"dataset": "cifar10", "network": "resnet50"}  # what to show beside it (published.csv)


def _build(kind, values: dict, where: dict):
    """A ``kind`` from ``values``, or ValueError in one sentence; where: each value's block in params.yaml."""
    try:
        return kind(**values)
    except ValidationError as problems:
        first = problems.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            blocks = " and ".join(dict.fromkeys(where.values())) or f"the {kind.__name__.lower()} settings"
            raise ValueError(f"'{name}' is missing in params.yaml; looked in {blocks}.") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ValueError(f"{where[name]} has no setting '{name}'; it has: {known}.") from None
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[0].lower() + reason[1:]
        raise ValueError(f"{where[name]}.{name}: {reason}, got {first['input']!r}.") from None


def params() -> dict:
    """params.yaml as a dictionary."""
    return yaml.safe_load((paths.root() / "params.yaml").read_text())


def _block(parent: dict, name: str, place: str) -> dict:
    """parent[name], if that is a mapping; nothing at all counts as an empty one."""
    block = {} if parent.get(name) is None else parent[name]
    if not isinstance(block, dict):
        raise ValueError(f"{place} in params.yaml must consist of 'name: value' settings, got {block!r}.")
    return block


def study(name: str) -> Study:
    """The block of a study in params.yaml."""
    studies = params()["studies"]
    if name not in studies:
        raise ValueError(f"Unknown study '{name}'; params.yaml defines: {', '.join(studies)}.")
    values = _block(studies, name, f"studies.{name}")
    return _build(Study, values, dict.fromkeys(values, f"studies.{name}"))


def data(name: str) -> Data:
    """Data settings of a study: its own over shared.datasets.<dataset>.

    Raises ValueError, in one sentence, for anything unknown, missing or misfit; so does ``training``.
    """
    own, shared, place = study(name).data, params()["shared"].get("datasets", {}), "shared.datasets"
    common = _block(shared, own.get("dataset"), f"{place}.{own.get('dataset')}")
    where = dict.fromkeys(common, f"{place}.{own.get('dataset')}") | dict.fromkeys(own, f"studies.{name}.data")
    return _build(Data, common | own, where)


def training(name: str, loss: str) -> tuple[Training, dict]:
    """Training settings of a study for one loss, and that loss's own settings.

    Later blocks win: shared.protocol, the study's training, shared.losses.<loss>, the study's exceptions for the
    loss. In the last two, names that are no training setting belong to the loss function.
    """
    entry, shared = study(name), params()["shared"]
    if loss not in shared["losses"]:
        raise ValueError(
            f"Unknown loss '{loss}'; params.yaml lists under shared.losses: {', '.join(shared['losses'])}."
        )
    blocks = {
        "shared.protocol": _block(shared, "protocol", "shared.protocol"),
        f"studies.{name}.training": entry.training,
        f"shared.losses.{loss}": _block(shared["losses"], loss, f"shared.losses.{loss}"),
        f"studies.{name}.exceptions.{loss}": entry.exceptions.get(loss, {}),
    }
    names, merged, where, special = Training.model_fields, {}, {}, {}
    for number, (place, block) in enumerate(blocks.items()):
        for key, value in block.items():
            if key in names or number < 2:
                merged[key], where[key] = value, place
            else:
                special[key] = value
    return _build(Training, merged, where), special
