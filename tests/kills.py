"""Kill a training at random moments and see that it ends as if nothing had happened.

    python tests/kills.py [KILLS] [SEED]

trains two losses together on scikit-learn's digits, in a scratch copy of the compendium: once left alone, once killed
with SIGKILL so many times and started again. Histories, logits and weights must be equal byte for byte.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

LOSSES = ["focal3", "adafocal"]


def compendium(folder: Path, epochs: int) -> Path:
    """A folder with a study 'tiny', its data prepared."""
    folder.mkdir()
    (folder / "dvc.yaml").touch()
    training = {"network": "small_resnet", "epochs": epochs, "milestones": [epochs // 2], "augment": True}
    study = {"data": {"dataset": "digits", "train": 300, "val": 100, "test": 100}, "training": training}
    shared = {"protocol": {}, "losses": dict.fromkeys(LOSSES)}
    active = {"studies": ["tiny"], "published": [], "losses": LOSSES, "seeds": [0]}
    (folder / "params.yaml").write_text(
        yaml.safe_dump({"active": active, "shared": shared, "studies": {"tiny": study}})
    )
    subprocess.run([sys.executable, "-m", "focalcal.data", "--prepare", "tiny"], cwd=folder, check=True)
    return folder


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "focalcal.train", "tiny", *LOSSES]
    environment = os.environ | {"FOCALCAL_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def results(folder: Path) -> dict[str, bytes]:
    """What a training leaves, but for its provenance."""
    files = [*folder.glob("artifacts/tiny/runs/*/*/*"), *folder.glob("artifacts/tiny/models/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main(kills: int, seed: int = 0) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = (compendium(Path(scratch) / name, 30 * kills + 10) for name in ("alone", "killed"))
        process = start(alone)
        assert process.communicate() is not None and process.returncode == 0
        count = 0
        while True:
            process = start(killed)
            if count < kills:
                if chance.random() < 0.8:
                    process.stdout.read(1)  # the progress bar: training has begun; else killed while starting
                time.sleep(chance.uniform(0, 0.7))
                process.send_signal(signal.SIGKILL)
            output = process.communicate()[0].decode()
            if process.returncode != -signal.SIGKILL:
                break
            count += 1
            saved = sorted(path.name for path in killed.glob("scratch/tiny/*/*/[0-9]*.safetensors"))
            print(
                f"kill {count}: checkpoints of epochs {sorted({int(name.split('-')[0]) for name in saved})}", flush=True
            )
        assert process.returncode == 0, output
        same = results(alone) == results(killed) and len(results(alone)) == 10
        left = [
            path
            for path in killed.rglob("*")
            if ".part" in path.name or path.suffix == ".safetensors" and "scratch" in path.parts
        ]
        print(f"{count} kills; {len(results(killed))} files, {'all equal' if same else 'DIFFERENT'}; left over: {left}")
        assert same and not left and count == kills


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or [30]))
