# make demo   sets up, trains MAPPO and HATRPO on vmas/balance, ends in their report: a table and learning curves
# make test   sets up, runs the tests but for the slow ones, about five minutes on two cores
# make figures draws the pictures of the documentation, from data in docs/results, but for the animations
# make report draws them, and writes the study's tables into the pages, from the runs in docs/results
# make animations trains HATRPO on two tasks, ten minutes on two cores, and draws an episode of each (needs OpenGL)
# make test-gpu runs the tests of what a GPU does, on one where there is one, else on a simulated one (tests/simcuda)
# make check  runs the slow tests (further algorithms, tasks and processes), make test-gpu, make docs and make lint
# make matrix runs every algorithm on every task and model, and all combinations of keys; writes docs/matrix.md
# make docs   builds the documentation into docs/_build, offline; a warning or a link to nowhere is an error
# make study  runs what is missing of benchmarks/study/plan.yaml, JOBS runs at a time; hours
# make lint   ruff check and format check, pyright on the package
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The demo: 40 iterations of 6000 frames for each algorithm and seed. Algorithm and settings were chosen on seeds 0 to 2.
DEMO_FRAMES ?= 240000
DEMO_SEEDS ?= 10,11,12
DEMO_FOLDER ?= outputs/demo
# The runs of the demo and of the study take one thread each: JOBS of them at a time.
JOBS ?= 2

.PHONY: demo test test-gpu check figures report animations matrix docs study lint clean

demo: $(VENV)/.installed-vmas
	rm -rf $(DEMO_FOLDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarl.run -m hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) \
		algorithm=mappo,hatrpo seed=$(DEMO_SEEDS) task=vmas/balance experiment=vmas_laptop \
		experiment.max_n_frames=$(DEMO_FRAMES) experiment.evaluation_interval=24000 \
		'model.num_cells=[64,64]' 'critic_model.num_cells=[64,64]' hydra.sweep.dir=$(DEMO_FOLDER) > /dev/null
	$(BIN)/python -m benchmarl_trust.report $(DEMO_FOLDER)
	@echo "Equal settings, small networks, nothing tuned by algorithm. HATRPO was chosen on seeds 0 to 2: 45.6 at the end, MAPPO 38.3."
	@echo "This says nothing of other tasks, larger networks or longer runs."

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m gpu --simcuda

check: lint docs test-gpu
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

figures: $(VENV)/.installed-vmas
	$(BIN)/python docs/figures.py

report: figures
	$(BIN)/python benchmarks/study/pages.py

animations: $(VENV)/.installed-vmas
	$(BIN)/python docs/figures.py --animate

study: $(VENV)/.installed-study
	$(BIN)/python benchmarks/study/run.py --jobs $(JOBS)

matrix: $(VENV)/.installed-test
	$(BIN)/python -W ignore tests/matrix.py

docs: $(VENV)/.installed-test
	$(BIN)/python -m sphinx -q -E -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo docs/_build/html/index.html

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) outputs multirun dist build docs/_build

# Editable installs with versions that are known to work together (constraints.txt).
$(VENV)/.installed-vmas: EXTRAS = vmas,report,sweep
$(VENV)/.installed-test: EXTRAS = test
$(VENV)/.installed-study: EXTRAS = vmas,report,mamujoco,smax
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
