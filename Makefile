# make lab        set up and open JupyterLab on the notebooks
# make test       set up and run all the tests
# make notebooks  run all the notebooks without a window; the files in the repository stay as they are
# make check      lint and types
# make docs       the site: these pages, the notebooks and the API reference, into build/docs/index.html
# make bench      measure all stores beside the bare drivers and what else you could take: about ten minutes
#                 (make bench BENCH_OPTIONS=--quick: three minutes, written to build/benchmarks)
# make PYTHON=/path/to/python3.13 ...   to choose the interpreter yourself

SHELL := /bin/sh
BIN := .venv/bin
ELSEWHERE := /opt/homebrew/bin/python3 /usr/local/bin/python3
# Bytecode is kept, also where the machine says otherwise, as many containers do. `make test` starts hundreds of Pythons,
# and each of them would compile the drivers again, for half a second.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: lab test notebooks check docs bench clean

# A token may travel between the notebook and its kernel: so that is encrypted, where the kernel can.
ENCRYPTED := --KernelManager.transport_encryption=auto

# The settings in .jupyter keep JupyterLab from asking at its first start whether to fetch news. Only this start uses them:
# an overrides.json in the environment would be lost with the environment.
SETTINGS := JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}"

# Root has to be allowed by name: in a container one often is.
lab: .venv/all
	$(SETTINGS) $(BIN)/jupyter lab $(ENCRYPTED) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $$([ "$$(id -u)" -ne 0 ] || echo --allow-root) $(LAB_OPTIONS)

# Four processes, because most tests wait for something; a class or a notebook stays in one of them.
test: .venv/dev
	$(BIN)/python -m pytest tests notebooks --nbval --nbval-current-env -n 4 --dist loadscope --no-loadscope-reorder $(PYTEST_OPTIONS)

# Jupyter and matplotlib keep files in the home folder: here that is a temporary one.
notebooks: .venv/all
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && HOME=$$folder \
		$(BIN)/jupyter nbconvert --log-level=WARN $(ENCRYPTED) --to notebook --execute --output-dir "$$folder" notebooks/*.ipynb && \
		echo "All notebooks ran: $$(cd notebooks && ls *.ipynb | tr '\n' ' ')"

# A broken link is a warning, and a warning is an error. Nothing is executed: notebooks are shown with their outputs.
docs: .venv/dev
	@rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx --quiet --fail-on-warning --conf-dir docs --doctree-dir build/doctrees . build/docs
	@echo "The site is in build/docs/index.html"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python -m benchmarks $(BENCH_OPTIONS)

# One stamp a set of packages, made again when pyproject.toml changes. `dev` holds all of `all`. Compiling the packages
# while they are installed takes longer than compiling what is used when it is used. Of pycurl the wheel is wanted, for
# the library in it: where none fits, one line says so, in place of a compiler's many.
.venv/dev .venv/all: pyproject.toml | .venv/bin/python
	@echo "Installing the packages into .venv: about a minute the first time."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --only-binary pycurl --editable ".[$(@F)]" || { \
		echo "The packages could not be installed: see the lines above. With a network or a package index in reach, run make again." >&2; \
		exit 1; }
	@touch $@ .venv/all

# An interpreter that the tests run on, else the first that is newer. The default python3 is often older.
.venv/bin/python:
	@found=; for candidate in "$(PYTHON)" python3.13 python3.12 "$$HOME"/.pyenv/versions/3.1[32].*/bin/python \
		python3 python python3.14 "$$HOME"/.pyenv/versions/3.*/bin/python "$$(command -v uv >/dev/null 2>&1 && uv python find '>=3.12' 2>/dev/null)" \
		$(ELSEWHERE); do \
		if [ -n "$$candidate" ] && "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; \
		then found=$$candidate; break; fi; done; \
	if [ -z "$$found" ]; then \
		echo "No Python 3.12 or newer with venv was found. Install one (python.org, 'uv python install 3.13', 'pyenv install 3.13'," \
			"on Debian and Ubuntu with python3-venv) or name one: make PYTHON=/path/to/python3.13" >&2; exit 1; fi; \
	rm -rf .venv && "$$found" -m venv .venv || { rm -rf .venv; \
		echo "$$found could not make the environment .venv: see the lines above." >&2; exit 1; }

clean:
	rm -rf .venv
