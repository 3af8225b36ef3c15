"""From params.yaml to the files of a run."""

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import parameters, squares, write_parameters
from safetensors.torch import load_file
from torch import nn

from compendium import checkpoints, paths, runs, trainings
from focalcal import feed, losses, networks, train

CPU = torch.device("cpu")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The prepared images of the study 'tiny', in whose folder this then works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOCALCAL_DEVICE", "cpu")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    values = parameters()
    values["studies"]["tiny"]["training"]["threads"] = 1
    write_parameters(tmp_path, values)
    arrays = squares() | {"shifted_far": np.full((4, 8, 8, 1), 255, np.uint8)}
    paths.write_npz(paths.prepared("tiny"), **arrays)
    return arrays


def complete(*losses):
    """Train to the end, as chapter 2 does; the runs."""
    prepared = paths.read_npz(paths.prepared("tiny"))
    jobs = [trainings.job("tiny", loss, 0) for loss in losses]
    begun = [trainings.new_run(job, prepared, CPU) for job in jobs]
    trainings.complete(jobs, begun, feed.splits(prepared, CPU), prepared)
    return begun


def files(loss):
    """What a training leaves, but for its provenance."""
    folder, weights = paths.run("tiny", loss, 0), paths.study("tiny") / f"models/{loss}-0.safetensors"
    return {path.name: path.read_bytes() for path in (*folder.iterdir(), weights)}


def test_trainings_leave_runs_that_are_read_back(prepared, capsys):
    trainings.train_jobs("tiny", ["focal1", "adafocal"], 0)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"Finished: {paths.run('tiny', loss, 0)}" for loss in ("focal1", "adafocal")]
    assert "tiny focal1 adafocal 0" in printed.err and "3/3" in printed.err
    assert sorted(files("adafocal")) == [
        *("adafocal-0.safetensors", "gradients.npz", "history.csv", "logits.npz", "shifted.npz")
    ]
    assert not list(paths.scratch().glob("tiny/*/*"))  # the checkpoints are gone

    (run,) = complete("focal1")
    assert paths.read_npz(paths.run("tiny", "focal1", 0) / "logits.npz")["epoch"] == 3
    for split, (logits, labels, _) in runs.logits("tiny", "focal1", 0).items():
        assert np.array_equal(logits, run.predictions[split][0].astype(np.float64))
        assert np.array_equal(labels, prepared[f"{split}_labels"])
    epochs, norms = runs.gradients("tiny", "focal1", 0)
    assert epochs == train.gradient_epochs(3) and norms.shape == (len(epochs), 150)
    weights = load_file(paths.study("tiny") / "models/focal1-0.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.model.state_dict().items())

    history = pd.read_csv(paths.run("tiny", "adafocal", 0) / "history.csv")
    assert history.epoch.tolist() == [1, 2, 3]
    assert {"train_confidence", "val_refinement", "val_temperature", "test_ece_scaled"} <= set(history)
    assert history.filter(regex="^samples_bin").sum(axis=1).tolist() == [150] * 3
    rows = pd.read_csv(paths.run("tiny", "focal1", 0) / "history.csv")
    for row, trained in zip(rows.to_dict("records"), run.history, strict=True):
        assert row == pytest.approx(trained, rel=1e-8, nan_ok=True)


def test_provenance_says_where_and_with_what(prepared, monkeypatch):
    monkeypatch.setattr(trainings, "cpu_model", lambda: "a CPU of 1999")
    complete("focal1")
    record = json.loads((paths.study("tiny") / "provenance/focal1-0.json").read_text())
    job = trainings.job("tiny", "focal1", 0)
    assert record["settings"] == dataclasses.asdict(job.settings) and record["settings"]["clip"] == 7
    assert record["loss_settings"] == {"function": "focal", "gamma": 1.5}
    assert record["device"].startswith("cpu") and record["cpu"] == "a CPU of 1999" and record["threads"] == 1
    assert record["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (record["torch"], record["numpy"]) == (torch.__version__, np.__version__)
    assert record["commit"] is None and record["wall_seconds"] > 0 and record["peak_memory_mb"] > 10
    assert record["resumed_after_epoch"] == 0


def test_provenance_says_whether_the_code_is_that_of_the_commit(prepared, monkeypatch):
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "params.yaml"], [*who, "commit", "-qm", "First"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert trainings.provenance(CPU)["commit"] == commit
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "# changed")
    assert trainings.provenance(CPU)["commit"] == f"{commit}, with changes"
    monkeypatch.setenv("PATH", "")
    assert trainings.provenance(CPU)["commit"] is None  # there is no git


def test_data_of_other_settings_are_refused(prepared):
    values = parameters()
    values["studies"]["tiny"]["data"]["val"] = 50
    write_parameters(Path("."), values)
    words = "has 60 val samples, params.yaml asks for 50; `python -m compendium data --prepare tiny` makes it anew"
    with pytest.raises(ValueError, match=words):
        trainings.train_jobs("tiny", ["focal1"], 0)
    values["studies"]["tiny"]["data"] |= {"val": 60, "test_mean": [0.5], "test_std": [0.5]}
    write_parameters(Path("."), values)
    with pytest.raises(ValueError, match="has another test_mean than params.yaml; `python -m compendium data --prep"):
        trainings.train_jobs("tiny", ["focal1"], 0)


def test_a_rate_for_word_vectors_needs_some(prepared):
    job = trainings.job("tiny", "focal1", 0)
    job = job._replace(settings=dataclasses.replace(job.settings, embedding_learning_rate=0.1))
    with pytest.raises(ValueError, match="is 0.1, but network 'small_resnet' trains no word vectors"):
        trainings.new_run(job, prepared, CPU)


class Learned(nn.Module):
    """A focal loss whose gamma would have to be trained."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(2.0))

    def forward(self, logits, labels):
        return losses.focal(logits, labels, self.gamma)


def with_own_milestones(logits, labels, milestones=(1, 2)):
    return losses.cross_entropy(logits, labels)


def averaged(logits, labels):
    return losses.cross_entropy(logits, labels).mean()


@pytest.mark.parametrize(
    "loss, words",
    [
        (Learned, "Loss 'adafocal' has parameters, and nothing here trains them; make them buffers"),
        (with_own_milestones, "Loss 'adafocal': training has a setting 'milestones', too"),
        (averaged, r"Loss 'adafocal' must give one number per sample, \(2,\) for two; it gives \(\)"),
    ],
)
def test_a_loss_that_would_be_trained_wrongly_is_refused(prepared, monkeypatch, loss, words):
    monkeypatch.setitem(losses.LOSSES, "adafocal", loss)
    with pytest.raises(ValueError, match=words):
        trainings.new_run(trainings.job("tiny", "adafocal", 0), prepared, CPU)


def test_a_word_without_a_vector_is_named(prepared):
    arrays = {"embedding": np.zeros((3, 5), np.float32), "test_tokens": np.array([[0, 3]])}
    with pytest.raises(ValueError, match="A word of study 'tiny' has number 3, but there are 3 word vectors"):
        trainings.new_run(trainings.job("tiny", "focal1", 0), arrays, CPU)


def test_the_cpus_name(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Fast: 3 GHz\nprocessor\t: 1\nmodel name\t: Fast: 3 GHz\n"
    monkeypatch.setattr(trainings.Path, "read_text", lambda _: text)
    assert trainings.cpu_model() == "Fast: 3 GHz"
    monkeypatch.setattr(trainings.Path, "read_text", lambda _: "processor\t: 0\n")
    monkeypatch.setattr(trainings.platform, "processor", lambda: "arm")
    assert trainings.cpu_model() == "arm"


def test_the_same_results_with_the_same_settings_keep_their_provenance(prepared):
    job, logits = trainings.job("tiny", "focal1", 0), {s: (np.eye(3), np.arange(3), (2,)) for s in ("val", "test")}
    run = trainings.new_run(job, prepared, CPU)
    run.history, run.gradients = [{"epoch": 1, "test_nll": 1.0}], {1: np.ones(10, np.float32)}
    record = paths.study("tiny") / "provenance/focal1-0.json"
    trainings.save(job, run, logits, {"noise1": np.eye(3)}, 1.0, 0)
    assert runs.logits("tiny", "focal1", 0)["test"][2] == (2,)

    def again(job, seconds):
        trainings.save(job, run, logits, {"noise1": np.eye(3)}, seconds, 0)
        return json.loads(record.read_text())["wall_seconds"]

    assert again(job, 2.0) == 1.0
    run.history[0]["test_nll"] = 3.0
    assert again(job, 3.0) == 3.0
    assert again(job._replace(settings=dataclasses.replace(job.settings, clip=5)), 4.0) == 4.0
    record.write_text("{damaged")
    assert again(job, 5.0) == 5.0


def test_the_last_predictions_are_not_made_twice(prepared, monkeypatch):
    seen, predict = [], train.predict
    monkeypatch.setattr(train, "predict", lambda model, split: seen.append(len(split)) or predict(model, split))
    complete("focal1")
    of_epochs = 3 * [150, 60, 60]
    assert seen == of_epochs + [4] + 5 * [60]  # then what comes from elsewhere, and five severities of noise


def test_after_a_stop_past_the_last_epoch_predictions_are_made_anew_and_equal(prepared, monkeypatch):
    complete("focal1", "adafocal")
    whole = files("focal1"), files("adafocal")
    with monkeypatch.context() as patched:
        patched.setattr(trainings, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            complete("focal1", "adafocal")
    for loss in ("focal1", "adafocal"):
        (saved,) = paths.scratch().glob(f"tiny/{loss}-0/*")
        assert list(checkpoints.epochs(saved)) == [2, 3]
        for path in paths.run("tiny", loss, 0).iterdir():
            path.unlink()
    monkeypatch.setattr(train, "take_step", lambda *_: pytest.fail("a step was taken"))
    assert all(not run.predictions for run in complete("focal1", "adafocal"))
    assert (files("focal1"), files("adafocal")) == whole
    record = json.loads((paths.study("tiny") / "provenance/focal1-0.json").read_text())
    assert record["resumed_after_epoch"] == 3  # what wall_seconds leaves out


def test_what_the_network_was_not_trained_on_is_normalised_as_the_test_set(prepared):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])

    own = prepared | {"test_mean": np.array([0.6]), "test_std": np.array([0.1])}
    found = trainings.predict_shifted(Mean(), own, CPU)
    assert list(found) == ["far", "noise1", "noise2", "noise3", "noise4", "noise5"]
    assert found["far"].dtype == np.float16 and found["far"].tolist() == 4 * [[4, -4]]  # white: (1 - 0.6) / 0.1
    assert found["noise5"].shape == (60, 2)
    white = trainings.predict_shifted(Mean(), prepared, CPU)["far"]
    assert white[0, 0] == pytest.approx((1 - 0.4) / 0.3, abs=2e-3)  # those of all, where it has none of its own


CHANGES = {"network": "resnet20", "epochs": 4, "milestones": [3], "batch_size": 32, "learning_rate": 0.2}
CHANGES |= {"momentum": 0.5, "weight_decay": 0.0, "reduction": "mean", "clip": 1.0, "augment": True, "mode": "fast"}
CHANGES |= {"compiled": True, "threads": 2, "evaluate_train_every": 2, "optimizer": "adam", "drop_last": True}
CHANGES |= {"embedding_learning_rate": 0.1, "select": "best"}


def test_the_key_changes_with_all_that_decides_a_result(prepared, monkeypatch, tmp_path):
    job = trainings.job("tiny", "adafocal", 0)
    assert trainings.key(job, CPU) == trainings.key(trainings.job("tiny", "adafocal", 0), CPU)
    keys = {"as it is": trainings.key(job, CPU)}
    assert set(CHANGES) == {field.name for field in dataclasses.fields(train.Training)}
    for name, value in CHANGES.items():
        changed = job._replace(settings=dataclasses.replace(job.settings, **{name: value}))
        keys[name] = trainings.key(changed, CPU)
    keys["seed"] = trainings.key(job._replace(seed=1), CPU)
    keys["loss settings"] = trainings.key(job._replace(loss_settings={"rate": 2.0}), CPU)
    for module in (*trainings.CODE, trainings):
        with monkeypatch.context() as patched:
            edited = tmp_path / "edited.py"
            edited.write_text(Path(module.__file__).read_text() + "# changed\n")
            patched.setattr(module, "__file__", str(edited))
            keys[module.__name__] = trainings.key(job, CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    keys["threads of this process"] = trainings.key(job, CPU)
    torch.set_num_threads(before)
    paths.write_npz(paths.prepared("tiny"), **prepared | {"mean": np.array([0.41])})
    keys["images"] = trainings.key(job, CPU)
    assert len(set(keys.values())) == len(keys), keys


def test_a_training_needs_its_images(prepared):
    paths.prepared("tiny").unlink()
    with pytest.raises(
        FileNotFoundError, match="prepared.npz is missing; `python -m compendium data --prepare tiny` makes it"
    ):
        trainings.train_jobs("tiny", ["focal1"], 0)


def test_a_new_run_is_of_the_studys_classes_and_channels(prepared):
    run = trainings.new_run(trainings.job("tiny", "focal1", 3), prepared, CPU)
    assert networks.head(run.model).out_features == 3 and run.model[0].in_channels == 1
    made = networks.make("small_resnet", 3, 1, 3).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in run.model.state_dict().items())
