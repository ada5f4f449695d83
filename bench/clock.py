"""What the measured processes share: their settings, a clock, and how they hand back what they found."""

import json
import resource
import sys
import time


def settings() -> dict:
    return json.loads(sys.argv[1])


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self):
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {
            "wall": time.perf_counter() - self.began[0],
            "cpu": time.process_time() - self.began[1],
        }


def peak_memory() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def finish(found: dict):
    """The last line of stdout is the result."""
    print(json.dumps({**found, "peak": peak_memory()}), flush=True)
