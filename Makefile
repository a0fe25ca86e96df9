# Everything a person or CI does with this repository. `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Files of tests run side by side, three on two cores since most of a file is waiting; PARALLEL= runs them in one row.
# tests/order.py says which begin first.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

# The boards' tests: the story alone is tests/boards/test_story.py.
BOARDS ?= tests/boards

# What runs for each change, on any machine. The others have targets of their own.
EVERYWHERE := not root and not board and not bench and not density and not nightly

# What is skipped, by name, where the toolchains are not.
GUEST_TESTS := tests/components tests/agent/host/test_wasi_http_languages.py tests/agent/host/test_modbus.py \
    tests/agent/host/test_preview1.py tests/agent/host/test_sensor_examples.py tests/fleet/component/test_compose.py

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("wasmfleet needs Python 3.11 or newer; set PYTHON=/path/to/python3") if sys.version_info < (3, 11) else None'
	@echo "Making $(VENV) and installing about 100 packages into it: a minute or two, without a word from pip."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	@touch $@

install: $(STAMP) ## make the virtual environment and install everything into it

demo: $(STAMP) ## a fleet of three devices on this machine: three pushes, a rollback, an undo (ONCE=1: exit when done; BROKER=embedded|mosquitto)
	$(BIN)/fleet demo $(if $(ONCE),--once) $(if $(BROKER),--broker $(BROKER))

check: $(STAMP) docs ## lint, format, types, prose, and every link of the pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.house.baseline

docs: $(STAMP) ## check every link and anchor of the pages, and build them as a site into build/docs
	$(BIN)/mkdocs build --strict --config-file tests/house/mkdocs.yml --site-dir $(abspath build/docs)

baseline: $(STAMP) ## record the counts of faults in prose and shape, which may only fall (FORCE=1: raise them)
	$(BIN)/python -m tests.house.baseline record $(if $(FORCE),--force)

test: check ## lint, types and every test that needs neither root nor QEMU
	$(BIN)/python -m pytest $(PARALLEL) -m "$(EVERYWHERE)"

test-unit: $(STAMP) ## the quick tests only
	$(BIN)/python -m pytest $(PARALLEL) -m "$(EVERYWHERE) and not e2e"

golden: $(STAMP) ## record again what leaves a process (messages, tables, routes, commands): read the difference before committing it
	$(BIN)/python -m pytest tests/golden tests/fleet/server/test_golden_answers.py tests/fleet/cli/test_tables.py --record-golden

test-root: $(STAMP) ## tests of isolation layers that only root can create
	$(BIN)/python -m pytest -m root

fuzz: $(STAMP) ## fuzz every parser of external input (FUZZ: times the HTTP mutants, 0: none; HOSTILE: devices against the server; RUNS: of each parser; HARNESS: only that)
	$(if $(or $(HARNESS),$(filter 0,$(FUZZ) $(HOSTILE))),,HOSTILE=$(or $(HOSTILE),6) $(BIN)/python -m pytest tests/fleet/server/test_hostile_device_fuzz.py)
	$(if $(or $(HARNESS),$(filter 0,$(FUZZ))),,FUZZ=$(or $(FUZZ),20) $(BIN)/python -m pytest tests/agent -m "$(EVERYWHERE)" -k fuzz --timeout 3600)
	$(BIN)/python -m tests.fuzz.run $(HARNESS) $(if $(RUNS),--runs $(RUNS))

test-density: $(STAMP) ## three thousand idle instances on one host, in a gibibyte (root)
	$(BIN)/python -m pytest tests/agent/host/test_density.py -m density -s

# A peer that cannot be had is named in the table.
bench: $(STAMP) ## measure requests beside wasmtime serve and nginx into docs/benchmarks.md (10 minutes; QUICK=1: one short pair each), then print the other ratios and counts
	$(BIN)/python -m tests.bench.request_path $(if $(QUICK),--quick); status=$$?; $(BIN)/python -m pytest -m bench -s && exit $$status

test-bounds: $(STAMP) ## the server's and commands' tests with the lowest and newest versions of dependencies (BOUNDS="--python 3.11 --set lowest")
	$(BIN)/python -m deploy.dependency_bounds $(BOUNDS)

conformance: $(STAMP) ## run the public TUF suite against the device's client: TUF_CONFORMANCE=its checkout
	@test -x "$(TUF_CONFORMANCE)/env/bin/pytest" || { echo "set TUF_CONFORMANCE to a checkout of theupdateframework/tuf-conformance after 'make dev' in it"; exit 2; }
	@command -v faketime >/dev/null || { echo "the suite moves the clock: install faketime"; exit 2; }
	cd "$(TUF_CONFORMANCE)" && env/bin/pytest tuf_conformance --entrypoint "$(abspath $(BIN))/fleet-tuf-conformance"

packages: $(STAMP) ## the Debian packages for devices (arm64, riscv64, amd64) and for the server, into dist/
	$(BIN)/python -m deploy.packages.build

release: $(STAMP) ## wheel, packages, checksums, third-party notices and SBOM, into dist/
	$(BIN)/python -m deploy.packages.release

riscv64-wheel: $(STAMP) ## wasmtime for riscv64, into $$WASMFLEET_WHEELHOUSE (half an hour, once)
	$(BIN)/python -m deploy.riscv64.build

test-guests: $(STAMP) ## build guests in Rust, Go, JavaScript and Python with toolchains of their own, and test them
	$(BIN)/python -m deploy.guests $(BIN)/python -m pytest -rs $(GUEST_TESTS)

test-boards: $(STAMP) ## boot emulated arm64 and riscv64 boards and test on them (root; FULL=1: what is left to `make nightly` too)
	$(BIN)/python -m deploy.image.ready
	$(BIN)/python -m pytest $(BOARDS) -m "board$(if $(FULL),, and not nightly)" --numprocesses=2 --dist=loadscope -s -v

# Other than for the boards there may be no test with this mark, which pytest calls 5.
test-nightly: $(STAMP)
	WASMFLEET_TENTH=none $(BIN)/python -m pytest -m "nightly and not board and not bench and not density" || [ $$? -eq 5 ]

nightly: $(STAMP) ## what takes too long for each change, hours (root): long fuzzing, all boards, dependencies' bounds, toolchains, density, benches
	$(MAKE) --keep-going test-nightly test-bounds test-boards FULL=1 test-guests test-density bench fuzz RUNS=$(or $(RUNS),200000) HOSTILE=$(or $(HOSTILE),200) \
	    $(if $(TUF_CONFORMANCE),conformance)

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz

.PHONY: help install demo check docs baseline test test-bounds test-unit test-root test-density fuzz golden bench conformance clean \
	packages release riscv64-wheel test-guests test-boards test-nightly nightly
