"""transcripts.html of a finished run of stage 05 again, also of one from before there was such a page.

python bench/transcripts.py runs/demo/05_eval
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing import fail, write_transcripts  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", help="the folder of one run of stage 05")
    runs = parser.parse_args().run
    if len(runs) != 1:
        fail(f"this takes the folder of one run of stage 05, not '{' '.join(runs)}'")
    write_transcripts(Path(runs[0]))
    print(f"{runs[0]}/transcripts.html")
