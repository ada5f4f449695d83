"""Which process this is among several, and how a program ends: one line, never a traceback for a
user's mistake."""

import errno
import multiprocessing
import os
import re
import signal
import sys
from contextlib import suppress
from datetime import timedelta

# Errors of the machine, not of the program: a full or read-only disk, a folder that is not ours
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
GOES_ON = "what is finished is kept, the same command goes on"


def fail(message: str):
    """Ends the program with one line on stderr and exit status 1: what is wrong, where, what to
    do."""
    raise SystemExit(f"error: {' '.join(message.splitlines())}")


def stop(*_):
    """Ends the run on an interrupt, without an exception: Python forgets those that come up in a
    destructor."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\nstopped: {GOES_ON}\n".encode())
    for child in multiprocessing.active_children():  # vLLM's engine
        child.terminate()
    with suppress(RuntimeError):  # interrupted while it printed
        sys.stdout.flush()
    os._exit(130)  # at once, where leaving in order waits for requests under way


def stop_on_interrupt():
    signal.signal(signal.SIGINT, stop)


def run_stage(main):
    """A stage as a command: an interrupt, a full disk or a folder that can't be written end it with
    one line."""
    stop_on_interrupt()
    try:
        main()
    except Exception as error:
        # an OSError, or an error of a library written in Rust
        number = re.search(r"(?:\[Errno|\(os error) (\d+)", str(error))
        if not number or int(number[1]) not in OUTSIDE:
            raise
        fail(f"{str(error).splitlines()[0]}; {GOES_ON}")


def processes():
    """This process among those of `accelerate launch`, an accelerate.PartialState: num_processes,
    process_index, device, wait_for_everyone(). Alone, it is 0 of 1."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def gather_all(work) -> list:
    """The lists that work() returns in each process, joined; where it ends the program in one of
    them, as a guard that fails does, it ends it in all of them."""
    from accelerate.utils import gather_object

    try:
        results = work()
    except SystemExit as error:
        results = [error]
    results = gather_object(results)
    for result in results:
        if isinstance(result, SystemExit):
            raise result
    return results
