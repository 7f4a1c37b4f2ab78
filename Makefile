# Everything a fresh clone needs, and what to do with it.
#
#   make demo     a board that learns, in the emulators of this machine
#   make test     the whole test suite (ARGS="-k layout" for a part)
#   make setup    only what those two need: packages, .venv, MicroPython for the emulated boards
#   make native-commit   the modules in firmware/native again, after the kernels' sources have changed
#
# What is built for the boards lies in $(CACHE), shared by all checkouts.

CACHE := $(abspath $(or $(ULEARN_CACHE),$(HOME)/.cache/ulearn))
VENV := .venv
export ULEARN_CACHE := $(CACHE)

# A Python that can make the environment and compile an extension: 3.11 or newer, venv, headers.
USABLE := import sys, os, sysconfig, venv, ensurepip; \
	sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)

DEBIAN := $(filter debian,$(shell . /etc/os-release 2>/dev/null && echo $$ID))
BOARDS = flock $(CACHE)/lock $(MAKE) --no-print-directory -f boards/build.mk CACHE=$(CACHE) VENV=$(abspath $(VENV))
EXTENSION := pyproject.toml $(wildcard setup.py ulab_kernels/*.c ulab_kernels/*.h)

.PHONY: setup demo test browser bench native native-all native-commit lint clean packages boards
.NOTPARALLEL:

setup: packages $(VENV)/.installed boards

demo: setup
	@$(VENV)/bin/ulearn demo $(ARGS)

# A file's tests share boards, so a file stays with one worker. With ARGS there is one process, which shows prints.
test: setup browser
	@$(VENV)/bin/python -m pytest tests $(or $(ARGS),-n auto --dist loadfile --durations 25)

bench: setup
	@$(VENV)/bin/python tests/bench.py $(ARGS)

ifdef DEBIAN
packages:
	@boards/debian_packages.sh $(if $(wildcard $(VENV)/.installed)$(PYTHON),,python3-venv python3-dev)

# What the tests look at the fleet's page with.
browser:
	@boards/debian_packages.sh chromium-headless-shell fonts-dejavu-core

boards: $(VENV)/.installed
	@mkdir -p $(CACHE) && $(BOARDS) all

native native-all native-commit: packages $(VENV)/.installed
	@mkdir -p $(CACHE) && $(BOARDS) $@
else
packages:
	@echo "not a Debian system: the emulated boards and the native modules cannot be built here;" \
		"for the Unix board, MicroPython is taken from ULEARN_MICROPYTHON or PATH"

boards browser native native-all native-commit:
endif

$(VENV)/.installed: $(EXTENSION)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv and headers: name one with PYTHON=" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ulearn into $(VENV) (about 1 min)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(VENV)/.installed
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy host

clean:
	rm -rf $(VENV) build dist *.egg-info host/*.egg-info firmware/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "the boards' builds are kept in $(CACHE)"
