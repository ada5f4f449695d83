"""Runs a stage under FSDP on CPUs: accelerate shards on accelerators only, so it is told that these are some.

python -m plumbing.several 2 tests/sharded.py 04_grpo.py …
python -m plumbing.several 2 tests/sharded.py scores    # log-probs of a sharded scorer
"""

import json
import runpy
import sys
from types import SimpleNamespace

from accelerate import PartialState
from accelerate.utils import DistributedType


def scores():
    """Prints the log-probs that the trainer of stage 04 computes when sharded, as one line of JSON."""
    import torch

    import plumbing
    from common import Example, make_trainer, pad_batch

    settings = {
        "model": "tiny/lrm",
        "lora_rank": 0,
        "learning_rate": 1e-3,
        "recompute": False,
        "dtype": "auto",
        "trackers": [],
    }
    options = SimpleNamespace(**settings)
    trainer = make_trainer(plumbing.open_accelerator(options, "."), options)
    other = plumbing.processes().process_index  # another batch for each, so that sums are no copies
    batch = pad_batch([Example([5, 6, 7], [8, 9, 10, 11 + other]), Example([5], [10, 11, 12 + other, 2])])
    log_probs = trainer.scorer(*batch).log_probs
    trainer.backward(log_probs.mean())
    gradient = next(trainer.model.parameters()).grad.full_tensor()
    if plumbing.processes().process_index == 0:
        print(json.dumps({"log_probs": log_probs.tolist(), "gradient": gradient[5:8].flatten().tolist()}))
    plumbing.processes().wait_for_everyone()
    torch.distributed.destroy_process_group()  # left to the interpreter's end, a thread of it may abort


if __name__ == "__main__":
    sys.path.insert(0, ".")
    from plumbing import processes

    processes()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    del sys.argv[0]
    if sys.argv[0] == "scores":
        scores()
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
