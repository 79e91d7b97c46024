# Each target makes its own .venv if there is none or if the dependencies changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test check accept fix bench bench-gpu chaos
.DELETE_ON_ERROR:

# The main job end to end. On real sections: make demo SAMPLES=samples.csv [WEIGHTS=densenet121.pth] [PATIENT=B]
demo: $(STAMP)
	$(BIN)/python jobs/demo.py $(if $(SAMPLES),--samples "$(SAMPLES)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
		$(if $(PATIENT),--test-patient "$(PATIENT)")

# All tests; those that need a GPU or real data say why they are skipped.
test: $(STAMP)
	$(PYTEST) -ra

# Before a commit: format, lint, types, fast tests.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not gpu and not ray"

# Whole jobs, as a new user runs them: the demo, jobs submitted to a cluster whose nodes have only dependencies, and one
# encoder of each family.
accept: $(STAMP)
	$(PYTEST) -ra tests/accept_*.py

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Ratios to bare loops, peers and earlier ways of doing the same, side by side on this machine: docs/performance.md.
# Some of them: make bench ONLY=R1,R9 ROUNDS=3. With real slides: MCLSTEXP_DATA=DATA
bench: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS))

# Figures of one GPU, in steps that are written down at once: docs/performance.md. Some of them: make bench-gpu ONLY=H1,H6
# Every step through in tiny sizes on a CPU: make bench-gpu TOY=1
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(TOY),--toy)

# A cohort predicted calmly and while its processes are killed: both must give the same files. On an S3 server: S3=1
chaos: $(STAMP)
	$(BIN)/python benchmarks/chaos.py $(if $(S3),--s3)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
