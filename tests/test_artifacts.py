"""Settings, paths and the reading of artifacts: what a user meets before and after training."""

import errno

import numpy as np
import pytest
import torch
import yaml

from compendium import paths, runs, settings
from focalcal import losses, networks, train
from focalcal.train import Training


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A compendium with one finished run of study 'tiny', loss 'focal1', seed 0."""
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    parameters = {
        "active": {"studies": ["tiny"], "published": [], "losses": ["focal1"], "seeds": [0]},
        "shared": {"protocol": {"momentum": 0.8}, "losses": {"focal1": {"gamma": 1.5, "reduction": "mean"}}},
        "studies": {
            "tiny": {
                "data": {"dataset": "digits", "train": 10, "val": 5, "test": 5},
                "training": {"network": "small_resnet", "epochs": 2, "milestones": [2]},
                "exceptions": {"focal1": {"clip": 7.0}},
            }
        },
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(parameters))
    save_run()
    return parameters


def save_run(loss="focal1", seed=0, first_nll=1.0, seconds=1.0):
    """A finished run, made up."""
    rng = np.random.default_rng(0)
    logits = {split: (rng.normal(size=(5, 3)).astype(np.float32), np.arange(5) % 3) for split in ("val", "test")}
    run = train.Run(networks.make("small_resnet", 3, 1, 0), losses.make("brier"), Training(network="small_resnet"))
    run.history = [{"epoch": 1, "test_nll": first_nll}, {"epoch": 2, "test_nll": 0.5}]
    run.gradients = {1: np.ones(10, np.float32)}
    train.save("tiny", loss, seed, run, logits, {"noise1": logits["test"][0].astype(np.float16)}, seconds)


def change(parameters, path, value):
    *parents, last = path.split(".")
    for name in parents:
        parameters = parameters[name]
    parameters[last] = value


def test_a_saved_run_is_read_back(study):
    assert runs.history("tiny")[["loss", "seed", "epoch", "test_nll"]].values.tolist() == [
        ["focal1", 0, 1, 1.0],
        ["focal1", 0, 2, 0.5],
    ]
    assert runs.curves(runs.history("tiny"), "test_nll").loc[2, "focal1"] == 0.5
    assert runs.logits("tiny", "focal1", 0)["test"][0].shape == (5, 3)
    assert runs.gradients("tiny", "focal1", 0)[1].shape == (1, 10)
    assert runs.shifted("tiny", "focal1", 0)["noise1"].shape == (5, 3)
    assert runs.active("tiny") == runs.active("tiny", ["focal1"]) == (["focal1"], [0])
    assert (paths.root() / "artifacts/tiny/provenance/focal1-0.json").is_file()


def test_later_blocks_of_params_win(study):
    training, special = settings.training("tiny", "focal1")
    assert (training.momentum, training.reduction, training.clip) == (0.8, "mean", 7) and special == {"gamma": 1.5}
    study["studies"]["tiny"]["exceptions"]["focal1"] = {"gamma": 2, "momentum": 0.7}
    (paths.root() / "params.yaml").write_text(yaml.safe_dump(study))
    training, special = settings.training("tiny", "focal1")
    assert (training.momentum, training.clip) == (0.7, 2) and special == {"gamma": 2}


def test_the_same_results_again_keep_their_provenance(study):
    record = paths.root() / "artifacts/tiny/provenance/focal1-0.json"
    record.write_text("as it was")
    save_run(seconds=9.0)
    assert record.read_text() == "as it was"
    save_run(first_nll=3.0, seconds=9.0)
    assert '"wall_seconds": 9.0' in record.read_text()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("shared.protocol.learning_rat", 0.1, "shared.protocol has no setting 'learning_rat'; it has: network"),
        ("studies.tiny.training.learning_rate", -0.1, "learning_rate: input should be greater than 0, got -0.1"),
        ("studies.tiny.training.learning_rate", float("nan"), "learning_rate: input should be a finite number"),
        ("studies.tiny.training.epochs", 2.5, "epochs: input should be a valid integer, got 2.5"),
        ("studies.tiny.training.epochs", 0, "epochs: input should be greater than 0, got 0"),
        ("studies.tiny.training.augment", "yes please", "augment: input should be a valid boolean"),
        ("studies.tiny.training.milestones", [2, 5], r"milestones: input should be epochs up to 2, got \[2, 5\]"),
        ("studies.tiny.training.milestones", ["two"], "milestones: input should be a valid integer, got 'two'"),
        ("shared.losses.focal1.reduction", "total", "losses.focal1.reduction: input should be 'sum' or 'mean'"),
        (
            "studies.tiny.training",
            {"epochs": 3},
            "'network' is missing in params.yaml; looked in shared.protocol and studies.tiny.training",
        ),
        ("studies.tiny.training", [3], "studies.tiny.training: input should be a valid dictionary"),
        ("studies.tiny.exceptions", {"focal1": None}, "studies.tiny.exceptions: input should be a valid dictionary"),
        ("studies.tiny", {"data": {}}, "'training' is missing in params.yaml; looked in studies.tiny"),
        (
            "shared.losses.focal1",
            3,
            "shared.losses.focal1 in params.yaml must consist of 'name: value' settings, got 3",
        ),
        ("shared.losses", {}, "Unknown loss 'focal1'; params.yaml lists"),
    ],
)
def test_bad_settings_are_named(study, path, value, words):
    change(study, path, value)
    (paths.root() / "params.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=words):
        settings.training("tiny", "focal1")


def test_a_study_sees_its_data_sets_common_settings_under_its_own(study):
    study["shared"]["datasets"] = {"digits": {"val": 7, "mean": [0.3]}}
    (paths.root() / "params.yaml").write_text(yaml.safe_dump(study))
    assert settings.data("tiny").val == 5 and settings.data("tiny").mean == [0.3]
    study["shared"]["datasets"]["digits"]["vall"] = 7
    (paths.root() / "params.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match="shared.datasets.digits has no setting 'vall'"):
        settings.data("tiny")


def test_unknown_names_are_named(study):
    with pytest.raises(ValueError, match="Unknown study 'huge'; params.yaml defines: tiny"):
        settings.data("huge")
    with pytest.raises(ValueError, match="Study 'tiny' has no active or published run of 'brier'; it has: focal1."):
        runs.history("tiny", ["brier"])
    with pytest.raises(ValueError, match=r"Study 'tiny' has no active or published run with seeds \[7\]."):
        runs.history("tiny", seeds=[7])
    study["active"]["losses"].append("brier")
    (paths.root() / "params.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(FileNotFoundError, match="brier/0/history.csv is missing; `dvc repro` makes it"):
        runs.history("tiny")


def test_outside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run this inside the focalcal folder"):
        paths.root()


def test_a_truncated_logits_file_is_named(study):
    path = paths.run("tiny", "focal1", 0) / "logits.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="logits.npz is truncated or damaged"):
        runs.logits("tiny", "focal1", 0)


def test_logits_that_do_not_fit_are_named(study):
    path = paths.run("tiny", "focal1", 0) / "logits.npz"
    np.savez(path, val_logits=np.zeros((2, 3)), val_labels=np.array([0, 7]))
    with pytest.raises(ValueError, match=r"logits.npz: labels must lie in 0\.\.2"):
        runs.logits("tiny", "focal1", 0)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    target = tmp_path / "results.csv"
    target.write_text("old")
    with pytest.raises(OSError, match="Disk full while writing .*results.csv"), paths.atomic(target) as part:
        part.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_weights_are_readable_without_running_code(study):
    from safetensors.torch import load_file

    weights = load_file(paths.root() / "artifacts/tiny/models/focal1-0.safetensors")
    model = networks.make("small_resnet", 3, 1, 1)
    model.load_state_dict(weights)
    assert torch.equal(networks.head(model).weight, networks.head(networks.make("small_resnet", 3, 1, 0)).weight)
