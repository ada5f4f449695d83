"""transcripts.html of a finished run of stage 05 again, also of one from before there was such a page.

python bench/transcripts.py runs/demo/05_eval
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing import fail, write_transcripts  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail(f"this takes the folder of one run of stage 05, not '{' '.join(sys.argv[1:])}'")
    write_transcripts(Path(sys.argv[1]))
    print(f"{sys.argv[1]}/transcripts.html")
