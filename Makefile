# Shortcuts for the environment that is active: pip install -c constraints.txt -e '.[test,docs]'
.PHONY: help test test-fast lint format docs serve refresh ci

help:       ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/  -/'

test:       ## run every test, on two processes
	python -m pytest -n 2

test-fast:  ## run the tests that are not marked slow
	python -m pytest -n 2 -m "not slow"

lint:       ## check style, formatting, types and spelling
	ruff check .
	ruff format --check .
	mypy
	codespell

format:     ## apply the style and the formatting that lint checks
	ruff check --fix .
	ruff format .

docs:       ## build the manual as a site, in site/
	python -m mkdocs build --strict

serve:      ## serve the manual on localhost and rebuild it on changes
	python -m mkdocs serve

refresh:    ## run the commands that the manual shows and insert their output
	python docs/stubs.py
	python docs/refresh.py
	python docs/registry.py

ci:         ## run everything that CI runs, in a fresh environment
	bash .ci/run
