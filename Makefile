# Two commands from a fresh clone: `make demo` and `make test`. Nothing but Python ≥ 3.11, pip and make is needed.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/mnist5k
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all lint docs results-cifar10 results-mnist clean

demo: $(INSTALLED)
	$(BIN)/lirpa-fastwarmup train mnist5k --out $(OUT) --overwrite $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

# With the tests that take minutes each.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

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
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps auto_LiRPA==0.3 onnx2pytorch==0.6.0
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The paper's experiments, on whatever device there is; DATA_DIR names the folder of the data. Stopped, they go on.
results-cifar10 results-mnist: $(INSTALLED)
	$(BIN)/python benchmarks/results.py $(@:results-%=%) --data-dir "$(DATA_DIR)" $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/notebooks *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
