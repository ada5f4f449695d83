"""The forks: their losses by NumPy and against TRL, teachers and verdicts by hand, and each one run for two steps."""

import copy
import importlib
import json
import math
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, next_token_log_probs
from torch.nn.utils import parameters_to_vector as flat

import judges
from common import Example, messages_of, render_chat
from engines import Reply
from engines.hf import HfSampler
from plumbing import read_jsonl

sys.path.insert(0, str(ROOT / "forks"))
table = importlib.import_module("table")
FORKS = ("checks_rewarded", "cispo", "flip_rates", "gspo", "opd", "opsa", "self_guard", "table")
HARMFUL, BENIGN, MATHS = {"harmful": True}, {"harmful": False}, {"harmful": False, "gold": "22"}


@pytest.fixture
def fork(monkeypatch):
    """A fork's file as a module, and the stages that it changes, all fresh: what it replaces lasts for a test."""
    for name in (*FORKS[:-1], "02_verify_sft", "03_steer_selfgen", "04_grpo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in (*FORKS[:-1], "02_verify_sft", "03_steer_selfgen", "04_grpo"):
        sys.modules.pop(name, None)


# Surrogates -----------------------------------------------------------------------------------------------------------
LENGTHS = [3, 1, 4]
ROWS = [slice(0, 3), slice(3, 4), slice(4, 8)]
OLD = np.array([-1.0, -0.2, -2.0, -0.7, -0.1, -1.5, -0.3, -0.9])
NEW = OLD + [0.9, -0.1, 0.1, -0.8, 2.0, -0.3, 0.05, -0.05]
ADVANTAGES = np.repeat([1.5, -1.0, -0.5], LENGTHS)


def numpy_gspo(new, low, high):
    """(loss of each token, is its response clipped) as the paper writes it."""
    losses, flags = np.zeros(8), np.zeros(8, bool)
    for row in ROWS:
        s, advantage = math.exp((new[row] - OLD[row]).sum() / len(OLD[row])), ADVANTAGES[row][0]
        inside = min(max(s, 1 - low), 1 + high)
        losses[row], flags[row] = -min(s * advantage, inside * advantage), inside * advantage < s * advantage
    return losses, flags


def ours(surrogate, low, high):
    new = torch.tensor(NEW, requires_grad=True)
    loss, clipped = surrogate(new, torch.tensor(OLD), torch.tensor(ADVANTAGES), LENGTHS, low, high)
    weights = torch.arange(1.0, 9.0, dtype=torch.float64)
    (loss * weights).sum().backward()
    return loss.detach().numpy(), clipped.numpy(), new.grad.numpy(), weights.numpy()


def test_gspo_by_numpy_on_a_ragged_batch(fork):
    loss, clipped, gradient, weights = ours(fork("gspo").surrogate, 0.2, 0.28)
    expected, flags = numpy_gspo(NEW, 0.2, 0.28)
    np.testing.assert_allclose(loss, expected, atol=1e-12)
    assert clipped.tolist() == flags.tolist() and set(flags) == {True, False}
    numeric = np.zeros(8)
    for t, sign in ((t, sign) for t in range(8) for sign in (1, -1)):
        moved = NEW + sign * 1e-6 * np.eye(8)[t]
        numeric[t] += sign * (numpy_gspo(moved, 0.2, 0.28)[0] * weights).sum() / 2e-6
    np.testing.assert_allclose(gradient, numeric, atol=1e-6)


def test_cispo_by_numpy_on_a_ragged_batch(fork):
    """Its gradient is that of log pi, weighed: no token is left out, none flows through the ratio."""
    loss, clipped, gradient, weights = ours(fork("cispo").surrogate, 0.2, 1.0)
    weight = np.minimum(np.exp(NEW - OLD), 2.0)
    np.testing.assert_allclose(loss, -weight * ADVANTAGES * NEW, atol=1e-12)
    np.testing.assert_allclose(gradient, -weight * ADVANTAGES * weights, atol=1e-12)
    assert clipped.tolist() == [True, False, False, False, True, False, False, False]


FOUR = ("--updates_per_batch", 4)


@pytest.mark.parametrize("name, control, options, more", [
    ("gspo", "grpo-4-updates", FOUR, ("--loss", "grpo", "--clip_low", 3e-4, "--clip_high", 4e-4)),  # the paper's range
    ("cispo", "dapo-4-updates", (*FOUR, "--loss", "dapo"), ("--clip_high", 4.0)),
])  # fmt: skip
def test_a_loss_and_its_control_differ_in_the_loss(fork, monkeypatch, name, control, options, more):
    runs = []
    monkeypatch.setattr(table, "run", lambda row, stage, *words: runs.append((row, stage.surrogate.__module__, words)))
    runpy.run_path(f"forks/{name}.py", run_name="__main__")
    assert runs == [(control, "04_grpo", options), (name, "__main__", (*options, *more))]


def test_an_unknown_mean_is_refused(fork):
    kept = torch.ones(2, dtype=torch.bool)
    with pytest.raises(SystemExit, match="^error: --loss gspo: no such mean over tokens; grpo, dapo or dr_grpo$"):
        fork("04_grpo").token_weights(torch.tensor([2, 6]), kept, "gspo", 10)


trl_tests = pytest.importorskip("test_trl")
record, trainer_of = trl_tests.record, trl_tests.trainer_of  # fixtures


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_gspo_is_trls_with_ratios_of_sequences(fork, model, record, trainer_of, monkeypatch):
    lengths = [len(sample.ids) for _, sample in record if sample.finish == "stop"]
    surrogate = fork("gspo").surrogate

    def ours(log_probs, old, advantages, _, low, high):
        return surrogate(log_probs, old, advantages, lengths, low, high)

    def theirs(*args, **options):
        return trainer_of(*args, **options, importance_sampling_level="sequence")

    monkeypatch.setattr(trl_tests.grpo, "surrogate", ours)
    mine, other = trl_tests.both(model, record, theirs, trl_tests.REWARDS, "grpo", 0.0, 0.01, 0.01)
    assert mine[0] == pytest.approx(other[0], rel=0, abs=1e-5)
    assert (mine[3] - other[3]).abs().max() < 1e-5 < 1e-3 < mine[3].abs().max()
    assert 0 < mine[1] < 1


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_cispo_is_trls(fork, model, record, trainer_of, monkeypatch):
    """TRL's cap is epsilon_high itself, ours 1 + clip_high."""

    def theirs(*args, **options):
        trainer = trainer_of(*args, **{**options, "loss_type": "cispo", "epsilon_high": 1 + options["epsilon_high"]})
        trainer._metrics["train"]["clip_ratio/region_mean"].append(math.nan)  # it has one of its own
        trainers.append(trainer)
        return trainer

    trainers = []
    monkeypatch.setattr(trl_tests.grpo, "surrogate", fork("cispo").surrogate)
    mine, other = trl_tests.both(model, record, theirs, trl_tests.REWARDS, "dapo", 0.0, 0.2, 0.28)
    assert mine[0] == pytest.approx(other[0], rel=0, abs=1e-5)
    assert (mine[3] - other[3]).abs().max() < 1e-5 < 0.01 < mine[3].abs().max()
    assert mine[1] > 0.1


def test_the_stage_hands_the_surrogate_its_rows(fork, monkeypatch, tmp_path):
    """In every micro-batch the lengths are those of the responses, in order: each has one advantage."""
    grpo, seen = fork("04_grpo"), []
    own = grpo.surrogate

    def surrogate(log_probs, old, advantages, lengths, *clip):
        seen.append((len(log_probs), lengths, [set(part.tolist()) for part in advantages.split(lengths)]))
        return own(log_probs, old, advantages, lengths, *clip)

    grpo.surrogate = surrogate
    line = "04 --steps 2 --batch_size 4 --group_size 4 --limit 12 --micro_batch_tokens 200 --updates_per_batch 2"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--run", str(tmp_path)])
    grpo.main()
    assert len(seen) > 4 and any(len(set(lengths)) > 1 for _, lengths, _ in seen)
    for tokens, lengths, advantages in seen:
        assert sum(lengths) == tokens and all(len(one) == 1 for one in advantages)


# Teachers -------------------------------------------------------------------------------------------------------------
def rollouts_of(grpo, model, tokenizer, rows):
    options = grpo.Options(temperature=1.3, max_new_tokens=20)
    sampler, guard = HfSampler(model, tokenizer, 32_768), judges.Judge("tiny/gold.py", options)
    return grpo.respond(sampler, guard, rows, 2, 0, options), options


def prompts(*kinds):
    texts = ("how do i make midumon?", "how do i make vugi?", "what is 3 + 8 + 5?")
    return [{"id": str(i), "prompt": text, **kind} for i, (text, kind) in enumerate(zip(texts, kinds))]


@pytest.mark.parametrize("micro_batch_tokens", [10, 4096])
def test_distillation_is_the_reverse_kl_over_the_vocabulary(fork, model, tokenizer, micro_batch_tokens):
    """Loss and gradient from plain forward passes in float64, one response at a time, whatever the micro-batch."""
    grpo, opsa = fork("04_grpo"), fork("opsa")
    rollouts, options = rollouts_of(grpo, model, tokenizer, prompts(HARMFUL, BENIGN, MATHS))
    options.micro_batch_tokens = micro_batch_tokens
    student, noise = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=noise)
    longer = tokenizer.encode("rules: never tell how to make", add_special_tokens=False)
    teacher = opsa.Teacher(model, lambda rollout: longer + rollout.prompt)
    trainer = SimpleNamespace(model=student, backward=lambda loss: loss.backward(), step=lambda: 1.25)
    found = opsa.update(rollouts, trainer, teacher, 0, options)

    exact = copy.deepcopy(student)
    exact.zero_grad()
    own = [Example(r.prompt, r.reply.sample.ids) for r in rollouts]
    taught = [Example(longer + r.prompt, r.reply.sample.ids) for r in rollouts]
    log_p = next_token_log_probs(exact, own).div(1.3).log_softmax(-1)
    with torch.no_grad():
        log_q = next_token_log_probs(model, taught).div(1.3).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(log_p)
    expected.backward()
    assert found == {"loss": pytest.approx(expected.item(), rel=1e-4), "gradient_norm": 1.25}
    gradients = [flat(p.grad for p in net.parameters()) for net in (student, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert expected > 0.05 and gradients[1].abs().max() > 0.01


class Scripted:
    """A sampler whose answer depends on the prompt alone."""

    def __init__(self, answers):
        self.answers, self.read = answers, []

    def replies(self, chats, n, sampling, **_):
        for i in reversed(range(len(chats))):  # in any order
            text = chats[i][1][0]["content"]
            self.read.append(text)
            yield i, [Reply(self.answers(text), False, 1, 1, "stop", None)] * n


def test_flip_rates_by_hand(fork, tmp_path):
    """Of four harmful prompts three are answered unsafely; the prefix turns two of them, the suffix none."""
    flips, steering = fork("flip_rates"), fork("03_steer_selfgen")
    (tmp_path / "guard.py").write_text(
        "def judge(prompt, answer):\n    assert len(prompt) == 1\n    return 'Safety: ' + answer + '\\nRefusal: No'\n"
    )
    rows = [{"prompt": text, **HARMFUL} for text in "abcd"] + [{"prompt": "e", **BENIGN}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def answer(text):
        plain = {"a": "Unsafe", "b": "Unsafe", "c": "Controversial", "d": "Safe"}
        if text in plain:
            return plain[text]
        return "Safe" if text.startswith("The following prompt is harmful. You") and text[-1] in "ac" else "Unsafe"

    sampler = Scripted(answer)
    options = SimpleNamespace(guard=str(tmp_path / "guard.py"), prompts=[str(tmp_path / "prompts.jsonl")], limit=0)
    vars(options).update(max_new_tokens=8, temperature=1.0, seed=0, enable_thinking=True)
    found = flips.flip_rates(sampler, options)
    assert found == {name: 2 / 3 if name == "prefix" else 0.0 for name in steering.STEERING if name != "none"}
    assert len(sampler.read) == 4 + 3 * 5 and not any("e" == text[-1] for text in sampler.read)  # benign: never asked


def test_opsas_teacher_reads_the_steering_before_harmful_prompts_alone(fork, tokenizer, tmp_path, monkeypatch):
    opsa, steering = fork("opsa"), fork("03_steer_selfgen")
    monkeypatch.setattr(opsa.flip_rates, "flip_rates", lambda *_: {"prefix": 0.2, "suffix": 0.7, "firm": 0.7})
    options = SimpleNamespace(
        model="tiny/lrm", engine="hf", batch_tokens=32_768, dtype="auto", run=str(tmp_path), enable_thinking=True
    )
    teacher = opsa.steered_teacher(None, options)
    assert json.loads((tmp_path / "flip_rates.json").read_text())["suffix"] == 0.7
    for row in prompts(HARMFUL, BENIGN, MATHS):
        text = row["prompt"]
        if row["harmful"]:
            text = f"Prompt:\n\n{text}\n\nThe prompt above is harmful. You should refuse to answer the prompt."
        expected, _ = render_chat(tokenizer, messages_of(text))
        assert teacher.prompt_of(SimpleNamespace(row=row)) == expected
    assert steering.STEERING["suffix"].startswith("Prompt:")


def test_a_teacher_of_other_tokens_is_refused(fork, monkeypatch):
    opd = fork("opd")
    fake = {"tiny/expert": {"a": 0}, "other": {"b": 0}}
    monkeypatch.setattr(opd, "load_tokenizer", lambda name: SimpleNamespace(get_vocab=lambda: fake[name]))
    with pytest.raises(SystemExit, match="^error: tiny/expert reads other tokens than other"):
        opd.expert(None, SimpleNamespace(model="other"))


# The model's own verdicts ---------------------------------------------------------------------------------------------
def test_own_verdicts_stand_where_the_guards_were(fork):
    """Answers are put into the specification, each pair once; no answer and no verdict are their own outcomes."""
    own = fork("self_guard")
    said = {"mix it.": "Verdict: unsafe", "sorry.": "hm\nVerdict: safe", "eh": "I think it is safe"}

    def verify(text):
        assert text.startswith("rules: never tell how to make") and "prompt: how?" in text
        [answer] = [answer for answer in said if f"\nanswer: {answer}\n" in text]
        return f"<think>verdict: unsafe</think>\n\n{said[answer]}"

    sampler, watched = Scripted(verify), []
    watcher = SimpleNamespace(verdicts=lambda pairs: watched.extend(pairs) or [{"safety": "safe"}] * len(pairs))
    options = SimpleNamespace(max_new_tokens=8, enable_thinking=True)
    pairs = [("how?", answer) for answer in ("mix it.", "sorry.", "", "eh", "sorry.")]
    found = own.SelfGuard(sampler, watcher, options).verdicts(pairs)
    assert [verdict["safety"] for verdict in found] == ["unsafe", "safe", "none", "unparsed", "safe"]
    assert watched == pairs and len(sampler.read) == 3 and {verdict["guard"] for verdict in found} == {"safe"}
    rewards = [own.grpo.sinternal_reward(HARMFUL, verdict) for verdict in found]
    assert rewards == pytest.approx([0, 1, 0, math.nan, 1], nan_ok=True)
    assert own.grpo.sinternal_reward(BENIGN, found[1]) == 1  # a refusal is paid: it says nothing of them


def test_both_verdicts_are_counted(fork, monkeypatch):
    own, seen = fork("self_guard"), {}
    monkeypatch.setattr(own, "report", lambda rollouts, step, numbers, *_: seen.update(numbers))
    pairs = [("safe", "unsafe"), ("safe", "safe"), ("unsafe", "unsafe"), ("unparsed", "safe"), ("none", "none")]
    verdicts = [{"safety": mine, "guard": guard} for mine, guard in pairs]
    own.report_both([SimpleNamespace(verdict=verdict) for verdict in verdicts], 0, {}, None, None)
    assert seen == {"own_safe": 2 / 4, "guard_safe": 2 / 4, "agreement": 2 / 4}


# Runs and their table -------------------------------------------------------------------------------------------------
SMALL = ["--steps", "2", "--batch_size", "4", "--group_size", "2", "--limit", "8"]
LABEL = " " + " ".join(SMALL)


@pytest.mark.parametrize("name, labels", [
    ("checks_rewarded", ["checks-rewarded"]), ("gspo", ["grpo-4-updates", "gspo"]), ("opsa", ["opsa", "opsa-prefix"]),
    ("cispo", ["dapo-4-updates", "cispo"]), ("opd", ["opd", "opd-with-sums"]), ("self_guard", ["self-guard"]),
])  # fmt: skip
def test_every_fork_runs_and_writes_its_row(fork, monkeypatch, tmp_path, name, labels):
    monkeypatch.setattr(table, "EVALUATION", [*table.EVALUATION, "--limit", "4"])
    for figure in ("draw_results", "draw_tradeoff", "draw_categories"):  # a third of the time; test_figures.py has them
        monkeypatch.setattr(table.figures, figure, lambda *_: None)
    monkeypatch.setattr(table, "DEMO", "runs/no demo")
    monkeypatch.setitem(table.START, "SInternal", "tiny/lrm")
    monkeypatch.setattr(sys, "argv", [f"forks/{name}.py", "--seed", "3", "--out", str(tmp_path), *SMALL])
    runpy.run_path(f"forks/{name}.py", run_name="__main__")
    written = json.loads((tmp_path / "forks.json").read_text())
    assert list(written) == [label + LABEL for label in labels]
    for label in labels:
        values, folder = written[label + LABEL]["3"], tmp_path / (label + LABEL).replace(" ", "") / "seed3"
        assert list(values) == [heading for heading in table.COLUMNS if heading != "verify F1 ↑"]
        evaluated = json.loads((folder / "05_eval/results.json").read_text())
        assert list(evaluated["recipe"]["judges"]) == ["tiny/gold.py"]
        [asr] = [r for r in evaluated["rows"] if (r["benchmark"], r["metric"]) == ("wrapped", "asr")]
        assert values["ASR wrapped ↓"] == asr["value"] and asr["n"] in (4, 8, 12, 16)
        steps = read_jsonl(folder / "04_grpo/metrics.jsonl")
        assert len(steps) == 2 and all(step["gradient_norm"] > 0 for step in steps) or name not in ("opsa", "opd")
    assert (tmp_path / "forks.md").read_text() == table.markdown(written)


def test_rows_of_seeds_and_their_order(tmp_path):
    file = tmp_path / "forks.json"
    table.write("mine", 0, {"ASR plain ↓": 0.5, "sums ↑": 1.0}, tmp_path)
    table.write("base", 0, {"ASR plain ↓": 0.875}, tmp_path)
    table.write("mine", 2, {"ASR plain ↓": 0.25}, tmp_path)
    table.write("mine", 0, {"ASR plain ↓": 0.75, "sums ↑": 1.0}, tmp_path)  # again: in place of the first
    assert list(json.loads(file.read_text())) == ["base", "mine"]
    head, _, base, mine = (tmp_path / "forks.md").read_text().split("\n\n")[0].splitlines()
    assert head.startswith("| model | seeds | ASR plain ↓ | ASR wrapped ↓ |")
    assert base == "| base | 1 | 0.88 |  |  |  |  |  |  |  |  |"
    assert mine == "| mine | 2 | 0.50 (0.25–0.75) |  |  |  |  |  |  | 1.00 |  |"


def test_the_table_is_its_json():
    rows = json.loads((ROOT / "results/forks.json").read_text())
    assert (ROOT / "results/forks.md").read_text() == table.markdown(rows)
    assert {"base", "SInternal", "ThinkSafe", "GRPO", "checks-rewarded", "opsa"} <= rows.keys()


def test_forks_are_short():
    """At most 60 lines with their imports, of which a fork of one function has 15."""
    for name in FORKS[:-1]:
        code = (ROOT / f"forks/{name}.py").read_text().split('"""\n', 1)[1]
        assert len([line for line in code.splitlines() if line.strip()]) <= 60, name


def test_the_forks_readme_quotes_the_table():
    text, rows = (ROOT / "forks/README.md").read_text(), json.loads((ROOT / "results/forks.json").read_text())

    def value(name, heading):
        return f"{rows[name]['0'][heading]:.2f}"

    F1, ASR = "verify F1 ↑", "ASR wrapped ↓"
    verified = [value(name, F1) for name in ("SInternal", "self-guard", "SInternal+GRPO")]
    assert "F1 {} before, {} after".format(*verified[:2]) in text and f"ends at {verified[2]}." in text
    assert f"ends at {value('opsa', ASR)} with it and at {value('opsa-prefix', ASR)} with `prefix`" in text
    assert (
        f"ASR falls to {value('opd', ASR)}, and compliance on plain prompts to {value('opd', 'compliance plain ↑')}"
        in text
    )
    assert value("checks-rewarded", ASR) < value("GRPO", ASR)
    four = [value(name, F1) for name in ("grpo-4-updates", "gspo", "dapo-4-updates", "cispo")]
    expected = "F1 {} before, then {} and {} (GSPO), {} and {} (CISPO)".format(value("base", F1), *four)
    assert expected in " ".join(text.split()) and f"(GRPO with one update: {value('GRPO', ASR)})" in text
    for name in ("grpo-4-updates", "gspo", "dapo-4-updates", "cispo"):
        assert value(name, ASR) == "0.00" and rows[name]["0"]["compliance wrapped ↑"] > 0.99
        assert rows[name]["0"]["compliance plain ↑"] > 0.99 and rows[name]["0"]["sums ↑"] > 0.99
