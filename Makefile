# make demo: the main job on a fresh machine.  make test: lint, types, tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean
install: $(VENV)/.installed

# A failed installation leaves no stamp, so the next call starts it again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	@start=$$(date +%s); \
	$(BIN)/python -m peftlab compare movie-sentiment \
		--recipes full,freeze-top2,lora,ptuning-v2 --seeds 3; code=$$?; \
	echo "wall time after installation: $$(($$(date +%s) - start)) s"; exit $$code

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
