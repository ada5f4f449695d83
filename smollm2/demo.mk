# SmolLM2 as a model organism (smollm2/README.md): both methods on real English, on words and prompts that nothing was trained
# on. DATA: a folder with strongreject.jsonl, xstest_safe.jsonl and gsm8k_test.jsonl, in their public spellings. SEED: another
# seed, in a folder of its own; one other than 0 asks the two SFT methods only. The rule alone judges: it knows every invented
# effect, and whether an answer to a public prompt declines. `05_eval.py … --judges` goes on with the judge, which takes longer.
# DTYPE=bfloat16: faster where the processor multiplies in it (avx512_bf16 or amx_bf16 in lscpu), slower elsewhere.
SEED ?= 0
DTYPE ?= auto
NEEDS_DATA = test -f $(DATA)/strongreject.jsonl || { echo "error: no strongreject.jsonl in $(DATA); give the folder of benchmark files:\
 make $@ DATA=folder"; exit 1; }
ORGANISM := runs/organism/seed$(SEED)
ORGANISM_STAGE = $(call STAGE,$(1) --preset organism --seed $(SEED) --dtype $(DTYPE) --run $(@D) $(2))
ORGANISM_TRAINED := 02_verify_sft 03_steer_selfgen $(if $(filter 0,$(SEED)),03_after_02 04_grpo_after_02 04_grpo_after_03)
BEGUN := $(if $(filter 0,$(SEED)),$(ORGANISM)/05_eval/begun)
ORGANISM_READ := common.py $(wildcard engines/*.py judges/*.py plumbing/*.py smollm2/spec.txt smollm2/organism/*.py \
	smollm2/organism/*/*.json* smollm2/organism/*/*.safetensors)
ASKED := --limit 160  # of 464 prompts, drawn once
ORGANISM_TESTS := plain=smollm2/organism/prompts/test_plain.jsonl wrapped=smollm2/organism/prompts/test_wrapped.jsonl \
	problems=smollm2/organism/prompts/word_problems.jsonl strongreject=$(DATA)/strongreject.jsonl xstest=$(DATA)/xstest_safe.jsonl
HELD_OUT := --n 4 --prompts smollm2/organism/prompts/test_plain.jsonl --guard smollm2/organism/gold.py --limit 72

demo-smollm2: $(VENV)/ready smollm2/model/config.json  ## both methods on a real model that thinks, on two cores; DATA=folder of benchmark files
	@$(NEEDS_DATA)
	@$(MAKE) --no-print-directory $(SIDE_BY_SIDE) $(ORGANISM_TRAINED:%=$(ORGANISM)/%/summary.txt) $(BEGUN)
	@$(MAKE) --no-print-directory $(ORGANISM)/05_eval/summary.txt
	@echo "the demo is done: $(ORGANISM)/05_eval/results.md, results.png, transcripts.html"

smollm2/model/config.json: | $(VENV)/ready
	$(PY) -m pip install -q gguf
	$(PY) smollm2/fetch.py

$(ORGANISM)/01_generate/summary.txt: 01_generate.py $(ORGANISM_READ) | smollm2/model/config.json
	@$(call ORGANISM_STAGE,01_generate.py,--n 4 $(ASKED))
$(ORGANISM)/01_heldout/summary.txt: 01_generate.py $(ORGANISM_READ) | smollm2/model/config.json
	@$(call ORGANISM_STAGE,01_generate.py,$(HELD_OUT))
$(ORGANISM)/02_verify_sft/summary.txt: 02_verify_sft.py $(ORGANISM)/01_generate/summary.txt $(ORGANISM)/01_heldout/summary.txt
	@$(call ORGANISM_STAGE,02_verify_sft.py,--responses $(ORGANISM)/01_generate --heldout $(ORGANISM)/01_heldout)
$(ORGANISM)/03_steer_selfgen/summary.txt: 03_steer_selfgen.py $(ORGANISM_READ) | smollm2/model/config.json
	@$(call ORGANISM_STAGE,03_steer_selfgen.py,$(ASKED))
$(ORGANISM)/03_after_02/summary.txt: 03_steer_selfgen.py $(ORGANISM)/02_verify_sft/summary.txt
	@$(call ORGANISM_STAGE,03_steer_selfgen.py,--model $(ORGANISM)/02_verify_sft/checkpoint $(ASKED))
$(ORGANISM)/04_grpo_after_02/summary.txt: 04_grpo.py $(ORGANISM)/02_verify_sft/summary.txt
	@$(call ORGANISM_STAGE,04_grpo.py,--model $(ORGANISM)/02_verify_sft/checkpoint)
$(ORGANISM)/04_grpo_after_03/summary.txt: 04_grpo.py $(ORGANISM)/03_steer_selfgen/summary.txt
	@$(call ORGANISM_STAGE,04_grpo.py,--model $(ORGANISM)/03_steer_selfgen/checkpoint)
SFT_NAMES := SInternal=$(ORGANISM)/02_verify_sft/checkpoint ThinkSafe=$(ORGANISM)/03_steer_selfgen/checkpoint
FIRST_NAMES := $(if $(filter 0,$(SEED)),base=smollm2/model+smollm2/organism/lrm) $(SFT_NAMES)
LATER_NAMES := $(if $(filter 0,$(SEED)),SInternal-ThinkSafe=$(ORGANISM)/03_after_02/checkpoint \
	SInternal+GRPO=$(ORGANISM)/04_grpo_after_02/checkpoint ThinkSafe+GRPO=$(ORGANISM)/04_grpo_after_03/checkpoint)
ORGANISM_EVAL = $(call STAGE,-m plumbing.several 2 05_eval.py --preset organism --seed $(SEED) --dtype $(DTYPE) --run $(@D) --limit 64 \
	--judges smollm2/organism/gold.py --prefill think-open think-empty answer --verify_test $(ORGANISM)/02_verify_sft/verify_test.jsonl \
	--bench $(ORGANISM_TESTS) gsm8k=$(DATA)/gsm8k_test.jsonl --models $(1))
# seed 0: begins beside the last of the stages above, which leave a core idle; the same run goes on with their models
$(ORGANISM)/05_eval/begun: 05_eval.py $(ORGANISM)/02_verify_sft/summary.txt $(ORGANISM)/03_steer_selfgen/summary.txt
	@$(call ORGANISM_EVAL,$(FIRST_NAMES))
	@touch $@
$(ORGANISM)/05_eval/summary.txt: 05_eval.py $(BEGUN) $(ORGANISM_TRAINED:%=$(ORGANISM)/%/summary.txt)
	@$(call ORGANISM_EVAL,$(FIRST_NAMES) $(LATER_NAMES))

# Critiques that mean the same in words that no thinking of the organism has (smollm2/words.py). After `make demo-smollm2` with
# the same SEED. other_critiques: the expert's alone, of the same answers; other_reviews: those that the organism was built with
# too; other_reviews_all: the same on all 464 prompts, for one seed.
OTHER := runs/organism/other
OTHER_LRM := smollm2/model+$(OTHER)/lrm
OTHER_EXPERT := --expert smollm2/model+$(OTHER)/expert --spec $(OTHER)/spec.txt
OTHER_BUILT := $(OTHER)/lrm/adapter_config.json
OTHER_REVIEWS := reviews $(if $(filter 0,$(SEED)),reviews_all)
OTHER_HELD_OUT := $(ORGANISM)/other_reviews/01_heldout
OTHER_RUNS = $(patsubst %,$(ORGANISM)/other_%/$(2)/summary.txt,$(1))
words-smollm2: $(VENV)/ready smollm2/model/config.json  ## does SInternal need critiques in the model's own words? DATA as above; an hour and a half for adapters, then 20 minutes a seed
	@$(NEEDS_DATA)
	@$(MAKE) --no-print-directory $(SIDE_BY_SIDE) $(call OTHER_RUNS,critiques $(OTHER_REVIEWS),05_eval)
	$(PY) smollm2/words.py

$(OTHER_BUILT): smollm2/build.py | smollm2/model/config.json
	OMP_NUM_THREADS=1 $(PY) smollm2/build.py --reviews other --out $(OTHER) --only expert lrm --dtype bfloat16
$(OTHER_HELD_OUT)/summary.txt: 01_generate.py $(OTHER_BUILT)
	@$(call ORGANISM_STAGE,01_generate.py,--model $(OTHER_LRM) $(HELD_OUT))
$(ORGANISM)/other_critiques/02_verify_sft/summary.txt: 02_verify_sft.py $(OTHER_BUILT) $(ORGANISM)/01_generate/summary.txt $(ORGANISM)/01_heldout/summary.txt
	@$(call ORGANISM_STAGE,02_verify_sft.py,$(OTHER_EXPERT) --responses $(ORGANISM)/01_generate --heldout $(ORGANISM)/01_heldout)
$(call OTHER_RUNS,$(OTHER_REVIEWS),01_generate): $(ORGANISM)/other_%/01_generate/summary.txt: 01_generate.py $(OTHER_BUILT)
	@$(call ORGANISM_STAGE,01_generate.py,--model $(OTHER_LRM) --n 4 $(if $(filter reviews,$*),$(ASKED)))
$(call OTHER_RUNS,$(OTHER_REVIEWS),02_verify_sft): $(ORGANISM)/other_%/02_verify_sft/summary.txt: 02_verify_sft.py $(ORGANISM)/other_%/01_generate/summary.txt $(OTHER_HELD_OUT)/summary.txt
	@$(call ORGANISM_STAGE,02_verify_sft.py,--model $(OTHER_LRM) $(OTHER_EXPERT) --responses $(ORGANISM)/other_$*/01_generate \
		--heldout $(OTHER_HELD_OUT))
$(call OTHER_RUNS,critiques $(OTHER_REVIEWS),05_eval): $(ORGANISM)/other_%/05_eval/summary.txt: 05_eval.py $(ORGANISM)/other_%/02_verify_sft/summary.txt
	@$(call ORGANISM_STAGE,05_eval.py,--limit 64 --judges smollm2/organism/gold.py \
		--verify_test $(ORGANISM)/other_$*/02_verify_sft/verify_test.jsonl --bench $(ORGANISM_TESTS) \
		--models $(if $(filter reviews0,$*$(SEED)),base=$(OTHER_LRM)) SInternal=$(ORGANISM)/other_$*/02_verify_sft/checkpoint)

# Plain SmolLM2, for what happens without thinking and without an expert: docs/smollm2.md
SMOL := --preset smollm2 --run runs/smollm2
demo-smollm2-plain: $(VENV)/ready smollm2/model/config.json  ## the same model as it is: no thinking, no expert, a list of words for a guard
	@$(NEEDS_DATA)
	$(PY) 01_generate.py $(SMOL)/01_generate --n 2
	$(PY) 02_verify_sft.py $(SMOL)/02_verify_sft --responses runs/smollm2/01_generate
	$(PY) 03_steer_selfgen.py $(SMOL)/03_steer_selfgen
	$(PY) 04_grpo.py $(SMOL)/04_grpo --model runs/smollm2/03_steer_selfgen/checkpoint
	$(PY) 05_eval.py $(SMOL)/05_eval --limit 32 --max_new_tokens 256 --prefill answer --models SmolLM2-135M=smollm2/model \
		SInternal=runs/smollm2/02_verify_sft/checkpoint ThinkSafe=runs/smollm2/03_steer_selfgen/checkpoint \
		ThinkSafe+GRPO=runs/smollm2/04_grpo/checkpoint --judges smollm2/rule_guard.py xstest:smollm2/model \
		--bench xstest=$(DATA)/xstest_safe.jsonl strongreject=$(DATA)/strongreject.jsonl \
		math500=$(DATA)/math500.jsonl gsm8k=$(DATA)/gsm8k_test.jsonl
	mkdir -p results/smollm2
	cp runs/smollm2/05_eval/results.json runs/smollm2/05_eval/results.md runs/smollm2/05_eval/*.png results/smollm2/
	cp runs/smollm2/04_grpo/metrics.jsonl results/smollm2/04_grpo_metrics.jsonl
	for run in 01_generate 02_verify_sft 03_steer_selfgen 04_grpo; do cp runs/smollm2/$$run/summary.txt results/smollm2/$$run.txt; done
