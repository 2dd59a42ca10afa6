# `make chat` and `make test` are all a fresh machine needs: both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
# Any model that `jaxchat chat -m` takes; the assistant is fetched the first time, 100 to 270 MB.
MODEL ?= assistant
BIN := $(VENV)/bin
# What the install compiles: a change of these rebuilds the native kernels.
NATIVE := CMakeLists.txt $(wildcard $(foreach ext,cc h,jaxchat/pallas/*.$(ext) jaxchat/pallas/*/*.$(ext)))

.PHONY: setup chat test test-full parity lint format clean

setup: $(VENV)/installed

# As a job of its own: a Ctrl-C that stops a reply is not for make. What Ctrl-Z stops goes on at once.
chat: $(VENV)/installed-chat
	@if [ -t 0 ]; then set -m; fi; \
	$(BIN)/jaxchat chat -m $(MODEL); code=$$?; \
	while [ $$code -eq 148 ]; do fg >/dev/null; code=$$?; done; \
	[ $$code -eq 130 ] || exit $$code

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not parity and not full'

# What `make test` leaves out of long lists; of interpreted kernels, a larger part than there.
test-full: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m full

# Live comparison with transformers on torch (CPU): a large install, needed for nothing else.
parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -n 2 --dist worksteal -m parity

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What chatting needs, and no more; most of it is JAX and what JAX needs (scipy, numpy).
$(VENV)/installed-chat: pyproject.toml $(NATIVE)
	$(install)
	@echo "Done. Next time: $(BIN)/jaxchat --help, or make chat."

$(VENV)/installed: EXTRAS = [test,dev]
$(VENV)/installed: pyproject.toml $(NATIVE)
	$(install)
	@touch $(VENV)/installed-chat

$(VENV)/installed-parity: EXTRAS = [parity]
$(VENV)/installed-parity: $(VENV)/installed
	$(install)

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "jaxchat needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
@echo "Setting up $(VENV): about 700 MB for a chat, 1.7 GB with the tests; compiles the C++ kernels."
@$(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip install --quiet --upgrade pip
$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --editable '.$(EXTRAS)'
@touch $@
endef
