"""The parameters of params.yaml: read, typed and checked before anything runs.

Raises ValueError, in one sentence, for anything unknown, missing or misfit.
"""

import dataclasses
import re
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass as checked

from compendium import paths

LISTS, MAPPINGS = (
    ("studies", "published", "analysed", "detectors", "losses", "seeds"),
    ("sweeps", "repeats", "comparisons"),
)
ACTIVE = {*LISTS, *MAPPINGS, "headline"}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(_Settings):
    """Which images or texts a study sees."""

    dataset: str  # a name in images.DATASETS or texts.DATASETS
    train: PositiveInt  # samples to train on
    val: PositiveInt  # samples held out of the published training set, for temperatures and AdaFocal's gammas
    test: PositiveInt  # samples of the published test set; all of them for every number that is quoted
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # of the draw of train and val; the papers use 1
    mean: list[Positive] | None = None  # per channel, of pixel values in [0, 1]; by default measured on train
    std: list[Positive] | None = None
    test_mean: list[Positive] | None = None  # for the test set alone, by default the same
    test_std: list[Positive] | None = None
    per_class: bool = False  # draw val evenly from the classes
    shifted: list[str] = []  # data sets from elsewhere that the networks are tried on, names in images.DATASETS
    vectors: str | None = None  # of a text's words, a name in texts.VECTORS (or any, if its function brings its own)
    masked: list[Annotated[int, Field(ge=0)]] = []  # classes that are never predicted, see focalcal.metrics


class Study(_Settings):
    """A block under studies in params.yaml."""

    data: dict[str, Any]  # settings of Data
    training: dict[str, Any]  # settings of Training that hold for every loss
    exceptions: dict[str, dict[str, Any]] = {}  # for single losses: settings of Training or of the loss


def build(kind, values: dict, where: dict):
    """A ``kind`` (pydantic's model or dataclass) from ``values``; where: each value's block in params.yaml."""
    try:
        return kind(**values)
    except ValidationError as problems:
        first = problems.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # the class says which setting, and what is wrong with it
            raise ValueError(f"{where[reason.split()[0]]}.{reason}") from None
        name, place = str(first["loc"][0]), where.get(str(first["loc"][0]))
        if first["type"] == "missing":
            blocks = " and ".join(dict.fromkeys(where.values())) or f"the {kind.__name__.lower()} settings"
            raise ValueError(f"'{name}' is missing in params.yaml; looked in {blocks}.") from None
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ValueError(f"{place} has no setting '{name}'; it has: {', '.join(names(kind))}.") from None
        reason, got = reason[0].lower() + reason[1:], repr(first["input"])
        if first["type"] == "float_type" and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", str(first["input"])):
            got += ", which to YAML is text: write it with a point, and a sign behind the e, as 1.0e-4"
        raise ValueError(f"{place}.{name}: {reason}, got {got}.") from None


def names(kind) -> list[str]:
    """The settings of a pydantic model or dataclass."""
    return list(kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in dataclasses.fields(kind)])


def params() -> dict:
    """params.yaml as a dictionary."""
    try:
        values = yaml.load(
            (paths.root() / "params.yaml").read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except yaml.YAMLError as problem:
        raise ValueError(f"params.yaml is not YAML: {' '.join(str(problem).split())}.") from None
    return block({"params.yaml": values}, "params.yaml", "All")


def block(parent: dict, name: str, place: str) -> dict:
    """parent[name], if that is a mapping; nothing at all counts as an empty one."""
    found = {} if parent.get(name) is None else parent[name]
    if not isinstance(found, dict):
        raise ValueError(f"{place} in params.yaml must consist of 'name: value' settings, got {found!r}.")
    if bad := [key for key in found if not isinstance(key, str)]:
        raise ValueError(f"{place} in params.yaml has {bad[0]!r} for a name; put it in quotation marks.")
    return found


def active() -> dict:
    """The block ``active`` of params.yaml: its lists and mappings, of which a missing one is empty, and headline, a
    name or None."""
    given = block(params(), "active", "active")
    if unknown := set(given) - ACTIVE:
        raise ValueError(f"active in params.yaml has no '{min(unknown)}'; it has: {', '.join(sorted(ACTIVE))}.")
    chosen = {name: [] if given.get(name) is None else given[name] for name in LISTS}
    for name, values in chosen.items():
        if not isinstance(values, list):
            raise ValueError(f"active.{name} in params.yaml must be a list, got {values!r}.")
        if any(isinstance(value, list | dict) for value in values):
            raise ValueError(f"active.{name} in params.yaml must be a list of single names or numbers, got {values!r}.")
    if both := set(chosen["studies"]) & set(chosen["published"]):
        raise ValueError(
            f"'{min(both)}' stands under active.studies and active.published in params.yaml: its runs are either "
            "trained here or taken from published/; delete it from one of the two."
        )
    chosen |= {name: block(given, name, f"active.{name}") for name in MAPPINGS}
    return chosen | {"headline": given.get("headline")}


def study(name: str) -> Study:
    """The block of a study in params.yaml."""
    return _study(params(), name)


def _study(values: dict, name: str) -> Study:
    studies = block(values, "studies", "studies")
    if name not in studies:
        raise ValueError(f"Unknown study '{name}'; params.yaml defines: {', '.join(studies) or 'none'}.")
    own = block(studies, name, f"studies.{name}")
    return build(Study, own, dict.fromkeys(own, f"studies.{name}"))


def data(name: str) -> Data:
    """Data settings of a study: its own over shared.datasets.<dataset>."""
    values = params()
    own = _study(values, name).data
    if not isinstance(own.get("dataset", ""), str):
        raise ValueError(f"studies.{name}.data.dataset in params.yaml must be one name, got {own['dataset']!r}.")
    datasets = block(block(values, "shared", "shared"), "datasets", "shared.datasets")
    place = f"shared.datasets.{own.get('dataset')}"
    common = block(datasets, own.get("dataset"), place)
    return build(Data, common | own, dict.fromkeys(common, place) | dict.fromkeys(own, f"studies.{name}.data"))


def training(name: str, loss: str):
    """Training settings (focalcal.train.Training) of a study for one loss, and that loss's own settings.

    Later blocks win: shared.protocol, the study's training, shared.losses.<loss>, the study's exceptions for the
    loss. In the last two, names that are no training setting belong to the loss function.
    """
    from focalcal.train import Training  # here, since torch takes seconds to import and most chapters do without

    kind = checked(Training, frozen=True, config=ConfigDict(extra="forbid", strict=True))
    values = params()
    entry, shared = _study(values, name), block(values, "shared", "shared")
    known_losses = block(shared, "losses", "shared.losses")
    if loss not in known_losses:
        raise ValueError(f"Unknown loss '{loss}'; params.yaml lists under shared.losses: {', '.join(known_losses)}.")
    if unknown := set(entry.exceptions) - set(known_losses):
        raise ValueError(f"studies.{name}.exceptions.{min(unknown)}: no loss under shared.losses has this name.")
    blocks = {
        "shared.protocol": block(shared, "protocol", "shared.protocol"),
        f"studies.{name}.training": entry.training,
        f"shared.losses.{loss}": block(known_losses, loss, f"shared.losses.{loss}"),
        f"studies.{name}.exceptions.{loss}": entry.exceptions.get(loss, {}),
    }
    known, merged, where, special = names(kind), {}, {}, {}
    for number, (place, values) in enumerate(blocks.items()):
        for key, value in values.items():
            if key in known or number < 2:
                merged[key], where[key] = value, place
            else:
                special[key] = value
    return build(kind, merged, where), special
