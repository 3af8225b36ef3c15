"""What is committed fits together: a clone's artifacts and dvc.lock against its code, notebooks and parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.whole


def test_nothing_is_stale_but_for_data_that_is_not_pushed_and_notebooks_show_what_they_made(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def call(*command, where):
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clone = tmp_path / "clone"
    call("git", "clone", "-q", REPOSITORY, clone, where=tmp_path)
    call("dvc", "pull", "-q", "--allow-missing", where=clone)
    stale = set()
    for stage, problems in json.loads(call("dvc", "status", "--json", where=clone)).items():
        for problem in problems:
            if isinstance(problem, str):
                stale.add((stage, problem))
                continue
            (changed,) = problem.values()
            stale |= {(stage, path) for path in changed}
    not_pushed = {"data", *(path for _, path in stale if Path(path).name == "prepared.npz")}
    assert {(stage, path) for stage, path in stale if path not in not_pushed} == set()

    call(sys.executable, "-m", "compendium", "notebook", "--fill", "artifacts", "notebooks", where=clone)
    assert call("git", "status", "--porcelain", "notebooks", where=clone) == "", "`make notebooks` changes these"
    assert sum(path.stat().st_size for path in (clone / "notebooks").iterdir()) < 4e6
