"""What several tests need: settings, small images, and a compendium's folder."""

from pathlib import Path

import numpy as np
import yaml

from focalcal import losses, networks, train
from focalcal.train import Training

GAMMAS = {
    "focal": 3.0,
    "dual_focal": 5.0,
    "inverse_focal": 2.0,
    "detached_focal": 3.0,
}  # of the losses that have none of their own


def protocol(**changes) -> Training:
    """The papers' training, in three epochs of the small network, with some settings changed."""
    values = {"network": "small_resnet", "epochs": 3, "milestones": [2, 3], "batch_size": 64, "learning_rate": 0.1}
    values |= {"momentum": 0.9, "weight_decay": 5e-4, "reduction": "sum", "clip": 2.0, "augment": True, "threads": 1}
    return Training(**values | changes)


def make_loss(name: str):
    """A loss of losses.LOSSES, with a gamma where it needs one."""
    return losses.make(name, **{"gamma": GAMMAS[name]} if name in GAMMAS else {})


def new_run(loss: str, settings: Training, seed: int = 0) -> train.Run:
    """A training of grey images of three classes."""
    return train.Run(networks.make(settings.network, 3, 1, seed), make_loss(loss), settings, loss)


def squares(train: int = 150, val: int = 60, test: int = 60) -> dict[str, np.ndarray]:
    """A prepared.npz of bright and dark squares, three classes, learnable in seconds."""
    rng = np.random.default_rng(0)
    prepared = {"mean": np.array([0.4]), "std": np.array([0.3]), "classes": np.array(["dark", "grey", "bright"])}
    for split, count in (("train", train), ("val", val), ("test", test)):
        labels = rng.integers(0, 3, count)
        noise = rng.integers(0, 60, (count, 8, 8, 1))
        prepared[f"{split}_images"] = (noise + 80 * labels[:, None, None, None]).astype(np.uint8)
        prepared[f"{split}_labels"] = labels
    return prepared


def parameters() -> dict:
    """A params.yaml with the study 'tiny' and two losses."""
    settings = {"batch_size": 64, "learning_rate": 0.1, "momentum": 0.8, "weight_decay": 5e-4, "reduction": "sum"}
    return {
        "active": {"studies": ["tiny"], "published": [], "losses": ["focal1"], "seeds": [0]},
        "shared": {
            "protocol": settings | {"clip": 2.0, "augment": False},
            "losses": {"focal1": {"function": "focal", "gamma": 1.5, "reduction": "mean"}, "adafocal": {}},
        },
        "studies": {
            "tiny": {
                "data": {"dataset": "digits", "train": 150, "val": 60, "test": 60},  # as many as squares has
                "training": {"network": "small_resnet", "epochs": 3, "milestones": [2]},
                "exceptions": {"focal1": {"clip": 7.0}},
            }
        },
    }


def write_parameters(folder: Path, values: dict) -> None:
    """Make a folder a compendium with these parameters, in their order."""
    (folder / "dvc.yaml").touch()
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
