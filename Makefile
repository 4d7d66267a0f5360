# Every target sets up .venv by itself when it is missing or older than what it is made from.
.PHONY: serve chromium prometheus test test-slow test-all test-xla test-device test-image test-lowest bench soak check audit package clean

# Tests start hundreds of Pythons, and each would compile tpray again where this is set.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml deployments/constraints.txt
# torch by its exact version first: pip then takes the CPU build where there is one, and nothing later replaces it.
INSTALL = $(BIN)/pip install --disable-pip-version-check -q -c deployments/constraints.txt

ARGS ?= --tp 2

# A sentence instead of what pip says of it.
CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "tpray needs Python 3.11 or \
newer, and $(PYTHON) is %d.%d: name another, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" % (v[0], v[1]))'

serve: .venv/serve.stamp
	$(BIN)/tpray serve $(ARGS)

# Two at a time; those with Ray one after another. Three tiers: what one changes code against, what is asked besides
# before a change lands, and the longest: more of a kind that the others have one of, and clusters that lose nodes.
PYTEST = $(BIN)/pytest --numprocesses 2 --dist loadgroup

# The browser that tests/clients/test_page.py drives, from Debian or its kin. Only root can install it: for others, and
# where that fails, these tests are skipped and say why.
chromium:
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || { \
	  export DEBIAN_FRONTEND=noninteractive; \
	  timeout 120 apt-get update -qq && timeout 600 apt-get install -qq --no-install-recommends chromium fonts-dejavu-core \
	    >/dev/null || echo "chromium could not be installed: the tests of the page are skipped" >&2; }

# The Prometheus of tests/monitoring, from Debian or its kin. It is unpacked and not installed: no service starts, and it
# needs no root. Where that fails, these tests are skipped and say why.
UNPACKED := .venv/prometheus
prometheus:
	@test -n "$$(command -v prometheus)" || test -x $(UNPACKED)/usr/bin/prometheus || ! command -v apt-get >/dev/null || { \
	  { test "$$(id -u)" != 0 || timeout 120 apt-get update -qq; } && mkdir -p $(UNPACKED) && cd $(UNPACKED) && \
	  timeout 300 apt-get download -qq -o APT::Sandbox::User=root prometheus && dpkg -x prometheus_*.deb . && \
	  rm prometheus_*.deb || echo "Prometheus could not be had: the tests that start it are skipped" >&2; }

test: .venv/dev.stamp chromium prometheus
	$(PYTEST) -m "not slow and not nightly and not xla"

test-slow: .venv/dev.stamp chromium prometheus
	$(PYTEST) -m "slow and not xla and not image"

test-all: .venv/dev.stamp chromium prometheus
	$(PYTEST) -m "(slow or nightly) and not xla and not image"

# The lowest versions that pyproject.toml allows, in an environment of their own; without the clients that people have,
# which want newer ones.
test-lowest: .venv-lowest/stamp
	.venv-lowest/bin/pytest --numprocesses 2 --dist loadgroup -m "not slow and not nightly and not xla" --ignore tests/clients

# As root, and with Debian's debootstrap: deployments/Dockerfile step by step, on a small Debian. Two minutes, 3 GB.
test-image: .venv/dev.stamp
	$(BIN)/pytest -m image tests/package

# The programs of neuron-xla on the real torch-xla, in an environment of their own (8 GB; two minutes to make).
test-xla: .venv-xla/stamp
	$(XLA)/python -m pytest --numprocesses 2 --dist loadgroup -m xla tests/xla tests/neuron tests/serving

# On a machine with NeuronCores, in the environment that has Neuron's packages; writes neuron-report.json.
CORES ?= 2
test-device:
	TPRAY_TEST_CORES=$(CORES) $(PYTHON) -m pytest tests/device

# BENCH="--short --only http,small" is a quick look at two of its sections.
bench: .venv/bench.stamp
	$(BIN)/python -m tests.bench $(BENCH)

# An hour; SOAK="--minutes 10" is a quick look.
soak: .venv/dev.stamp
	$(BIN)/python -m tests.faults.soak $(SOAK)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A wheel, and the archive of sources that it is made from, in dist/.
package: .venv-package/stamp
	rm -rf dist
	.venv-package/bin/python -m build

# Advisories about the packages that deployments/constraints.txt pins; says so where none can be reached.
audit: .venv/audit.stamp
	$(BIN)/python -m tests.audit

.venv/serve.stamp: $(SOURCES)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	touch $@

.venv/dev.stamp: .venv/serve.stamp
	$(INSTALL) -e '.[test,clients]'
	touch $@

.venv/audit.stamp: .venv/serve.stamp
	$(INSTALL) -e '.[audit]'
	touch $@

.venv/bench.stamp: .venv/serve.stamp
	$(INSTALL) -e '.[bench]'
	touch $@

# torch 2.9, torch-xla and torch-neuronx belong together; jax brings the XLA that executes the programs.
XLA := .venv-xla/bin
.venv-xla/stamp: $(SOURCES)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-xla
	grep -v '^torch==' deployments/constraints.txt > .venv-xla/constraints.txt
	$(XLA)/pip install --disable-pip-version-check -q torch==2.9.1 torch-xla==2.9.0
	$(XLA)/pip install --disable-pip-version-check -q -c .venv-xla/constraints.txt jax==0.10.2 jaxlib==0.10.2 -e '.[test]'
	touch $@

# pip has no way to ask for the lowest; uv takes a higher one only where what another package needs rules the lowest out.
.venv-lowest/stamp: $(SOURCES)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --disable-pip-version-check -q -c deployments/constraints.txt uv torch==2.13.0
	.venv-lowest/bin/uv pip install -q --python .venv-lowest --resolution lowest-direct torch==2.13.0 -e '.[test]'
	touch $@

.venv-package/stamp: deployments/constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --disable-pip-version-check -q -c deployments/constraints.txt build
	touch $@

clean:
	rm -rf .venv .venv-*
