# make results   environment, data, the whole pipeline          make test   the tests
# make lab       JupyterLab on the notebooks                    make lock   requirements.txt anew from pyproject.toml
# make strip     notebooks without outputs, before a commit     make bench  speed beside stock loops, on this machine
# make report    a static site of results and chapters in site/, from what results or artifacts left
# make grid      the trainings at once, on every core or GPU; GRID="--executor slurm" on a cluster (docs/grid.md)
# make artifacts the committed results' histories, logits, tables and executed notebooks, without training

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: results data artifacts report test bench lab strip lock grid test-slurm clean

results: data
	dvc repro
	@echo
	@echo "Figures and tables:   figures/   (start with figures/fashion/08_results/results.md)"
	@echo "Executed notebooks:   artifacts/fashion/notebooks/   (read them with: make lab)"
	@echo "What to make of it:   README.md"

data: $(READY)
	python -m focalcal.data
	dvc pull --quiet published/*.dvc

artifacts: $(READY)
	dvc pull --allow-missing

report: $(READY)
	python report/build.py

test: $(READY)
	ruff check .
	ruff format --check .
	python -m pytest

# Needs Debian's packages slurm-wlm and munge; starts a small cluster of its own, for minutes.
test-slurm: $(READY)
	python -m pytest -rs -m slurm tests/test_slurm.py

grid: data
	python -m focalcal.grid run $(GRID)

bench: $(READY)
	python -m focalcal.bench

lab: $(READY)
	jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

strip: $(READY)
	python -m focalcal.notebook --strip notebooks notebooks

lock: $(READY)
	pip install --quiet uv
	uv pip compile --quiet --universal --generate-hashes --extra test --extra report \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.txt --upgrade

clean:
	rm -rf .venv artifacts

# The environment: made once, and again when requirements.txt changes.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "focalcal needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv module is missing; install it first, on Debian and Ubuntu with: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
