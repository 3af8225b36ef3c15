"""The README's example, as somebody runs it who has installed nothing but the method."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_in_your_own_loop_calibrates():
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "import torch" in code)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, temperature = map(
        float, re.search(r"ECE (.*)%, and (.*)% at temperature (.*)", done.stdout).groups()
    )
    assert temperature > 1 and after < before / 2


def test_the_commands_come_before_the_table():
    first = [line for line in README.splitlines() if line.strip()][:20]
    assert any(line.startswith("make results") for line in first) and any(
        line.startswith("make test") for line in first
    )
    header = next(line for line in README.splitlines() if line.startswith("| Loss"))
    assert header.count("|") <= 7, "at most six columns"
