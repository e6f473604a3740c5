PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DEMO := demo-run

.PHONY: demo test slow lint docs env clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpa4 needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tensorboard,dev]'
	touch $(STAMP)

# Train a small potential on the bundled data, evaluate it, run molecular dynamics. For systems as small as these a
# second thread gains nothing, and costs a lot when another program is running.
demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/dpa4 train examples/organic/run.yaml --set output=$(DEMO)/training
	$(BIN)/dpa4 eval $(DEMO)/training/best.safetensors examples/organic/test.xyz --output $(DEMO)/evaluation
	$(BIN)/dpa4 relax $(DEMO)/training/best.safetensors examples/organic/ethanol.xyz --output $(DEMO)/relax
	$(BIN)/dpa4 md $(DEMO)/training/best.safetensors $(DEMO)/relax/relaxed.xyz --output $(DEMO)/md \
	    --ensemble nve --temperature 600 --timestep 0.5 --steps 2000
	@echo
	@echo "Done. In $(DEMO)/:"
	@echo "  training/    best.safetensors (the model), learning_curve.png, train.csv, valid.csv"
	@echo "  evaluation/  error table, parity plots, predictions of the held-out structures"
	@echo "  relax/       ethanol relaxed with the model"
	@echo "  md/          trajectory, thermo table and plot of 1 ps of molecular dynamics"

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# HTML pages, in build/html
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/html

clean:
	rm -rf .venv $(DEMO)
