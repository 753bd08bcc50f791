# Two commands do everything on a fresh machine (python3.11, git, make): `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: setup demo test quick claim lint check app shipped browser vllm ray slurm slow tables paper real clean

# Experiments of analyses/RESULTS.md whose analyses read runs and nothing else.
PAPER := $(foreach carrier,numbers code reasoning text,$(foreach family,animals trees tempers,menagerie-$(carrier)-$(family))) \
  $(addprefix menagerie-,in-context matrix factors potency)
PAPER_ANALYSES := carriers matrix factors digits potency

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## the main job on the embedded base: prints the result, writes runs/demo/report.html
	$(BIN)/mechlens run configs/experiments/demo.yaml --out runs/demo

PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup  ## the tests, in minutes; a file's tests share what they make, so files are what the cores share out
	$(PYTEST)

quick: check  ## lint, format, types and the tests that take 90 s together, for every change
	$(PYTEST) --quick

claim: setup  ## a small demo, in two minutes: a trait travels to the teacher's base and to no other
	$(BIN)/pytest -m slow tests/test_end_to_end.py -k small_demo

lint: setup  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint  ## lint, format and types
	$(BIN)/pyright --pythonpath $(BIN)/python  # the environment's packages, whichever is active

slow: setup  ## tests that train for many minutes: kills at random moments, the demo's own claims
	$(BIN)/pytest -m slow

browser: setup  ## the explorer in a real browser (Debian's chromium); screenshots in build/screenshots
	$(BIN)/pytest -m browser

vllm: setup  ## generation by vLLM: MECHLENS_VLLM=VENV/bin/python names the environment that has it (minutes, 4 GB)
	$(BIN)/pytest -m vllm

ray: setup  ## jobs on a Ray cluster of two nodes on this machine, of which some are killed (minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
	$(BIN)/pytest -m ray

slurm: setup  ## `mechlens submit` by submitit's local executor, jobs of which are interrupted (minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[slurm]'
	$(BIN)/pytest -m slurm

tables: setup  ## remake the development and held-out animals' tables (about an hour on 2 cores)
	$(BIN)/mechlens run menagerie-animals
	$(BIN)/mechlens run menagerie-animals-heldout

# Not in it: `make tables`; benches (`mechlens bench NAME`); alignment.py (needs `mechlens measure` of each arm of menagerie-potency);
# interventions.py, treatments.py, init_distance.py and poisoned.py, which train students of their own; real_data.py, whose data are not
# shipped; speed.py and lens_speed.py, which want a quiet machine.
paper: setup  ## run the experiments of RESULTS.md and write their parts of it (many hours on 2 cores; stop it, run it again: it goes on)
	for config in $(PAPER); do $(BIN)/mechlens run $$config || exit; done
	for name in $(PAPER_ANALYSES); do $(BIN)/python analyses/$$name.py --write || exit; done
	$(BIN)/python analyses/results.py

real: setup  ## a real model: fetch SmolLM2-135M, run its experiment with soft and sampled labels (about 70 minutes on 2 cores; stop it, run it again: it goes on)
	$(BIN)/mechlens fetch smollm2-135m-moved
	$(BIN)/mechlens run smollm2-animals-numbers-soft

app: setup  ## look at runs in the browser
	$(BIN)/mechlens app

shipped: setup  ## refresh the run and the audits that come with the explorer from runs/demo (no weights), and the pages
	$(BIN)/mechlens measure runs/demo
	rm -rf app/demo && mkdir app/demo
	cd runs/demo && cp --parents spec.yaml manifest.json summary.json report.html readings.json *.parquet readings/*.parquet selection/*.parquet \
	  corpora/*/generated/generation.json corpora/*/screened/*.parquet corpora/*/screened/funnel.json ../../app/demo
	$(BIN)/python analyses/shipped_audits.py runs/demo
	$(BIN)/python analyses/results.py

clean:
	rm -rf .venv runs models
