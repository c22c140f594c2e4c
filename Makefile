# Every target runs in the virtual environment .venv, which the first one creates.

PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := kserve_llm predictor storage_initializer preflight snapshot_format devtools benchmarks demo examples tests hatch_build.py
MODEL ?=
PORT ?= 8080
PYTEST_ARGS ?=
COVERAGE_REPORT ?= report
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info > /dev/null 2>&1 && echo $(tool))))
BUILD_ARGS ?=
IMAGE_PREFIX ?=
IMAGE_TAG ?= dev
# Of the tag; of another commit, below all releases. Images are built without the history.
VERSION ?= $(or $(patsubst v%,%,$(shell git describe --tags --exact-match --match 'v[0-9]*' 2> /dev/null)),0.0.0$(addprefix +g,$(REVISION)))
REVISION ?= $(shell git rev-parse --short=12 HEAD 2> /dev/null)
TORCH_INDEX_URL ?=

# One lock for all Python versions and CPU architectures, with the versions that the tests use.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --constraint constraints.txt --generate-hashes \
  --no-emit-index-url --no-emit-package torch --no-annotate --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
.PHONY: help install demo demo-ray serve test test-all test-packaging coverage peers gpu-wheels gpu-check kubectls clients lint lock format docs images images-check version pin render preflight undeploy changelog release-dry-run checkov clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## create the virtual environment

# The C sources are compiled on installation.
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard predictor/kernels/csrc/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required. Choose one: make PYTHON=python3.12 ...")'
	@echo "==> installing into $(VENV), which takes some minutes and 3 GB"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[predictor,tracing,ray,preflight,completion,dev]'
	@touch $@

demo: $(INSTALLED) ## the main job, offline: hub, storage initializer, predictor, answers
	@$(BIN)/python -m demo

demo-ray: $(INSTALLED) ## the demo model on Ray Serve, on two local nodes: every protocol, and replicas that follow the load
	@$(BIN)/python -m demo.ray_serve

serve: $(INSTALLED) ## the same, and keep serving; MODEL=hf://owner/name serves from the Hub, PORT=8080
	@$(BIN)/python -m demo --serve --port $(PORT) $(if $(MODEL),--model $(MODEL))

# Every worker computes with one thread, since there are as many workers as cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --durations 15 $(PYTEST_ARGS)

test: $(INSTALLED) ## unit and component tests, and one process of each program; some minutes
	@$(PYTEST) -m 'not slow and not serial and not packaging and not gpu'

# Slow tests wait for processes more than they compute.
test-all: test ## test, then the slow tests and those that need the machine for themselves
	@$(PYTEST) -m 'slow and not serial and not packaging and not gpu' --numprocesses 3
	@$(PYTEST) -m 'serial and not packaging' --numprocesses 0

test-packaging: $(INSTALLED) ## images, locks, wheels, other CPUs
	@$(PYTEST) -m packaging

# Also of the processes that the tests start.
coverage: $(INSTALLED) ## the default tier with coverage of the packages; COVERAGE_REPORT="html --directory build/coverage"
	@mkdir -p build && rm -f build/.coverage*
	@OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --numprocesses 2 -m 'not slow and not serial and not packaging and not gpu' $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage $(COVERAGE_REPORT)

PEERS ?= llamacpp openvino vllm
PEERS_JOBS ?= 1

peers: $(INSTALLED) ## build the servers that benchmarks.compare measures next to the predictor, in .peers; PEERS="llamacpp vllm", PEERS_JOBS=4
	@$(BIN)/python -m benchmarks.peers install $(PEERS) --jobs $(PEERS_JOBS)

GPU_WHEELS := build/gpu-wheels
GPU_PYTHON ?= 3.12
GPU_SKIP ?=
GPU_PART_MIB ?= 50
GPU_ARGS ?=

gpu-wheels: $(INSTALLED) ## wheels for gpu-check, for Python GPU_PYTHON=3.12, in parts of GPU_PART_MIB=50; GPU_SKIP="names" leaves some out
	@rm -rf $(GPU_WHEELS)
	@$(BIN)/python -m devtools.gpu_wheels $(GPU_WHEELS) --python_version $(GPU_PYTHON) --part_mib $(GPU_PART_MIB) --skip $(GPU_SKIP)

gpu-check: ## prove and measure the predictor on a GPU, offline, with a bare python3 that has torch; GPU_ARGS="--stages load,tests"
	@$(PYTHON) -m benchmarks.gpu_check --wheels $(GPU_WHEELS) $(GPU_ARGS)

kubectls: $(INSTALLED) ## install kubectls with other versions of kustomize in .kubectls, for `make test-all`; 300 MB
	@$(BIN)/python -m devtools.kubectls .kubectls

clients: $(CLIENTS)/.installed ## install the client libraries that `make test-all` tests, in an environment of their own; 1 GB

$(CLIENTS)/.installed: $(INSTALLED) tests/clients/requirements.txt tests/clients/constraints.txt
	@echo "==> installing into $(CLIENTS)"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLIENTS)
	@$(BIN)/uv pip install --quiet --python $(CLIENTS)/bin/python --requirement tests/clients/requirements.txt --constraint tests/clients/constraints.txt
	@touch $@

lint: $(INSTALLED) ## style, types, imports, dependencies, wording, YAML, C, Dockerfiles, workflows, locks
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/deptry .
	@$(BIN)/codespell
	@! git grep -niIE -f devtools/phrases.txt -- ':!devtools/phrases.txt' ':!CHANGELOG.md' ':!tests/kustomize/golden' ':!demo/model'
	@$(BIN)/clang-format --dry-run --Werror predictor/kernels/csrc/*
	@$(BIN)/yamllint --strict .
	@$(BIN)/hadolint .devcontainer/Dockerfile images/*/Dockerfile
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yaml
	@$(BIN)/check-jsonschema --builtin-schema vendor.renovate .github/renovate.json
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yaml
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	@$(BIN)/zizmor --offline --quiet .github
	@$(BIN)/python -m pytest --quiet tests/images/test_locks.py

lock: $(INSTALLED) ## exact versions: of the images, with hashes, from pyproject.toml and constraints.txt; of the tested clients
	@$(LOCK) --group build --output-file images/requirements-build.txt
	@$(LOCK) pyproject.toml --output-file images/storage_initializer/requirements.txt
	@$(LOCK) pyproject.toml --extra prepare --group beside-torch --output-file images/storage_initializer/requirements-prepare.txt
	@$(LOCK) pyproject.toml --extra predictor --extra tracing --group beside-torch --output-file images/predictor/requirements.txt
	@$(LOCK) pyproject.toml --extra predictor --extra tracing --extra ray --group beside-torch --output-file images/predictor/requirements-ray.txt
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --custom-compile-command 'make lock' \
	  tests/clients/requirements.txt --output-file tests/clients/constraints.txt

format: $(INSTALLED) ## format Python and C
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/clang-format -i predictor/kernels/csrc/*

docs: $(INSTALLED) ## write the pages that are made from the code, and build the site into build/site, strictly and offline
	@$(BIN)/python -m devtools.documentation
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

IMAGE_ARGS = --build-arg VERSION=$(VERSION) $(addprefix --build-arg REVISION=,$(REVISION)) $(BUILD_ARGS)

version: ## print the version that images of this commit have
	@echo $(VERSION)

images: ## build the images with docker, podman or buildah; TORCH_INDEX_URL=URL of torch's CPU builds, IMAGE_PREFIX, IMAGE_TAG
	@test -n "$(BUILDER)" || { echo "docker, podman or buildah is required"; exit 1; }
	@$(BUILDER) build $(IMAGE_ARGS) --file images/storage_initializer/Dockerfile --tag $(IMAGE_PREFIX)kserve-llm-storage-initializer:$(IMAGE_TAG) .
	@$(BUILDER) build $(IMAGE_ARGS) --file images/predictor/Dockerfile --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	  --tag $(IMAGE_PREFIX)kserve-llm-predictor:$(IMAGE_TAG) .
	@$(BUILDER) build $(IMAGE_ARGS) --file images/predictor/Dockerfile --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	  --target ray --tag $(IMAGE_PREFIX)kserve-llm-predictor-ray:$(IMAGE_TAG) .

images-check: $(INSTALLED) ## build, run and inspect every image; as root, with buildah and debootstrap
	@$(BIN)/hadolint images/*/Dockerfile
	@BUILD_IMAGES=storage_initializer,prepare,predictor,ray $(BIN)/python -m pytest tests/images

# `kustomize edit set image` would reformat the files and move their comments.
IMAGE_NAMES := kustomize/components/images/kustomization.yaml manifests/cluster/storage-container/kustomization.yaml \
  manifests/cluster/runtime/kustomization.yaml
DIGEST := [^ @]+@sha256:[0-9a-f]{64}
pinned = -e '/- name: $(1)$$/{n;s|: .*|: $(firstword $(subst @, ,$(2)))|;n;s|[a-zA-Z]*: .*|digest: $(lastword $(subst @, ,$(2)))|;}'

pin: ## pin the overlays' images: PREDICTOR=NAME@sha256:… STORAGE_INITIALIZER=NAME@sha256:… PREDICTOR_RAY=NAME@sha256:…, which is optional
	@echo '$(PREDICTOR) $(STORAGE_INITIALIZER) $(PREDICTOR_RAY)' | grep -qE '^$(DIGEST) $(DIGEST) ($(DIGEST))?$$' \
	  || { echo 'usage: make pin PREDICTOR=NAME@sha256:… STORAGE_INITIALIZER=NAME@sha256:… [PREDICTOR_RAY=NAME@sha256:…]'; exit 1; }
	@for file in $(IMAGE_NAMES); do \
	  text=$$(sed $(call pinned,kserve-llm-predictor,$(PREDICTOR)) \
	    $(call pinned,kserve-llm-storage-initializer,$(STORAGE_INITIALIZER)) \
	    $(if $(PREDICTOR_RAY),$(call pinned,kserve-llm-predictor-ray,$(PREDICTOR_RAY))) $$file) && echo "$$text" > $$file || exit 1; \
	done
	@$(MAKE) --no-print-directory render

RULE := manifests/monitoring/prometheus-rule.yaml

render: ## render every overlay into tests/kustomize/golden, and the rules into the PrometheusRule
	@rule=$$(sed '/^spec:/q' $(RULE); sed -e '/^#/d' -e 's/^./  &/' manifests/prometheus/rules.yaml) && echo "$$rule" > $(RULE)
	@for overlay in kustomize/overlays/*/; do \
	  golden=tests/kustomize/golden/$$(basename $$overlay).yaml; \
	  kubectl kustomize $$overlay > $$golden || exit 1; \
	  echo $$golden; \
	done

preflight: $(INSTALLED) ## check every overlay; CRD_DIR=folder validates custom resources too
	@for overlay in kustomize/overlays/*/; do \
	  $(BIN)/python -m preflight $$overlay $(if $(CRD_DIR),--crds $(CRD_DIR)) || exit 1; \
	done

undeploy: ## stop and delete OVERLAY=folder with kubectl; CLAIM=delete removes its claim with the weights too
	@kustomize/undeploy.sh "$(OVERLAY)" $(CLAIM)

changelog: $(INSTALLED) ## give the unreleased changes the version VERSION=… in CHANGELOG.md
	@$(BIN)/python -m devtools.release changelog $(VERSION)

release-dry-run: $(INSTALLED) ## make the release VERSION=… of this commit in a temporary clone: changelog, sdist, wheel, digests
	@$(BIN)/python -m devtools.release dry-run $(VERSION)

checkov: $(INSTALLED) ## scan the rendered prod overlay, in a separate virtual environment
	@test -x .venv-checkov/bin/checkov || { $(PYTHON) -m venv .venv-checkov && .venv-checkov/bin/python -m pip install --quiet checkov==3.3.30; }
	@$(BIN)/python -m pytest tests/kustomize/test_checkov.py

clean: ## remove everything generated, including the virtual environment and ./models
	@rm -rf $(VENV) $(CLIENTS) .kubectls .venv-checkov .venv-guidellm build dist models predictor/kernels/cpu/libnative.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
