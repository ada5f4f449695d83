"""Runs a stage under FSDP on CPUs: accelerate shards on accelerators only, so it is told that these are some."""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    sys.path.insert(0, ".")
    from plumbing import processes

    processes()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
