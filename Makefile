# Two commands from a fresh clone: `make demo` and `make test`. Nothing but Python ≥ 3.11, pip and make is needed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell sed -n 's/^torch==//p' requirements.txt)
OUT ?= runs/mnist5k
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# One process per core, each with one thread: the networks of the tests are too small to occupy more. Threads also have
# to be as many in the processes that tests start, since some compare runs bit for bit. `worksteal` keeps neighbouring
# tests in one process, which shares their fixtures, until another process runs out of tests.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test test-all test-engine test-torch test-abcrown lint docs results-cifar10 results-mnist clean

demo: $(INSTALLED)
	$(BIN)/lirpa-fastwarmup train mnist5k --out $(OUT) --overwrite $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

# With the tests that take minutes each.
test-all: $(INSTALLED)
	$(PYTEST) -m "slow or not slow" $(ARGS)

# The tests with another engine: ENGINE names a checkout of auto_LiRPA.
test-engine: $(INSTALLED)
	@test -n "$(ENGINE)" || { echo "Pass the engine's checkout: make test-engine ENGINE=DIR" >&2; exit 2; }
	@test -f "$(ENGINE)/auto_LiRPA/__init__.py" || { echo "$(ENGINE) is no checkout of auto_LiRPA: it has no auto_LiRPA/__init__.py" >&2; exit 2; }
	PYTHONPATH="$$(cd "$(ENGINE)" && pwd)" $(PYTEST) $(ARGS)

# α,β-CROWN itself, on five samples: ABCROWN names its checkout, and ABCROWN_PYTHON the interpreter of its environment.
test-abcrown: $(INSTALLED)
	@test -n "$(ABCROWN)" || { echo "Pass the checkout of alpha-beta-CROWN: make test-abcrown ABCROWN=DIR" >&2; exit 2; }
	ABCROWN="$(ABCROWN)" ABCROWN_PYTHON="$(or $(ABCROWN_PYTHON),python3)" $(BIN)/python -m pytest tests/test_complete.py -k real

# The tests with another PyTorch, in an environment of its own; with ENGINE, a checkout of auto_LiRPA, with both.
test-torch:
	$(MAKE) $(if $(ENGINE),test-engine,test) TORCH="$(TORCH)" VENV="$(VENV)-torch-$(TORCH)"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, as pages: build/docs/index.html. A warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs

# Debian's python3 comes without ensurepip; then the pip that is there fills the environment.
$(INSTALLED): requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV) install pip; }
	sed "s/^torch==.*/torch==$(TORCH)/" requirements.txt | $(BIN)/python -m pip install --quiet -r /dev/stdin
	$(BIN)/python -m pip install --quiet --no-deps auto_LiRPA==0.3 onnx2pytorch==0.6.0
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The paper's experiments, on whatever device there is; DATA_DIR names the folder of the data. Stopped, they go on.
results-cifar10 results-mnist: $(INSTALLED)
	$(BIN)/python benchmarks/results.py $(@:results-%=%) --data-dir "$(DATA_DIR)" $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-torch-* build dist docs/notebooks *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
