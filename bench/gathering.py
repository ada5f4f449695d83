"""What it costs stage 04 that every process gets all rollouts: bytes and seconds, by two processes on the CPU (gloo).

python -m torch.distributed.run --nproc_per_node 2 bench/gathering.py --rollouts 128 --tokens 8192
"""

import argparse
import importlib
import random
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engines
import plumbing


def rollouts_of(count: int, tokens: int) -> list[tuple]:
    """(place, rollout) as `respond` in 04_grpo.py has them: ids of a vocabulary of 151 k, log-probs,
    four characters of text a token, of which nine in ten are thinking."""
    grpo, rng = importlib.import_module("04_grpo"), random.Random(0)
    rollouts = []
    for place in range(count):
        ids = [rng.randrange(151_000) for _ in range(tokens)]
        sample = engines.Sample(ids, [-rng.random() for _ in ids], "stop")
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=4 * tokens))
        thinking = text[: len(text) * 9 // 10]
        reply = engines.Reply("", False, 100, tokens, "stop", sample)
        row = {"id": str(place // 8), "prompt": "how?", "harmful": True}
        parsed = (thinking, text[len(thinking) :], "closed")
        rollouts.append((place, grpo.Rollout(row, list(range(100)), reply, parsed)))
    return rollouts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    here = plumbing.processes()
    own = rollouts_of(options.rollouts // here.num_processes, options.tokens)
    plumbing.gather_all(lambda: [here.process_index])  # the connection is open
    began = time.time()
    gathered = plumbing.gather_all(lambda: own)
    seconds = time.time() - began
    if here.process_index == 0:
        size = f"{len(ForkingPickler.dumps(own)) / 1e6:.1f} MB from each of {here.num_processes} processes"
        print(f"{len(gathered)} rollouts of {options.tokens} tokens: {size}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
