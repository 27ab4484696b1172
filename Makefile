# The commands of CONTRIBUTING.md by name; `make help` lists them.

.PHONY: help check test newest slow gpu llama neighbours demo bench docs

help:                                         ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'
check:                                        ## style and types
	source scripts/environment.sh dev && ruff check && ruff format --check && mypy
test:                                         ## what CI runs
	bash scripts/test.sh
newest:                                       ## the tests with the newest release of every dependency
	bash scripts/test_newest.sh
slow:                                         ## tests that take minutes
	bash scripts/test.sh -m slow
gpu:                                          ## tests that need CUDA
	bash scripts/test.sh -m gpu
llama:                                        ## GGUF files in llama.cpp itself
	bash scripts/test_llama_cpp.sh
neighbours:                                   ## the recipes for other libraries, with the real packages
	bash scripts/test_neighbours.sh
demo:                                         ## train short, test long, in six minutes
	bash scripts/demo.sh
bench:                                        ## one attention call beside PyTorch's, two minutes
	source scripts/environment.sh train && OMP_WAIT_POLICY=passive hf_alibi benchmark attention \
		--backends sdpa --lengths 1024 4096 --max_dense_length 1 --measure_memory False
docs:                                         ## draws the pictures of the docs again
	source scripts/environment.sh train && python docs/images/draw.py

SHELL := bash
