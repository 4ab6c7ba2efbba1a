# Everything runs in a virtual environment of the course's own, .venv, which is made on first use.
# On Windows, or to use conda: see README.md.
VENV    ?= .venv
DATA    ?= critters
BUDGET  ?=
SEEDS   ?=
JOBS    ?=
TABLES  ?=
OUT     ?=
VOC_ROOT ?=
NOTEBOOKS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
HANDOUT_ARGS ?=

# The first Python that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
  "$$p" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null && echo "$$p" && break; done)

ifeq ($(OS),Windows_NT)
PY := $(VENV)/Scripts/python.exe
else
PY := $(VENV)/bin/python
endif
READY := $(VENV)/drs-ready

RUN_ARGS := --data "$(DATA)" $(if $(VOC_ROOT),--voc-root "$(VOC_ROOT)") $(if $(BUDGET),--budget $(BUDGET)) \
  $(if $(SEEDS),--seeds $(SEEDS))
COURSE_ARGS := $(RUN_ARGS) $(if $(JOBS),--jobs $(JOBS)) $(if $(TABLES),--tables $(TABLES)) \
  $(if $(OUT),--out "$(OUT)")

# tools/jupyter lets uploads over ten megabytes arrive, so that the lab can say that they are too large.
JUPYTER = DRS_STORE="$(or $(DRS_STORE),$(CURDIR)/runs)" JUPYTER_CONFIG_PATH="$(CURDIR)/tools/jupyter"

.PHONY: help course test lab lab-page figures notebooks check-course handout slides site check-links reference weights bench \
  lint env crf clean-env

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Settings of make course: DATA=critters|voc VOC_ROOT=folder BUDGET=ci|laptop|paper|release OUT=folder SEEDS=\"0 1 2\" JOBS=n TABLES=\"1 2\""

course: $(READY) ## run Tables 1-4, print them beside the paper's, write results/ (tables and figures)
	$(PY) -m drs_course tables $(COURSE_ARGS)

test: $(READY) ## run the whole test suite
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lab: $(READY) ## open JupyterLab in this folder
	$(JUPYTER) $(PY) -m jupyterlab

lab-page: $(READY) ## show the labs, the pages with sliders, as one page without code
	$(JUPYTER) $(PY) -m voila notebooks/lab.ipynb

figures: $(READY) ## draw figures/, which README and notebooks show, from the stored runs
	$(PY) -m drs_course figures $(RUN_ARGS)

notebooks: $(READY) ## run all notebooks and store their outputs in them
	$(PY) tools/notebooks.py run

check-course: $(READY) ## run all notebooks as tests at the laptop budget, against the reference results
	DRS_BUDGET=laptop $(PY) -m pytest notebooks

handout: $(READY) ## write handout/: student notebooks and their zip, solutions apart (NOTEBOOKS="01 02" for some)
	$(PY) tools/handout.py $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS)) $(HANDOUT_ARGS)

slides: $(READY) ## write the deck of twenty minutes, site/html/slides, from the stored outputs
	$(PY) tools/slides.py

site: $(READY) ## build the course and the slides as a website, site/html, from the stored outputs
	$(PY) -c "import shutil; shutil.rmtree('site', ignore_errors=True)"
	$(PY) -m sphinx -q -n -W --keep-going -c docs -d site/doctrees . site/html
	@echo "Open site/html/index.html."

check-links: site ## build the site and check every link within it
	$(PY) docs/check_links.py site/html

reference: $(READY) ## measure the committed reference results again, three seeds (50 minutes)
	$(PY) -m drs_course reference --seeds $(or $(SEEDS),0 1 2)

weights: $(READY) ## train the committed Critters weights again
	$(PY) -m drs_course pretrain

bench: $(READY) ## time a training step with and without DRS, localization maps, the CRF and the labs (30 minutes)
	$(PY) benchmarks/step.py $(BENCH_ARGS)
	$(PY) benchmarks/maps.py
	$(PY) benchmarks/crf.py
	$(PY) benchmarks/labs.py

lint: $(READY) ## check the code's style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

env: $(READY) ## only make the environment

crf: $(READY) ## try again to build the optional CRF package
	$(PY) tools/make_env.py --venv "$(VENV)" --retry-crf

clean-env: ## delete the environment
	@$(or $(PYTHON),python3) tools/make_env.py --venv "$(VENV)" --remove

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed and none was found on the PATH." \
	  "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" tools/make_env.py --venv "$(VENV)"
