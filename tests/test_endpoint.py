"""Experts behind a URL: a server that misbehaves on purpose (skipped where openai is missing), and vLLM's own server,
killed half-way (`make test-vllm`). All of it on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT, load, run_stage

pytest.importorskip("openai")

from engines import Sampling, answer_prompts  # noqa: E402
from engines.server import Endpoint  # noqa: E402
import plumbing  # noqa: E402
from plumbing import append_jsonl, reopen_jsonl, require_model  # noqa: E402

KEY = "sk-stands-nowhere-on-disk"
ROWS = [{"id": name, "prompt": f"{name} prompt"} for name in ("good", "bad", "fine")]
TEXT = "It helps.\nVerdict: safe"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def completion(n: int) -> dict:
    choices = [{"finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}] * n
    return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 5 * n}}


def always(body, status=200, kind="application/json", missing=0, length=True):
    """Every request gets this; of the announced length, `missing` bytes never come."""

    def send(http, k):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        http.send_response(status)
        http.send_header("Content-Type", kind)
        http.send_header("retry-after-ms", "1")  # where the client repeats, it waits as long as it is told
        if length:
            http.send_header("Content-Length", str(len(data) + missing))
        http.end_headers()
        http.wfile.write(data)
        http.close_connection = bool(missing) or not length

    return send


def chat_answer(request):
    return completion(request["n"])


def last_turn(request):
    return request["messages"][-1]["content"]


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_):
        pass


@contextmanager
def serving(bad, good=chat_answer, prompt_of=last_turn, model="m"):
    """A server with a name, and a Counter `asked` of prompts. Request k = 1, 2, … for the bad prompt is answered by
    `bad(http, k)`, the others as they should be, but not before the bad one (unless that takes a fifth of a second)."""

    class Handler(Quiet):
        def do_POST(self):
            request = json.loads(self.body())
            prompt = prompt_of(request)
            server.asked[prompt] += 1
            if len(server.asked) == len(ROWS):
                server.all_under_way.set()
            server.all_under_way.wait(5)
            server.keys.add(self.headers["Authorization"])
            if "bad" in prompt:
                server.bad(self, server.asked[prompt])
                server.answered.set()
            else:
                server.answered.wait(0.2)
                always(good(request))(self, 1)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.name, server.bad, server.asked = f"{model}@http://127.0.0.1:{server.server_port}/v1", bad, Counter()
    server.keys, server.all_under_way, server.answered = set(), threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(name, path, **client):
    sampler = Endpoint(name)
    sampler.client = sampler.client.with_options(**client)
    return answer_prompts(sampler, ROWS, path, 2, Sampling(16, 0.0))


HALF = json.dumps(completion(2))[:90]
HOPELESS = {  # what every request for one row gets, requests until that is that, words of the error, the client
    "error 500": (always({"error": {"message": "no memory"}}, 500), 7, "Error code: 500 - no memory", {}),
    "error 500, no words": (always("", 500), 7, "InternalServerError: Error code: 500", {}),
    "an error that shows the key": (always({"error": {"message": KEY}}, 401), 1, "401 - OPENAI_API_KEY", {}),
    "error 400": (always({"error": {"message": "too\nlong"}}, 400), 1, "Error code: 400 - too long", {}),
    "a web page": (always("<html>\nSign in</html>", kind="text/html"), 3, r"<html>\nSign in</html>", {}),
    "half a JSON text": (always(HALF), 3, HALF, {}),
    "an error as a success": (always({"error": {"message": "upstream is down"}}), 3, "upstream is down", {}),
    "no choices": (always(completion(0)), 3, '"choices": []', {}),
    "half the choices": (always(completion(1)), 3, "no chat completion with 2 choices", {}),
    "no message": (always({"choices": [{"finish_reason": "stop"}] * 2}), 3, '{"finish_reason": "stop"}', {}),
    "no text": (always({"choices": [{"finish_reason": "stop", "message": {"content": [1]}}] * 2}), 3, "[1]", {}),
    "another JSON": (always([1, 2]), 3, "[1, 2]", {}),
    "half the body": (always(HALF, missing=9), 2, "APIConnectionError: Connection error", {"max_retries": 1}),
    "silence": (lambda *_: time.sleep(2), 2, "APITimeoutError: Request timed out", {"max_retries": 1, "timeout": 1.5}),
}


@pytest.mark.parametrize("what", HOPELESS)
def test_a_row_without_an_answer_ends_in_one_line_and_the_others_stay(what, tmp_path, monkeypatch):
    bad, requests, words, client = HOPELESS[what]
    path, began, waits = tmp_path / "out.jsonl", time.time(), []
    monkeypatch.setattr("engines.server.time", SimpleNamespace(sleep=waits.append))
    with serving(bad) as server:
        with pytest.raises(SystemExit) as stop:
            ask(server.name, path, **client)
        line = str(stop.value)
        assert line.startswith(f"error: {server.name}: ") and words in line and "\n" not in line and len(line) < 400
        assert line.endswith("; finished rows are kept, the same command goes on")
        assert server.asked["bad prompt"] == requests and time.time() - began < 30
        assert [seconds for seconds in waits if seconds] == [1, 2] * (requests == 3)
        assert sorted(r["id"] for r in reopen_jsonl(path)) == ["fine", "good"]
        server.bad = always(completion(2))
        made = ask(server.name, path)
        assert server.asked == {"good prompt": 1, "bad prompt": requests + 1, "fine prompt": 1}
    assert [r["id"] for r in made] == ["good", "bad", "fine"] and len(reopen_jsonl(path)) == 3
    assert all(s["answer"] == TEXT for r in made for s in r["samples"])


PASSING = {  # what the first requests for one row get
    "too many requests": (2, always({"error": {"message": "slow down"}}, 429)),
    "half a JSON text, its length not announced": (1, always(HALF, length=False)),
    "half the body": (1, always(HALF, missing=9)),
    "a web page": (1, always("<html>busy</html>", kind="text/html")),
}


@pytest.mark.parametrize("what", PASSING)
def test_a_passing_trouble_costs_no_row(what, tmp_path, monkeypatch):
    count, trouble = PASSING[what]
    monkeypatch.setattr("engines.server.time", SimpleNamespace(sleep=lambda seconds: None))
    with serving(lambda http, k: (trouble if k <= count else always(completion(2)))(http, k)) as server:
        good, bad, _ = ask(server.name, tmp_path / "out.jsonl")
    assert server.asked == {"good prompt": 1, "bad prompt": count + 1, "fine prompt": 1}
    assert bad == {**good, **ROWS[1]} and bad["prompt_tokens"] == 7 and bad["samples"][0]["tokens"] == 5
    assert len(reopen_jsonl(tmp_path / "out.jsonl")) == 3


def test_an_answer_may_lack_text_and_token_counts(tmp_path):
    """An expert that declines gives no text; some servers count no tokens."""
    empty = [{"finish_reason": "content_filter", "message": {"content": None}}] * 2
    with serving(always({"choices": empty})) as server:
        row = ask(server.name, tmp_path / "out.jsonl")[1]
    expected = {"thinking": "", "answer": "", "state": "no_thinking", "finish": "content_filter", "tokens": 0}
    assert row["samples"] == [expected] * 2 and row["prompt_tokens"] == 0


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    halves = [{"finish_reason": "stop", "message": {"content": "a \ud800 b \udfff"}}] * 2
    with serving(always({"choices": halves})) as server:
        made = ask(server.name, tmp_path / "out.jsonl")
    assert sorted(r["id"] for r in reopen_jsonl(tmp_path / "out.jsonl")) == sorted(r["id"] for r in made)
    assert {s["answer"] for row in made for s in row["samples"]} == {"a ? b ?", TEXT}


def test_an_endpoint_has_bounds_and_needs_openai(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")  # as good as none
    client = Endpoint("m@http://127.0.0.1:9/v1").client
    assert client.max_retries == 6 and client.timeout.read == 600 and client.timeout.connect == 30
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit, match="needs the package openai"):
        require_model("m@http://127.0.0.1:9/v1", endpoint=True)


def stage_02(run, source, expert, ok=True) -> str:
    """Its one error line, if it is to fail. The key is in no file and no output; the summary's token counts are the
    sums of the rows'."""
    done = run_stage("02_verify_sft", "--run", run, "--responses", source, "--expert", expert, ok=ok)
    assert not any(KEY.encode() in p.read_bytes() for p in run.rglob("*") if p.is_file())
    assert KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == done.returncode == (not ok), done.stderr[-2000:]
    rows = reopen_jsonl(run / "critiques.jsonl")
    sums = sum(r["prompt_tokens"] for r in rows), sum(r["samples"][0]["tokens"] for r in rows)
    assert not ok or f"{expert}, {sums[0]} prompt tokens read, {sums[1]} written\n" in done.stdout
    return "".join(errors)


@pytest.mark.slow
def test_stage_02_ends_when_the_endpoint_fails_and_goes_on_when_it_is_back(tmp_path):
    source, run = tmp_path / "01", tmp_path / "02"
    source.mkdir()
    samples, verdicts = [{"answer": "yes"}, {"answer": "no"}], [{"safety": "safe"}, {"safety": "unsafe"}]
    # two answers of the harmful one are verified, and the expert calls both safe
    answered = [{**r, "harmful": r["id"] == "good", "samples": samples} for r in ROWS]
    append_jsonl(source / "responses.jsonl", answered)
    append_jsonl(source / "labels.jsonl", [{"id": r["id"], "verdicts": verdicts} for r in ROWS])
    (source / "options.json").write_text(json.dumps({"options": {"model": "tiny/lrm"}}))
    with serving(always({"error": {"message": "no memory"}}, 500)) as server:
        assert "Error code: 500 - no memory" in stage_02(run, source, server.name, ok=False)
        assert len(reopen_jsonl(run / "critiques.jsonl")) == 3 and not (run / "train.jsonl").exists()
        server.bad = always(completion(1))
        stage_02(run, source, server.name)
    assert sorted(server.asked.values()) == [1, 1, 1, 8] and len(reopen_jsonl(run / "train.jsonl")) == 3
    assert server.keys == {f"Bearer {KEY}"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def vllm_server(port: int, log, model: str, *more):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *more]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    kwargs = {"cwd": ROOT, "env": {**os.environ, "VLLM_API_KEY": KEY}, "start_new_session": True}
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--no-enable-chunked-prefill"], stdout=out, stderr=out, **kwargs)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-2000:]
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(1)
        yield server.pid
    finally:
        with suppress(ProcessLookupError):  # the test itself may have killed it
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def door(port: int):
    """The way to the server on `port`, open while others come and go there. Once `leave` answers went out, the process
    group `kills` is killed, and those that were under way reach nobody."""
    one_by_one = threading.Lock()

    class Handler(Quiet):
        def do_POST(self):
            to = urllib.request.Request(f"http://127.0.0.1:{port}{self.path}", self.body(), dict(self.headers))
            self.close_connection = True
            with suppress(OSError, HTTPException):
                answer = urllib.request.urlopen(to).read()
                with one_by_one:
                    if way.leave == 0:
                        return
                    always(answer.decode())(self, 1)
                    way.leave -= 1
                    if way.leave == 0:
                        os.killpg(way.kills, signal.SIGKILL)

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # connections that wait to be taken

    with Server(("127.0.0.1", 0), Handler) as way:
        way.kills, way.leave, way.url = None, -1, f"http://127.0.0.1:{way.server_port}/v1"
        threading.Thread(target=way.serve_forever, args=[0.02], daemon=True).start()
        yield way
        way.shutdown()


def test_a_killed_vllm_server_costs_no_row_and_its_critiques_are_those_of_our_loop(tmp_path):
    pytest.importorskip("vllm")
    source, run, path = tmp_path / "01", tmp_path / "02", tmp_path / "02/critiques.jsonl"
    run_stage("01_generate", "--run", source, "--limit", 160, "--n", 4)
    stage = load("02_verify_sft")
    total = len(stage.select(*plumbing.read_stage_01(source)))
    server = free_port(), tmp_path / "log", "tiny/expert"
    with door(server[0]) as way:
        expert = f"tiny/expert@{way.url}"
        with vllm_server(*server) as way.kills:
            way.leave = total // 6
            assert "Connection error" in stage_02(run, source, expert, ok=False)
        kept = reopen_jsonl(path)
        assert len(kept) == total // 6
        way.leave = -1
        with vllm_server(*server):
            stage_02(run, source, expert)
    made = reopen_jsonl(path)
    assert made[: len(kept)] == kept and len(made) == total
    stage_02(tmp_path / "ours", source, "tiny/expert")
    ours = {r["id"]: r for r in reopen_jsonl(tmp_path / "ours/critiques.jsonl")}
    assert {r["id"]: r for r in made} == ours  # texts, ends and token counts
