"""What a reader of the lesson need not read: rows on disk, run folders, prompt files, presets,
names.

Imports nothing of the house; everything else may import it. `import plumbing` has what stages
use."""

import gc
import sys

from plumbing.process import fail, gather_all, processes, run_stage, stop_on_interrupt

if (sys.modules["__main__"].__doc__ or "").startswith("Stage"):  # what follows takes seconds
    stop_on_interrupt()
    gc.disable()  # until its end: imports make no garbage, and looking for it was an eighth of them

from plumbing.benchmarks import BENCHMARKS, load_benchmark, load_benchmarks
from plumbing.checks import require_both_labels, require_free_names, require_texts
from plumbing.checks import require_unseen
from plumbing.figures import write_evaluation
from plumbing.loading import choose_dtype, load_whole, save_weights
from plumbing.models import dry_config, dry_tokenizer, require_model, require_trained, unloaded
from plumbing.names import base_and_adapter, base_of, content_of, context_of, file_label
from plumbing.names import fingerprint, is_endpoint, load_rule, local_name, model_config, name_pairs
from plumbing.names import tokenizer_source
from plumbing.options import ALL_LINEAR, PRESETS, parse_options
from plumbing.progress import grpo_history, log_check, log_grpo_step, open_accelerator
from plumbing.progress import bar_over, one_bar, require_trackers
from plumbing.prompts import KINDS, chat_text, fill, kind_of, mixture
from plumbing.prompts import load_held_out, load_with_boundary
from plumbing.prompts import load_prompts, prompt_rows, read_source, read_template
from plumbing.proof import Proof, holds, say_slower
from plumbing.recipe import evaluation_recipe, require_same_inputs, timed
from plumbing.rows import (
    append_jsonl,
    cut_line,
    drop_steps,
    is_cut,
    once_per_row,
    read_jsonl,
    reopen_jsonl,
)
from plumbing.rows import write_atomic, write_jsonl
from plumbing.runs import KIND, counted, is_finished, options_of, read_stage_01
from plumbing.runs import gather, load_state, open_run, save_state, show_plan
from plumbing.runs import state_saved_if_it_ends, summary
from plumbing.statistics import Measure, bootstrap, f1_of, wilson
from plumbing.summaries import next_command, summarise_01, summarise_02, summarise_03
from plumbing.tokens import CLOSE, MARKED, OPEN, THINKING, apply_template, begun_ids, encode_plain
from plumbing.tokens import end_token
from plumbing.transcripts import write_transcripts

if not gc.isenabled():
    gc.freeze()
    gc.enable()
