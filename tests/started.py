"""Commands in forks of a process that has imported what stages import and has done nothing else: a new Python would
spend seconds on that, which is most of a small run. `run` starts that process once, and asks it."""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STREAMS = ("stdin", "stdout", "stderr")


def run(command: list, stdin: str = "", environment: dict | None = None, timeout: int = 600):
    """What subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True) returns; a command that
    takes longer is killed by SIGALRM."""
    command = [str(part) for part in command]
    environment = dict(environment or os.environ)
    with tempfile.TemporaryDirectory() as folder:
        for name in STREAMS:
            Path(folder, name).write_text(stdin if name == "stdin" else "")
        server().stdin.write(json.dumps([command, folder, environment, timeout]) + "\n")
        server().stdin.flush()
        status = int(server().stdout.readline())
        output, errors = (Path(folder, name).read_text(errors="replace") for name in STREAMS[1:])
    return subprocess.CompletedProcess(command, status, output, errors)


@cache
def server() -> subprocess.Popen:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of its parent's threads
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=one_thread, **pipes)
    atexit.register(process.stdin.close)
    return process


def import_what_stages_import():
    gc.disable()
    import accelerate.utils  # noqa: F401
    import math_verify  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.profiler  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import engines.hf  # noqa: F401
    import judges.qwen3guard  # noqa: F401

    gc.freeze()  # a fork that looks for garbage would copy every page of it
    gc.enable()


def serve():
    """Forks for each line of stdin, and says how the command ended."""
    sys.path[0] = str(ROOT)
    import_what_stages_import()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def work(command: list[str], folder: str, environment: dict[str, str], timeout: int):
    """As `python command[0] …` or `python -m command[1] …`, with streams of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(timeout)
    for number, name in enumerate(STREAMS):
        file = os.open(f"{folder}/{name}", os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))
    os.environ.clear()
    os.environ.update(environment)
    status = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path[0] = str(Path(command[0]).resolve().parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
