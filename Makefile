# Everything happens in .venv, made on first use and mended when pyproject.toml changes. PYTHON=… names another Python.

.PHONY: test demo install lint bench clean
.DELETE_ON_ERROR:

PYTHON ?=

test: .venv/developed lint
	.venv/bin/python -m pytest

lint: .venv/developed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

demo: .venv/installed
	.venv/bin/cdc demo

install: .venv/installed

bench: .venv/developed
	.venv/bin/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The first Python of 3.11 or later on the PATH that really runs: what stands there may be a shim without anything behind.
define FIND_PYTHON
suits() { "$$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
find_python() { \
    IFS=:; places=$$PATH:/usr/local/bin:/usr/bin; \
    for name in python3.13 python3.12 python3.11 python3.14 python3 python; do \
        for directory in $$places; do \
            if suits "$$directory/$$name"; then echo "$$directory/$$name"; return; fi; \
        done; \
    done; \
    echo "no python 3.11 or later found: install one, or name it: make PYTHON=/path/to/python3" >&2; \
    return 1; \
}; \
python='$(PYTHON)'; \
[ -n "$$python" ] || python=$$(find_python)
endef

# Where Python comes without ensurepip, as Debian's does, its own pip fills the environment.
.venv/made:
	@set -e; $(FIND_PYTHON); echo "making .venv with $$python"; \
	"$$python" -m venv --clear .venv >/dev/null 2>&1 || { \
	    "$$python" -m venv --clear --without-pip .venv && \
	    "$$python" -m pip --python .venv/bin/python install --quiet pip; \
	}
	.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

.venv/installed: pyproject.toml | .venv/made
	PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --editable '.[all]'
	@touch $@

.venv/developed: pyproject.toml .venv/installed | .venv/made
	.venv/bin/python -m pip install --quiet --group dev
	@touch $@
