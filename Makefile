# Everything a newcomer types: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# PyTorch's own index of CPU builds, asked only where pip does not find the build by itself
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo stack test test-slow test-cluster test-long check bench clean

$(READY): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer, got `$(PYTHON) --version`. Set PYTHON, e.g. make PYTHON=python3.12 demo"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set (about 4 minutes, 3 GB)"
	@grep '^torch==' requirements/cpu.lock > $(VENV)/torch.txt
	@$(BIN)/pip install --quiet --no-deps -r $(VENV)/torch.txt 2> $(VENV)/torch.log || \
	  $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) -r $(VENV)/torch.txt || \
	  { cat $(VENV)/torch.log; exit 1; }
	@$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock 2> $(VENV)/install.log || { cat $(VENV)/install.log; exit 1; }
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation -e . 2>> $(VENV)/install.log || { cat $(VENV)/install.log; exit 1; }
	@touch $@

demo: $(READY)  ## the whole loop on a real 135M model
	$(BIN)/srlm run demo

stack: $(READY)  ## Prefect, MLflow and a worker on the loopback, until Ctrl-C
	@$(BIN)/python -m deployments.stack

test: $(READY)  ## everything quick, engines included
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cluster and not gpu"

test-slow: $(READY)  ## the suites that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

test-cluster: $(READY)  ## servers, Ray, several training ranks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "cluster and not gpu"

test-long: $(READY)  ## test-slow and test-cluster in one: who waits for a server leaves the cores to the others
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "(slow or cluster) and not gpu"

check: $(READY)  ## style, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)  ## ours against the other side, in turn; results into benchmarks/results
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) runs
