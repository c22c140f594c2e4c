# Everything runs in a virtual environment of its own, made once: .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := predictor storage_initializer preflight snapshot_format devtools benchmarks demo examples tests hatch_build.py
MODEL ?=
PORT ?= 8080
PYTEST_ARGS ?=
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info > /dev/null 2>&1 && echo $(tool))))
BUILD_ARGS ?=
IMAGE_PREFIX ?=
IMAGE_TAG ?= dev
TORCH_INDEX_URL ?=

# One lock for all Pythons and processors; the versions are those that the tests run with.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --constraint constraints.txt --generate-hashes \
  --no-emit-index-url --no-emit-package torch --no-annotate --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-fast lint lock format images images-check pin render preflight checkov clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make the virtual environment

# The last ones are what is compiled.
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard predictor/kernels/csrc/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@echo "==> installing into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[predictor,tracing,preflight,dev]'
	@touch $@

demo: $(INSTALLED) ## the main job, offline: hub, storage initializer, predictor, answers
	@$(BIN)/python -m demo

serve: $(INSTALLED) ## the same, and stay; MODEL=hf://owner/name serves from the Hub, PORT=8080
	@$(BIN)/python -m demo --serve --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: $(INSTALLED) ## all tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## all tests but the slow ones
	@$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff, mypy, import directions, yamllint, Dockerfiles, workflows, locks
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/yamllint --strict .
	@$(BIN)/hadolint images/predictor/Dockerfile images/storage_initializer/Dockerfile
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yaml
	@$(BIN)/check-jsonschema --builtin-schema vendor.renovate .github/renovate.json
	@$(BIN)/zizmor --offline --quiet .github
	@$(BIN)/python -m pytest --quiet tests/images/test_locks.py

lock: $(INSTALLED) ## the images' requirements with hashes, from pyproject.toml and constraints.txt
	@$(LOCK) --group build --output-file images/requirements-build.txt
	@$(LOCK) pyproject.toml --output-file images/storage_initializer/requirements.txt
	@$(LOCK) pyproject.toml --extra prepare --group beside-torch --output-file images/storage_initializer/requirements-prepare.txt
	@$(LOCK) pyproject.toml --extra predictor --extra tracing --group beside-torch --output-file images/predictor/requirements.txt

format: $(INSTALLED) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

images: ## both, with docker, podman or buildah; TORCH_INDEX_URL=URL of torch's CPU builds, IMAGE_PREFIX, IMAGE_TAG
	@test -n "$(BUILDER)" || { echo "none of docker, podman and buildah works here"; exit 1; }
	@$(BUILDER) build $(BUILD_ARGS) --file images/storage_initializer/Dockerfile --tag $(IMAGE_PREFIX)kserve-llm-storage-initializer:$(IMAGE_TAG) .
	@$(BUILDER) build $(BUILD_ARGS) --file images/predictor/Dockerfile --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	  --tag $(IMAGE_PREFIX)kserve-llm-predictor:$(IMAGE_TAG) .

images-check: $(INSTALLED) ## hadolint, and every image built, run and searched; as root, with buildah and debootstrap
	@$(BIN)/hadolint images/predictor/Dockerfile images/storage_initializer/Dockerfile
	@BUILD_IMAGES=storage_initializer,prepare,predictor $(BIN)/python -m pytest tests/images

# `kustomize edit set image` would write the files anew, comments elsewhere and lists at the margin.
IMAGE_NAMES := kustomize/components/images/kustomization.yaml manifests/cluster/storage-container/kustomization.yaml
DIGEST := [^ @]+@sha256:[0-9a-f]{64}
pinned = -e '/- name: $(1)$$/{n;s|: .*|: $(firstword $(subst @, ,$(2)))|;n;s|[a-zA-Z]*: .*|digest: $(lastword $(subst @, ,$(2)))|;}'

pin: ## what overlays run: PREDICTOR=NAME@sha256:… STORAGE_INITIALIZER=NAME@sha256:…
	@echo '$(PREDICTOR) $(STORAGE_INITIALIZER)' | grep -qE '^$(DIGEST) $(DIGEST)$$' \
	  || { echo 'say make pin PREDICTOR=NAME@sha256:… STORAGE_INITIALIZER=NAME@sha256:…'; exit 1; }
	@for file in $(IMAGE_NAMES); do \
	  text=$$(sed $(call pinned,kserve-llm-predictor,$(PREDICTOR)) \
	    $(call pinned,kserve-llm-storage-initializer,$(STORAGE_INITIALIZER)) $$file) && echo "$$text" > $$file || exit 1; \
	done
	@$(MAKE) --no-print-directory render

RULE := manifests/monitoring/prometheus-rule.yaml

render: ## every overlay into tests/kustomize/golden, for git diff to show, and the rules into the PrometheusRule
	@rule=$$(sed '/^spec:/q' $(RULE); sed -e '/^#/d' -e 's/^./  &/' manifests/prometheus/rules.yaml) && echo "$$rule" > $(RULE)
	@for overlay in kustomize/overlays/*/; do \
	  golden=tests/kustomize/golden/$$(basename $$overlay).yaml; \
	  kubectl kustomize $$overlay > $$golden || exit 1; \
	  echo $$golden; \
	done

preflight: $(INSTALLED) ## look every overlay over; CRD_DIR=folder checks custom kinds as well
	@for overlay in kustomize/overlays/*/; do \
	  $(BIN)/python -m preflight $$overlay $(if $(CRD_DIR),--crds $(CRD_DIR)) || exit 1; \
	done

checkov: $(INSTALLED) ## scan the rendered prod; checkov gets a virtual environment of its own
	@test -x .venv-checkov/bin/checkov || { $(PYTHON) -m venv .venv-checkov && .venv-checkov/bin/python -m pip install --quiet checkov==3.3.30; }
	@$(BIN)/python -m pytest tests/kustomize/test_checkov.py

clean: ## remove what was made here, the virtual environment and ./models included
	@rm -rf $(VENV) .venv-checkov build dist models predictor/kernels/cpu/libnative.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
