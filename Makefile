# make setup | peers | check | test | test-all | quickstart | clean. Each makes what it needs; nothing is installed twice.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
TORCH := torch==2.13.0
LOCK := launch/requirements.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -q
PEERS := .venv/peers
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: setup check peers test test-all quickstart clean

setup: .venv/ready

# A torch that is already here (a CUDA machine's, built for its driver, with the fused kernels built for it) is kept
# and seen through the virtual environment; anywhere else the pinned one is installed first, alone.
.venv/installed: $(LOCK)
	@test -n "$(PYTHON)" || { echo "make: Braid needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv --clear --system-site-packages .venv
	@if $(BIN)/python launch/find_torch.py; then \
		echo "setup: using the torch that is here"; \
	else \
		echo "setup: installing $(TORCH) into .venv"; \
		$(PYTHON) -m venv --clear .venv && $(PIP) $(TORCH); \
	fi
	@echo "setup: installing the packages of $(LOCK)"
	@$(PIP) --no-deps --no-build-isolation -r $(LOCK)
	@touch $@

.venv/ready: .venv/installed pyproject.toml
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Packages that only some tests may see, in a folder of their own (see the list). Without them those tests skip, so what
# cannot be fetched or built is no error.
peers: .venv/installed
	@cmp -s tests/peers.txt $(PEERS)/installed.txt || { \
		echo "peers: installing the packages of tests/peers.txt into $(PEERS)"; \
		rm -rf $(PEERS); \
		MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
			$(PIP) --no-deps --no-build-isolation --target $(PEERS) -r tests/peers.txt \
			&& cp tests/peers.txt $(PEERS)/installed.txt \
			|| { rm -rf $(PEERS); echo "peers: not installed; the tests of Triton kernels skip"; }; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check peers
	$(PYTEST) -m "not slow"

test-all: check peers
	$(PYTEST)

quickstart: setup
	$(BIN)/braid prepare quickstart
	$(BIN)/braid train quickstart
	$(BIN)/braid generate quickstart --keep
	$(BIN)/braid eval quickstart --limit 50 --batch-rows 32
	$(BIN)/braid report quickstart
	$(BIN)/braid export quickstart published/quickstart --overwrite

clean:
	rm -rf .venv *.egg-info build .mypy_cache .pytest_cache .ruff_cache
