"""Does verifying its own answers teach a model more than verifying another model's? With nothing else in the way.

In the table of bench/claims.py the other model's row has half of the rows: the guard can't read its wording, the expert
neither, and the filter (verdict = label) drops what they get wrong. Here labels come from the gold rule and critiques
from the gold rule too, behind an OpenAI-compatible address, so that no answer of either model is misread; and both
rows train on the same prompts with the same number of answers. bench/theory.py runs it and shows the figures.
"""

import importlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from claims import ROOT, measured, stage
from rows import Place

from plumbing import fail, read_jsonl, read_stage_01, write_jsonl
from tiny import gold, world

PORT = 18_710  # fixed: a run that goes on must find the expert under the same name
ROWS = ("own-equal", "other-equal")


# An expert without error ----------------------------------------------------------------------------------------------
def review(request: str) -> str:
    """Critique and verdict on a filled-in tiny/spec.txt, in the opening that the specification asks for. An answer that
    tells no recipe of what was asked for is a refusal, in whatever words."""
    parts = re.search(r"^prompt: (.*?)\nanswer: (.*)\n\nis the answer", request, re.M | re.S)
    prompt, answer = parts.groups()
    words = set(re.findall(r"[a-z]+", prompt))
    [item] = [item for item in world.ITEMS if item.name in words]
    refused = gold.judge(prompt, answer).endswith("Refusal: Yes")
    answer = item.refusal if refused else item.steps
    critique, verdict = world.critique(item, answer, own_voice=True)
    return f"{critique}\nVerdict: {verdict}"


class Expert(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": review(request["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice] * request["n"]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def exact_expert(port: int = PORT):
    """The name of an expert as stage 02 takes it: model@URL."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Expert)
    except OSError as error:
        fail(
            f"port {port}: {error.strerror}; end what listens there (PORT in bench/own_answers.py)"
        )
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield f"gold@http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


# The same prompts and numbers of answers ------------------------------------------------------------------------------
def usable(run: Path) -> dict[str, tuple[dict, dict]]:
    """{id: (row, its labels)} of the prompts of a stage 01 run that give stage 02 all that a prompt can: a safe and an
    unsafe answer of a harmful one, one answer of a benign one, each with the label that the expert will agree with."""
    stage02 = importlib.import_module("02_verify_sft")
    spec = (ROOT / "tiny/spec.txt").read_text().strip()
    rows, verdicts = read_stage_01(str(run))
    whole = {}
    for row in rows:
        selected = stage02.select([row], verdicts)
        right = []
        for one in selected:
            text = stage02.verification_prompt(spec, one["request"], one["answer"])
            right.append(review(text).endswith(f"Verdict: {one['label']}"))
        if all(right) and len(right) == (2 if row["harmful"] else 1):
            whole[row["id"]] = (row, {"id": row["id"], "verdicts": verdicts[row["id"]]})
    return whole


def pair(runs: dict[str, Path], out: Path) -> dict:
    """Copies of stage 01 runs {name: folder} in out/<name>, with those prompts only that are usable in all of them, and
    how many there are: {name: [harmful, benign]}, and of "both"."""

    def sizes(rows) -> list[int]:
        harmful = [row["harmful"] for row, _ in rows]
        return [sum(harmful), len(harmful) - sum(harmful)]

    whole = {name: usable(run) for name, run in runs.items()}
    shared = set.intersection(*(set(rows) for rows in whole.values()))
    counts = {name: sizes(rows.values()) for name, rows in whole.items()}
    for name, rows in whole.items():
        kept = [pair for row_id, pair in rows.items() if row_id in shared]
        counts["both"] = sizes(kept)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "responses.jsonl", [row for row, _ in kept])
        write_jsonl(folder / "labels.jsonl", [labels for _, labels in kept])
    return counts


def run_seed(place: Place, expert: str) -> dict:
    """{"counts", "kept": {row: [critiques kept, dropped]}, "scores": {row: {heading: value}}} of one seed."""
    folder, answers = place.run("own-answers"), {}
    for name, model in (("own", "tiny/lrm"), ("other", place.world / "other")):
        answers[name] = folder / f"01-{name}"
        options = ["--seed", place.seed, "--model", model, "--guard", "tiny/gold.py"]
        stage("01_generate.py", answers[name], *options)
    counts = pair(answers, folder / "same")
    kept = {}
    for name in ROWS:
        responses = folder / "same" / name.removesuffix("-equal")
        heldout = place.world / "heldout"
        options = ["--responses", responses, "--heldout", heldout, "--expert", expert]
        stage("02_verify_sft.py", folder / name, "--seed", place.seed, *options)
        files = [folder / name / f"{part}.jsonl" for part in ("train", "dropped")]
        kept[name] = [len(read_jsonl(file)) for file in files]
    if kept[ROWS[0]] != kept[ROWS[1]]:
        fail(f"{folder}: not as many rows of the one as of the other: {kept}")
    models = [f"{name}={folder / name}/checkpoint" for name in ROWS]
    test = ["--verify_test", folder / "own-equal/verify_test.jsonl", "--judges", "tiny/gold.py"]
    stage("05_eval.py", folder / "05", "--seed", place.seed, "--models", *models, *test)
    scores = {name: measured(folder / "05", name, folder / name) for name in ROWS}
    return {"counts": counts, "kept": kept, "scores": scores}
