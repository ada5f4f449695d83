"""A stage as several processes of this machine that share its prompts, as `accelerate launch` would
start them, but with one start of Python for all, and a user's mistake stays one line.

python -m plumbing.several 2 05_eval.py …
"""

import os
import runpy
import signal
import socket
import sys
import time

from plumbing.process import fail, stop_on_interrupt

INTERRUPTED = 130  # exit status; all processes get an interrupt, and the first one says so
PATIENCE = 2  # seconds in which the first process may say what the others would say too


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(rank: int, command: list[str]):
    """The stage, as process `rank`; the first one speaks for all."""
    stop_on_interrupt()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        if rank > 0 and error.code:
            time.sleep(PATIENCE)
        raise
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # at the interpreter's end a thread may abort


def main():
    """Ends with the status of the first process that fails, after it has ended the others, which
    would wait for it."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        fail("give a number of processes and a stage: python -m plumbing.several 2 05_eval.py …")
    count, command = int(sys.argv[1]), sys.argv[2:]
    if not os.path.isfile(command[0]):
        fail(f"there is no {command[0]} here; run it in the project's folder")
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    children = set()
    for rank in range(count):
        child = os.fork()
        if child == 0:
            return work(rank, command)
        children.add(child)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes get it too, and end by themselves
    status = 0
    while children:
        child, ended = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(ended)
        if code and not status:
            status = code if code > 0 else 128 - code
            if status != INTERRUPTED:
                for other in children:
                    os.kill(other, signal.SIGTERM)
    sys.exit(status)


if __name__ == "__main__":
    main()
