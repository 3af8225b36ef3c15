# make results      environment, data, trainings, analyses; ends with the tables
# make everything   all that dvc repro can make anew
# make artifacts    the committed results' histories, logits and notebooks, without training
# make test         the quick tests      make test-all   whole runs, too (README)
# make lab          JupyterLab on the notebooks
# make report       a static site in site/ of what results or artifacts left
# make grid         trainings at once, on every core or GPU; GRID="--executor slurm" on a cluster (docs/grid.md)
# make bench        speed beside stock loops
# make notebooks    what they made, into them, before a commit
# make lock         requirements.txt anew from pyproject.toml
# make environment  .venv alone          make data       that, and the data
# make clean        removes .venv and artifacts/, also what `compendium train` left there and nobody published

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
HEADLINE := $(shell sed -n 's/^  headline: \([^ ]*\).*/\1/p' params.yaml)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUTF8 := 1
# A file's tests share what they have made, so they stay together.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile

# $(call timed,what it is and how long that takes,command)
define timed
	@echo "== $(1)"; begun=$$(date +%s); $(2) && echo "== done in $$(( $$(date +%s) - begun )) s"
endef

.PHONY: help environment results everything data artifacts report test test-all test-whole test-slurm bench lab notebooks lock grid clean

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

environment: $(READY)

results: data
	$(call timed,Trainings: as many at once as there are GPUs or cores (study fashion on two cores: 5 to 20 minutes),\
		python -m compendium grid run 'train@*')
	$(call timed,Analyses of what was trained and of the headline study (two cores: two to ten minutes),\
		python -m compendium grid run 'analyse@*' 'analyse*@$(HEADLINE)-[0-9][0-9]_*')
	@echo
	@for study in $$(python -c "from compendium import settings; print(*settings.active()['studies'])"); do \
		echo "Study $$study, trained here:"; cat figures/$$study/08_results/results.md; done
	@echo "Study $(HEADLINE), which leads:"
	@cat figures/$(HEADLINE)/08_results/results.md
	@echo
	@echo "Figures and tables:   figures/      (the tables above: in 08_results of each study)"
	@echo "Executed notebooks:   artifacts/$(HEADLINE)/notebooks/   (open them with: make lab)"
	@echo "All in one page:      make report, then site/index.html"
	@echo "What to make of it:   README.md"

everything: data
	dvc repro

data: $(READY)
	$(call timed,Data: fetched once and verified (Fashion-MNIST: half a minute),python -m compendium data && dvc pull --quiet published/*.dvc)

artifacts: $(READY)
	dvc pull --allow-missing dvc.yaml published/*.dvc

report: $(READY)
	python -m compendium report

test: $(READY)
	ruff check .
	ruff format --check .
	$(PYTEST)

test-all: test test-whole

test-whole: $(READY)
	$(PYTEST) -m whole

# Needs Debian's packages slurm-wlm and munge; starts a small cluster of its own, for minutes.
test-slurm: $(READY)
	python -m pytest -rs -m slurm tests/test_slurm.py

grid: data
	python -m compendium grid run $(GRID)

bench: $(READY)
	python -m compendium bench

lab: $(READY)
	jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

# Into the notebooks the outputs of their executed copies, so that they can be read where they lie.
notebooks: $(READY)
	python -m compendium notebook --fill artifacts notebooks
	dvc repro --quiet strip

lock: $(READY)
	uv pip compile --quiet --universal --generate-hashes --extra compendium --extra test --extra report \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.txt --upgrade

clean:
	rm -rf .venv artifacts

# The environment: made once, and again when requirements.txt changes. uv, from its own hashed lines, fills it in a third
# of pip's time; where it cannot (it does not read pip's configuration), pip does.
UV := $(BIN)/uv pip install --python $(BIN)/python --quiet
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
$(READY): requirements.txt pyproject.toml
	@test ! -L .venv || { echo ".venv is a link to the environment of another folder, which would then belong to this one; to use it as it is: touch .venv/.ready"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "focalcal needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv module is missing; install it first, on Debian and Ubuntu with: apt install python3-venv"; exit 1; }
	@awk '/^uv==/ {on = 1} on && /^[^ ]/ && !/^uv==/ {exit} on' requirements.txt > .venv/uv.txt
	$(call timed,Environment in .venv: 6 GB once (one to four minutes),\
		{ $(PIP) --require-hashes -r .venv/uv.txt && $(UV) --require-hashes --compile-bytecode -r requirements.txt \
			&& $(UV) --no-deps --no-build-isolation -e .; } \
		|| { echo "uv could not; now with pip (three minutes)" \
			&& $(PIP) --require-hashes -r requirements.txt && $(PIP) --no-deps --no-build-isolation -e .; })
	@touch $@
