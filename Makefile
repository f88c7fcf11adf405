# The list of commands. Each does whatever set-up it needs.
#   make setup   build .venv            make test     run all tests
#   make up      run the whole suite    make check    lint, types, laws, protos
#   make protos  regenerate gen/        make bench NAME=spine
#   make native  compile the native step of the engine (a part of setup, if there is a compiler)
#
# Variables: PYTHON (default python3), CUDA=1 (GPU build of torch, triton), ARGS (passed on),
# JOBS (test processes; default one per core, 4 at most; 0 for none beside pytest itself).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NAME   ?= spine
JOBS   ?= auto
ARGS   ?=
SOURCES := services bench tests examples

.PHONY: setup native model up test check lint types laws protos protos-check bench clean

setup: $(VENV)/.ready
	@$(BIN)/python -m services.worker.native.build --optional

native: $(VENV)/.ready
	$(BIN)/python -m services.worker.native.build

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[all$(if $(CUDA),$(comma)gpu)]" --group dev
	touch $@

comma := ,

model: setup
	$(BIN)/calumma model pull

up: setup
	$(BIN)/calumma up $(ARGS)

# Files are handed out whole, so that a module's fixtures are made once, and in the order of their
# names: the long ones first, the many small unit tests last.
test: model
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

check: lint types laws protos-check

lint: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: setup
	$(BIN)/mypy
	$(BIN)/pyright

laws: setup
	$(BIN)/lint-imports

protos: setup
	rm -rf .cache/gen && mkdir -p .cache/gen gen
	$(call protoc,.cache/gen)
	rm -rf gen/calumma && mv .cache/gen/calumma gen/calumma

# Lint, drift of the committed stubs, and compatibility with what main has.
protos-check: setup
	$(BIN)/buf lint
	rm -rf .cache/gen && mkdir -p .cache/gen
	$(call protoc,.cache/gen)
	diff -r -x __pycache__ .cache/gen/calumma gen/calumma
	@if git cat-file -e main:buf.yaml 2>/dev/null; then $(BIN)/buf breaking --against '.git#branch=main'; \
	else echo "no main branch with protos here: nothing to compare with"; fi

bench: setup
	$(BIN)/python -m bench $(NAME) $(ARGS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache

define protoc
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos \
		--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
		$$(find protos -name '*.proto' | sort)
endef
