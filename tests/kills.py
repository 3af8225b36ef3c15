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

from helpers import write_parameters
from tiny import COMPENDIUM, DEADLINE, real_parameters, until

LOSSES = ["focal3", "adafocal"]


def compendium(folder: Path, epochs: int) -> Path:
    """A folder with a study 'tiny', its data prepared."""
    folder.mkdir()
    (folder / "dvc.yaml").touch()
    values = real_parameters(LOSSES)
    values["studies"]["tiny"]["data"] |= {"test": 100, "shifted": []}
    values["studies"]["tiny"]["training"] |= {"epochs": epochs, "milestones": [epochs // 2], "augment": True}
    write_parameters(folder, values)
    subprocess.run([*COMPENDIUM, "data", "--prepare", "tiny"], cwd=folder, check=True, timeout=DEADLINE)
    return folder


def start(folder: Path) -> subprocess.Popen:
    command, environment = [*COMPENDIUM, "train", "tiny", *LOSSES], os.environ | {"FOCALCAL_DEVICE": "cpu"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def results(folder: Path) -> dict[str, bytes]:
    """What a training leaves, but for its provenance."""
    files = [*folder.glob("artifacts/tiny/runs/*/*/*"), *folder.glob("artifacts/tiny/models/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def newest(folder: Path) -> int:
    """The last epoch with a checkpoint; 0 if there is none."""
    saved = folder.glob("scratch/tiny/*/*/[0-9]*.safetensors")
    return max((int(path.name.split("-")[0]) for path in saved), default=0)


def trained(process: subprocess.Popen, folder: Path, epochs: int) -> None:
    """Wait until a process has saved that many epochs more, or has ended."""
    before = newest(folder)
    until(lambda: newest(folder) >= before + epochs or process.poll() is not None, every=0.01)


def main(kills: int, seed: int = 0) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = (compendium(Path(scratch) / name, 20 * kills + 10) for name in ("alone", "killed"))
        process = start(alone)
        assert process.communicate(timeout=DEADLINE) and process.returncode == 0
        count = 0
        while True:
            process = start(killed)
            if count < kills:
                if chance.random() < 0.8:  # else while it starts
                    trained(process, killed, chance.randint(1, 5))
                time.sleep(chance.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
            output = process.communicate(timeout=DEADLINE)[0].decode()
            if process.returncode != -signal.SIGKILL:
                break
            count += 1
            print(f"kill {count}: epoch {newest(killed)} is saved", flush=True)
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
