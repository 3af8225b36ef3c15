"""params.yaml, read and checked before anything runs."""

import pytest
from helpers import parameters, write_parameters

from compendium import settings
from focalcal import train


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes params.yaml with the values at some dotted paths changed; a value None is kept as such."""
    monkeypatch.chdir(tmp_path)

    def write(changes=None):
        values = parameters()
        for path, value in (changes or {}).items():
            block, *parents, last = values, *path.split(".")
            for name in parents:
                block = block[name]
            block[last] = value
        write_parameters(tmp_path, values)

    write()
    return write


def test_later_blocks_of_params_win(write):
    training, special = settings.training("tiny", "focal1")
    assert isinstance(training, train.Training)
    assert (training.momentum, training.reduction, training.clip) == (0.8, "mean", 7)
    assert special == {"function": "focal", "gamma": 1.5}
    write({"studies.tiny.exceptions.focal1": {"gamma": 2, "momentum": 0.7}})
    training, special = settings.training("tiny", "focal1")
    assert (training.momentum, training.clip, training.epochs) == (0.7, 2, 3)
    assert special == {"function": "focal", "gamma": 2}
    training, special = settings.training("tiny", "adafocal")
    assert (training.momentum, training.reduction) == (0.8, "sum") and special == {}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("shared.protocol.learning_rat", 0.1, "shared.protocol has no setting 'learning_rat'; it has: network, epochs"),
        ("studies.tiny.training.learning_rat", 1, "studies.tiny.training has no setting 'learning_rat'; it has: "),
        ("studies.tiny.training.learning_rate", -0.1, "training.learning_rate must be finite and above 0, got -0.1"),
        ("studies.tiny.training.learning_rate", float("nan"), "training.learning_rate must be finite and above 0, got"),
        ("studies.tiny.training.epochs", 2.5, "studies.tiny.training.epochs: input should be a valid integer, got 2.5"),
        ("studies.tiny.training.epochs", 0, "studies.tiny.training.epochs must be 1 or more, got 0"),
        ("studies.tiny.training.threads", True, "studies.tiny.training.threads: input should be a valid integer"),
        ("studies.tiny.training.augment", "yes please", "augment: input should be a valid boolean, got 'yes please'"),
        ("studies.tiny.training.milestones", [2, 5], r"training.milestones must be epochs from 1 to 3, got \[2, 5\]"),
        ("studies.tiny.training.milestones", ["two"], "milestones: input should be a valid integer, got 'two'"),
        (
            "shared.losses.focal1.reduction",
            "total",
            "losses.focal1.reduction: input should be 'sum', 'mean' or 'per_document', got",
        ),
        ("studies.tiny.exceptions.focal1", {"clip": 0}, "tiny.exceptions.focal1.clip must be finite and above 0"),
        (
            "studies.tiny.training",
            {"epochs": 3, "milestones": []},
            "'network' is missing in params.yaml; looked in shared.protocol and .*studies.tiny.training",
        ),
        ("shared.protocol.momentum", None, "shared.protocol.momentum: input should be a valid number, got None"),
        ("studies.tiny.training", [3], "studies.tiny.training: input should be a valid dictionary"),
        ("studies.tiny.data", {True: 3}, "studies.tiny.data: input should be a valid string, got True"),
        ("studies.tiny.exceptions", {"focal1": None}, "studies.tiny.exceptions: input should be a valid dictionary"),
        ("studies.tiny.training_", {}, "studies.tiny has no setting 'training_'; it has: data, training, exceptions"),
        ("studies.tiny", {"data": {}}, "'training' is missing in params.yaml; looked in studies.tiny"),
        ("studies.tiny.exceptions", {"focul1": {"clip": 1}}, "tiny.exceptions.focul1: no loss under shared.losses has"),
        ("shared.protocol", {True: 3}, "shared.protocol in params.yaml has True for a name; put it in quotation marks"),
        ("studies.tiny", 3, "studies.tiny in params.yaml must consist of 'name: value' settings, got 3"),
        ("shared.losses.focal1", 3, "shared.losses.focal1 in params.yaml must consist of 'name: value' settings"),
        ("shared.losses", {}, "Unknown loss 'focal1'; params.yaml lists under shared.losses: "),
        ("studies", {"other": {}}, "Unknown study 'tiny'; params.yaml defines: other"),
    ],
)
def test_bad_settings_are_named(write, path, value, words):
    write({path: value})
    with pytest.raises(ValueError, match=words) as problem:
        settings.training("tiny", "focal1")
    assert "\n" not in str(problem.value)


def test_what_is_active_is_checked(write):
    for given, words in (
        ({"seed": [3]}, "active in params.yaml has no 'seed'; it has: analysed, comparisons, "),
        ({"seeds": 0}, "active.seeds in params.yaml must be a list, got 0"),
        ({"losses": [["focal1"]]}, r"active.losses in params.yaml must be a list of single names or numbers, got \[\["),
    ):
        write({"active": given})
        with pytest.raises(ValueError, match=words):
            settings.active()
    write({"studies.tiny.data.dataset": ["digits"]})
    with pytest.raises(
        ValueError, match=r"studies.tiny.data.dataset in params.yaml must be one name, got \['digits'\]"
    ):
        settings.data("tiny")


def test_params_that_are_no_blocks(write, tmp_path):
    (tmp_path / "params.yaml").write_text("- active\n")
    with pytest.raises(ValueError, match="All in params.yaml must consist of 'name: value' settings, got"):
        settings.params()


def test_a_block_may_be_empty(write):
    write({"shared.losses.adafocal": None})
    assert settings.training("tiny", "adafocal")[1] == {}


def test_a_study_sees_its_data_sets_common_settings_under_its_own(write):
    write({"shared.datasets": {"digits": {"val": 7, "mean": [0.3]}}})
    found = settings.data("tiny")
    assert (found.val, found.mean, found.seed, found.shifted) == (60, [0.3], 1, [])
    write({"shared.datasets": {"digits": {"vall": 7}}})
    with pytest.raises(ValueError, match="shared.datasets.digits has no setting 'vall'"):
        settings.data("tiny")
    write({"studies.tiny.data.test": 0})
    with pytest.raises(ValueError, match="studies.tiny.data.test: input should be greater than 0, got 0"):
        settings.data("tiny")
    with pytest.raises(ValueError, match="Unknown study 'huge'; params.yaml defines: tiny"):
        settings.data("huge")


def test_a_study_is_either_trained_or_published(write):
    assert settings.active()["losses"] == ["focal1"]
    write({"active.published": ["other", "tiny"]})
    with pytest.raises(
        ValueError, match="^'tiny' stands under active.studies and active.published in params.yaml"
    ) as p:
        settings.active()
    assert "\n" not in str(p.value) and str(p.value).endswith("delete it from one of the two.")
