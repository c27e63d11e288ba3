# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One more than two cores, because tests often wait for other processes.
PROCESSES ?= 3

.DEFAULT_GOAL := help
.PHONY: help install services demo test check format lint types imports unit quick sim scale crash chaos soak notices \
	slurm lock audit dist try-dist wheels image try-image clean

help:  ## Print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 12

$(INSTALLED): pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	sh requirements/install.sh $(BIN)/python runtime dev
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install: $(INSTALLED)  ## Create .venv with elastic-pt in it, at the pinned versions

demo: install  ## Train on this machine, kill a node in between, compare with an undisturbed run
	$(BIN)/elastic-pt demo

services: install  ## Install what tests run against, such as Ceph RGW, Prometheus, Slurm and helm (tests/services/install.sh)
	bash tests/services/install.sh

test: install services check unit quick  ## Checks, unit, property and distributed tests, and the quick chaos runs

check: lint types imports  ## Format, lint, types, import contracts

format: install  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy
	$(BIN)/mypy deploy/wireguard/mesh.py

imports: install
	$(BIN)/lint-imports

unit: install
	$(BIN)/pytest tests --numprocesses $(PROCESSES) --dist loadgroup --durations 15

sim: install  ## Simulate SEEDS=500 schedules of faults, then find every planted bug
	$(BIN)/python -m tests.sim --seeds $(or $(SEEDS),500) --first $(or $(FIRST),0)
	$(BIN)/python -m tests.sim --mutations

scale: install  ## Simulate a fleet of NODES=1000 through starts, losses and joins
	$(BIN)/python -m tests.sim.scale --nodes $(or $(NODES),1000)

crash: install services  ## Kill at each failpoint under SEEDS=20 seeds, locally and on S3; change 10,000 places of stored states
	$(BIN)/python -m tests.crash --seeds $(or $(SEEDS),20)
	$(BIN)/python -m tests.crash --seeds $(or $(SEEDS),20) --store s3
	$(BIN)/python -m tests.crash --corruptions 10000

quick: install
	$(BIN)/pytest chaos_tests -m quick --numprocesses 2 --dist loadgroup --durations 10

chaos: install services  ## Every chaos run: each fault of the matrix, on real networks and a real bucket
	$(BIN)/pytest chaos_tests --numprocesses 2 --dist loadgroup --durations 10

soak: install  ## Disturb a run for MINUTES=120 and look whether open files, threads and memory stay flat
	$(BIN)/python -m chaos_tests.soak --minutes $(or $(MINUTES),120)

notices: install  ## Give notices to real agents: all leads, phases and sources (`make test` runs a few)
	$(BIN)/pytest chaos_tests/notice_matrix.py --numprocesses 2 --durations 10

slurm: install services  ## Every test of the batch script on a real Slurm (`make test` runs the quick ones); root
	$(BIN)/pytest chaos_tests/test_slurm.py --durations 10

lock: install  ## Write the lock: versions and hashes of all that is installed (UPGRADE="torch" or UPGRADE=all moves versions)
	$(BIN)/python requirements/lock.py $(if $(UPGRADE),--upgrade $(filter-out all,$(UPGRADE)))

audit: install  ## Compare the lock with the known vulnerabilities; without their data it fails
	$(BIN)/python requirements/audit.py

dist: install  ## Build sdist and wheel into dist/
	rm -rf dist build *.egg-info
	$(BIN)/python -m build --no-isolation

try-dist: install  ## Install the wheel into an empty environment and run the demo there; the same with uvx
	$(BIN)/pytest tests/deploy/dist_runs.py --capture no

wheels: install  ## Fetch what the image installs, where its build has no access to the package index
	rm -rf requirements/wheels
	for part in cpu runtime image; do \
		$(BIN)/pip download --quiet --no-deps --require-hashes --dest requirements/.wheels -r requirements/$$part.txt || exit 1; \
	done
	mv requirements/.wheels requirements/wheels

image:  ## Build the container image (BUILD="--build-arg ..." is for docker build)
	sh deploy/image/build.sh $(BUILD)

try-image: install wheels  ## Build the image with a Docker of the test's own, and kill, stop and resume containers of it (root; 15 minutes)
	bash tests/services/install.sh docker
	$(BIN)/pytest tests/deploy/image_runs.py --capture no --durations 10

clean:  ## Remove everything that make created
	rm -rf $(VENV) demo services build dist requirements/wheels requirements/.wheels *.egg-info
