"""A model that answers from a running `vllm serve`: a server that misbehaves on purpose, our own loop behind HTTP (both
skipped where openai is missing), and vLLM's own server, killed half-way (`make test-vllm`). All of it on loopback."""

import hashlib
import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import assert_log_probs, assert_seeds_belong_to_requests, load, refused, rows, run_here, run_stage

pytest.importorskip("openai")

from test_endpoint import KEY, always, door, free_port, serving, vllm_server  # noqa: E402

from common import render_chat  # noqa: E402
from engines import Sampling, answer_prompts  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from engines.server import ServerSampler  # noqa: E402
from plumbing import fingerprint, reopen_jsonl, write_jsonl  # noqa: E402

PROMPTS = {"good": "what is 3 + 4?", "bad": "what is 5 + 4?", "fine": "what is 6 + 2?"}
ROWS = [{"id": name, "prompt": text} for name, text in PROMPTS.items()]
HERE = "127.0.0.1:9/v1"  # where nothing listens


@pytest.fixture(scope="module", autouse=True)
def key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield


def answer(*samples, **other):
    """What vLLM's server says for (ids, log-probs, finish) of each sample."""
    parts = [{"token_ids": ids, "logprobs": {"token_logprobs": p}, "finish_reason": f} for ids, p, f in samples]
    return {"choices": [{"text": "", **part, **other} for part in parts]}


GOOD = ([20, 21, 2], [-0.5, -0.25, -1.0], "stop")


def row_of(tokenizer):
    """Which of ROWS a request asks for: its ids must be those of our own rendering."""
    ids = {name: render_chat(tokenizer, [{"role": "user", "content": text}])[0] for name, text in PROMPTS.items()}
    return lambda request: next(f"{name} prompt" for name, known in ids.items() if known == request["prompt"])


def ask(name, path, n=2, s=Sampling(16, 0.7, 0.9, 20, 4)):
    return answer_prompts(ServerSampler(name), ROWS, path, n, s)


UNFIT = {
    "a server that is not vLLM": {"choices": [{"text": "7", "finish_reason": "stop", "logprobs": None}] * 2},
    "no token ids": answer(GOOD, GOOD, token_ids=None),
    "no log-probs": answer(GOOD, GOOD, logprobs=None),
    "a log-prob is missing": answer(GOOD, ([20, 2], [-0.5, None], "stop")),
    "more tokens than log-probs": answer(GOOD, ([20, 21, 2], [-0.5], "stop")),
    "no tokens": answer(GOOD, ([], [], "stop")),
    "tokens as text": answer(GOOD, (["seven", "."], [-0.5, -0.5], "stop")),
    "half the choices": answer(GOOD),
    "an answer that the server gave up": answer(GOOD, GOOD, finish_reason="abort"),
    "half a JSON text": json.dumps(answer(GOOD, GOOD))[:60],
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_answer_without_ids_and_log_probs_ends_in_one_line_and_the_others_stay(
    what, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("engines.server.time", SimpleNamespace(time=time.time, sleep=lambda _: None))
    path, whole = tmp_path / "out.jsonl", lambda request: answer(*[GOOD] * request["n"])
    with serving(always(UNFIT[what]), whole, row_of(tokenizer), "tiny/lrm") as server:
        with pytest.raises(SystemExit) as stop:
            ask(server.name, path)
        line = str(stop.value)
        assert line.startswith(f"error: {server.name}: ValueError: no completion with 2 choices, token ids and log-")
        assert "`vllm serve --logprobs-mode processed_logprobs`" in line and "\n" not in line and len(line) < 400
        assert line.endswith("; finished rows are kept, the same command goes on")
        assert server.asked["bad prompt"] == 3 and sorted(r["id"] for r in reopen_jsonl(path)) == ["fine", "good"]
        server.bad = always(answer(GOOD, GOOD))
        made = ask(server.name, path)
        assert server.asked == {"good prompt": 1, "bad prompt": 4, "fine prompt": 1}
    assert [r["id"] for r in made] == ["good", "bad", "fine"] and len(reopen_jsonl(path)) == 3
    assert server.keys == {f"Bearer {KEY}"}
    text = tokenizer.decode(GOOD[0][:2])
    expected = {"thinking": "", "answer": text, "state": "no_thinking", "finish": "stop", "tokens": 3}
    assert all(r["samples"] == [expected] * 2 and r["prompt_tokens"] > 3 for r in made)


def test_what_the_server_is_asked(tokenizer, tmp_path):
    """All that sampling hangs on is said, so that no default of the server's decides anything."""
    asked, row, good = [], row_of(tokenizer), answer(*[GOOD] * 3)
    with serving(always(good), lambda _: good, lambda r: asked.append(r) or row(r), "tiny/lrm") as server:
        ask(server.name, tmp_path / "out.jsonl", n=3)
    [request] = [r for r in asked if row(r) == "good prompt"]
    assert request.pop("prompt") == render_chat(tokenizer, [{"role": "user", "content": PROMPTS["good"]}])[0]
    assert request.pop("seed") == int.from_bytes(hashlib.sha256(b"4|good").digest()[:4], "big")
    sampling = {"n": 3, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop_token_ids": [2]}
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert request == {"model": "tiny/lrm", **sampling, **neutral, "logprobs": 0, "return_token_ids": True}


def test_greedy_samples_are_asked_for_once(tokenizer, tmp_path):
    """vLLM refuses to draw several: they are one."""
    asked, row, good = [], row_of(tokenizer), answer(GOOD)
    with serving(always(good), lambda _: good, lambda r: asked.append(r) or row(r), "tiny/lrm") as server:
        made = ask(server.name, tmp_path / "out.jsonl", 3, Sampling(16, 0.0))
    assert {r["n"] for r in asked} == {1} and [len(r["samples"]) for r in made] == [3] * 3


@pytest.fixture
def our_server(model, tokenizer):
    """`vllm serve` as far as the stages can see, with our own loop inside."""
    ours, one_by_one = HfSampler(model, tokenizer, 32_768), threading.Lock()

    def sample(request):
        s = Sampling(request["max_tokens"], request["temperature"], request["top_p"], request["top_k"], request["seed"])
        with one_by_one:
            [(_, samples)] = ours.generate([("", request["prompt"])], request["n"], s)
        return answer(*samples)

    with serving(None, sample, lambda request: str(request["prompt"]), "tiny/lrm") as server:
        yield server.name


GREEDY = ["--temperature", 0, "--guard", "tiny/gold.py"]


def test_01_and_02_know_the_model_behind_the_server(our_server, tmp_path):
    generate = load("01_generate")
    options = [*GREEDY, "--limit", 12, "--n", 2]
    run_here(generate, "--run", tmp_path / "here", *options)
    run_here(generate, "--run", tmp_path / "there", *options, "--model", our_server)
    here, there = ({r["id"]: r for r in rows(tmp_path / run / "responses.jsonl")} for run in ("here", "there"))
    assert here == there and len(here) == 12
    recorded = json.loads((tmp_path / "there/options.json").read_text())["options"]
    assert recorded["model"] == our_server and recorded["content of tiny/lrm"] == fingerprint("tiny/lrm")
    labels = rows(tmp_path / "there/labels.jsonl")
    mixed = next(label for label in labels if here[label["id"]]["harmful"])
    mixed["verdicts"][1]["safety"] = "safe"  # greedy answers are never mixed
    write_jsonl(tmp_path / "there/labels.jsonl", labels)
    run_here(load("02_verify_sft"), "--run", tmp_path / "02", "--responses", tmp_path / "there", "--epochs", 1)
    said = (tmp_path / "02/summary.txt").read_text()
    assert f" answers of tiny/lrm, from {tmp_path}/there\n" in said and "--models base=tiny/lrm sinternal=" in said


def test_03_trains_the_folder_on_what_the_server_wrote(our_server, tmp_path):
    steer, options = load("03_steer_selfgen"), [*GREEDY, "--limit", 8, "--epochs", 1]
    run_here(steer, "--run", tmp_path / "here", *options)
    run_here(steer, "--run", tmp_path / "there", *options, "--generator", our_server)
    assert rows(tmp_path / "here/train.jsonl") == rows(tmp_path / "there/train.jsonl")
    assert "--models base=tiny/lrm thinksafe=" in (tmp_path / "there/summary.txt").read_text()


def test_05_records_and_guards_the_folder_behind_the_server(our_server, tmp_path):
    evaluate, trained = load("05_eval"), tmp_path / "03/checkpoint"
    shutil.copytree("tiny/lrm", trained)
    (tmp_path / "03/options.json").write_text(json.dumps({"options": {"guard": "tiny/guard"}}))
    served = our_server.replace("tiny/lrm", str(trained))
    options = ["--run", tmp_path / "05", "--temperature", 0, "--limit", 6, "--judges", "tiny/gold.py"]
    options += ["--bench", "plain=tiny/prompts/test_plain.jsonl", "--models", "base=tiny/lrm", f"served={served}"]
    options += ["--prefill", "think-open", "answer"]
    run_here(evaluate, *options)
    for case in ("plain", "plain.think-open", "plain.answer"):  # begun responses too
        files = [tmp_path / f"05/{m}/{case}.responses.jsonl" for m in ("base", "served")]
        here, there = ({r["id"]: r for r in rows(file)} for file in files)
        assert here == there and 0 < len(here) <= 6
        assert all(("start" in r) == (case != "plain") for r in here.values())
    recipe = json.loads((tmp_path / "05/results.json").read_text())["recipe"]["models"]
    assert recipe["served"]["path"] == served and recipe["served"]["content"] == fingerprint(str(trained))
    assert recipe["served"]["made by"] == {"guard": "tiny/guard"}
    assert recipe["served"]["first prompt"] == recipe["base"]["first prompt"]
    with (trained / "config.json").open("a") as file:
        file.write("\n")
    assert "holds responses of model" in refused(evaluate, *options)


SERVED, NOWHERE, TRAINED = f"tiny/lrm@http://{HERE}", f"runs/no/where@http://{HERE}", "is an endpoint; what is trained"
REFUSED = {
    "02, to be trained": ("02_verify_sft", ["--model", SERVED], TRAINED),
    "03, to be trained": ("03_steer_selfgen", ["--model", SERVED], TRAINED),
    "04, to be trained": ("04_grpo", ["--model", SERVED], TRAINED),
    "01, no tokenizer": ("01_generate", ["--model", NOWHERE], "no model 'runs/no/where'"),
    "03, no tokenizer": ("03_steer_selfgen", ["--generator", NOWHERE], "no model 'runs/no/where'"),
    "05, no tokenizer": ("05_eval", ["--models", f"a={NOWHERE}"], "no model 'runs/no/where'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_names_that_cannot_be(what, tmp_path):
    stage, options, words = REFUSED[what]
    assert words in refused(load(stage), "--run", tmp_path / "run", *options) and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    """Stage 01 on 60 prompts whose server is killed half-way and started again, now as two engines that go on serving."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("served")
    server = free_port(), folder / "log", "tiny/lrm", "--logprobs-mode", "processed_logprobs"
    with door(server[0]) as way:
        found = SimpleNamespace(name=f"tiny/lrm@{way.url}", path=folder / "01/responses.jsonl")
        options = ["--run", folder / "01", "--model", found.name, "--guard", "tiny/gold.py", "--limit", 60, "--n", 4]
        with vllm_server(*server) as way.kills:
            way.leave = 20
            found.failed = run_stage("01_generate", *options, ok=False)
        found.kept = reopen_jsonl(found.path)
        way.leave = -1
        with vllm_server(*server, "--data-parallel-size", "2"):
            run_here(load("01_generate"), *options)
            yield found


def test_a_killed_server_costs_no_row(survivor):
    errors = [line for line in survivor.failed.stderr.splitlines() if line.startswith("error: ")]
    assert survivor.failed.returncode == len(errors) == 1 and "Traceback" not in survivor.failed.stderr
    assert errors[0].startswith(f"error: {survivor.name}: APIConnectionError: Connection error")
    assert len(survivor.kept) == 20
    made = reopen_jsonl(survivor.path)
    assert made[: len(survivor.kept)] == survivor.kept and len({r["id"] for r in made}) == len(made) == 60
    samples = [sample for row in made for sample in row["samples"]]
    assert len(samples) == 240 and len({s["thinking"] + s["answer"] for s in samples}) > 60
    assert all(s["state"] == "closed" and s["finish"] == "stop" for s in samples[:20])
    assert "60, 4 responses each" in (survivor.path.parent / "summary.txt").read_text()


def test_greedy_ids_and_log_probs_equal_our_loop(survivor, requests, model, tokenizer):
    greedy = Sampling(40, 0.0)
    ours = dict(HfSampler(model, tokenizer, 32_768).generate(requests, 1, greedy))
    theirs = dict(ServerSampler(survivor.name).generate(requests, 1, greedy))
    for index in range(len(requests)):
        [a], [b] = ours[index], theirs[index]
        assert (a.ids, a.finish) == (b.ids, b.finish) and b.finish == "stop"
        assert a.log_probs == pytest.approx(b.log_probs, abs=2e-3)
    [[cut]] = dict(ServerSampler(survivor.name).generate(requests[:1], 1, Sampling(5, 0.0))).values()
    assert cut.ids == ours[0][0].ids[:5] and cut.finish == "length"


def test_log_probs_are_those_of_a_full_forward_pass_at_the_temperature(survivor, requests, model):
    for index, samples in ServerSampler(survivor.name).generate(requests, 2, Sampling(20, 0.7, seed=5)):
        for sample in samples:
            assert_log_probs(model, requests[index][1], sample, 0.7, 2e-3)


def test_seeds_belong_to_the_request(survivor, requests):
    assert_seeds_belong_to_requests(ServerSampler(survivor.name), requests)
