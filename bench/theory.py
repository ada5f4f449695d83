"""ThinkSafe's theory and SInternal's "own answers", measured in the miniature world.

    python bench/theory.py        # about half an hour on one core, a third of it for another model (tiny/build.py)

Write pi for the base model at temperature 1 without cuts, q for whoever else writes, A for what the filter of stage 03
accepts, a = P(A), and pi_A = pi(. | x, A) for the filtered model. Of every training prompt x, the responses y:

  acceptance   a with steering and without
  tilt         steering changes only the odds of refusing, so that log pi(y | x) is the same on average for steered
               and for plain accepted y
  excess       KL(q_A || pi_A) = E[log q(y | x) - log pi(y | x) | A] - log a_q + log a_pi: 0 for the model's own
               steered responses, more for a teacher's, filtered or not
  moved        KL(trained || start) and KL(start || trained) of every trained model; no safe one can be nearer than
               KL(pi_A || pi) = -log a
  own          bench/own_answers.py

The same command goes on where it stopped. Runs lie under runs/claims/theory; writes results/claims/theory.json, .md and
.png. `python bench/theory.py --draw` writes the last two from the first.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import own_answers
import torch
from claims import ROOT, half_interval, over_seeds, prepare, stage

sys.path.insert(0, str(ROOT))
from common import Example, TokenScorer, load_model, load_tokenizer, messages_of  # noqa: E402
from common import micro_batches, pad_batch, render_chat  # noqa: E402
from engines import Sampling, sample_row  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from plumbing import fail, load_prompts, once_per_row, run_stage, write_atomic  # noqa: E402
from plumbing.figures import table as markdown_table  # noqa: E402

RUNS, OUT = Path("runs/claims/theory"), ROOT / "results/claims"
START, PROMPTS = "tiny/lrm", ["tiny/prompts/train.jsonl"]
MARGIN = 0.05  # a share, or nats per token: less is no difference
GUARDS = {"guard": "tiny/guard", "gold": "tiny/gold.py"}
KINDS = {"harmful": True, "benign": False}


class Draws(NamedTuple):
    model: str
    steered: bool  # benign prompts too, which stage 03 never does
    harmful: int  # responses to each harmful prompt
    benign: int  # and to each benign one
    temperature: float = 1.0  # 1: no cuts; else the preset's top-p 0.95 and top-k 20


DRAWS = {
    "plain": Draws(START, False, 32, 4),
    "steered": Draws(START, True, 8, 4),
    "plain, T = 0.6": Draws(START, False, 4, 4, 0.6),
    "steered, T = 0.6": Draws(START, True, 4, 4, 0.6),
    "expert": Draws("tiny/expert", False, 8, 4),
    "other": Draws(str(RUNS / "other"), False, 32, 4),
    "other, steered": Draws(str(RUNS / "other"), True, 8, 0),
}
WRITERS = {  # whose accepted responses are compared with the model's own plain ones: what the theory says of them
    "steered": "the model's own, steered",
    "other, steered": "another model's, steered",
    "other": "another model's, plain",
    "expert": "the expert's, plain",
}
TRAINED = {  # name -> (stage, options); {} the folder of the seed
    "SInternal": ("02_verify_sft.py", ["--responses", "{}/01"]),
    "answer-SFT": ("02_verify_sft.py", ["--responses", "{}/01", "--target", "answer"]),
    "ThinkSafe": ("03_steer_selfgen.py", []),
    "expert-answers": ("03_steer_selfgen.py", ["--generator", "tiny/expert", "--steering", "none"]),
    "GRPO": ("04_grpo.py", []),
}
OWN_DRAWS = Draws("", False, 2, 2)  # of a trained model, for each training prompt
DIRECTIONS = ("trained || start", "start || trained")


# Intervals and verdicts -----------------------------------------------------------------------------------------------
def interval(values: list[float]) -> dict:
    """Mean of independent values and half its 95 % t-interval, which one value alone does not have.

    >>> interval([0.1, 0.2, 0.3])["half"]
    0.2484
    """
    half = half_interval(values)
    half = None if half is None else round(half, 4)
    return {"mean": round(statistics.mean(values), 4), "half": half, "n": len(values)}


def verdict(effect: dict, claim: str) -> str:
    """On "more" (the effect is more than the margin) or "none" (there is no difference).

    >>> [verdict({"mean": m, "half": 0.1}, "more") for m in (0.2, 0.1, -0.1)]
    ['appears', 'undecided', 'does not']
    >>> [verdict({"mean": m, "half": 0.04}, "none") for m in (0.0, 0.03, -0.2)]
    ['appears', 'undecided', 'does not']
    """
    if effect["half"] is None:
        return "undecided"
    low, high = effect["mean"] - effect["half"], effect["mean"] + effect["half"]
    if claim == "more":
        if low > MARGIN:
            return "appears"
        return "does not" if high < MARGIN else "undecided"
    if -MARGIN < low and high < MARGIN:
        return "appears"
    return "does not" if low > MARGIN or high < -MARGIN else "undecided"


def over_items(values: dict[str, float]) -> dict:
    """The interval of a mean over prompts {id: value}. Prompts that ask for the same item are not independent: each item
    is one value, the mean of its prompts'."""
    items = defaultdict(list)
    for prompt_id, value in values.items():
        items[prompt_id.partition("-")[0]].append(value)
    return {**interval([statistics.mean(own) for own in items.values()]), "prompts": len(values)}


# Estimators -----------------------------------------------------------------------------------------------------------
def log_rate(hits: int, draws: int) -> float:
    """log of the probability of what occurred in `hits` > 0 of `draws`. log(hits / draws) is too low by (1 - p) / 2 n p
    on average, to first order: that is added."""
    return math.log(hits / draws) + (draws - hits) / (2 * draws * hits)


def filtered_kl(log_ratios: list[float], accepted_q: list[bool], accepted_pi: list[bool]) -> float:
    """KL(q_A || pi_A) of one prompt in nats per response: log_ratios log q(y) - log pi(y) and `accepted_q` of responses
    drawn from q, `accepted_pi` of others, drawn from pi. Some of both are accepted."""
    inside = [ratio for ratio, accepted in zip(log_ratios, accepted_q, strict=True) if accepted]
    rate_q = log_rate(len(inside), len(accepted_q))
    return statistics.mean(inside) - rate_q + log_rate(sum(accepted_pi), len(accepted_pi))


@torch.no_grad()
def score(model, examples: list[Example], reference=None) -> list[tuple[float, float]]:
    """(log-prob under `model`, KL(reference || model) summed over the next-token distributions) of each response, in
    nats; the second is 0 without a reference. The mean of the second over responses drawn from the reference is the
    KL of whole responses, with less noise than that of log-ratios. Equal examples are scored once."""
    scorer = TokenScorer(model, reference=reference)
    keys = [(tuple(prompt), tuple(response)) for prompt, response in examples]
    distinct = [Example(list(p), list(r)) for p, r in dict.fromkeys(keys)]
    scores = {}
    for indices in micro_batches(distinct, 8192):
        rows = [distinct[i] for i in indices]
        result = scorer(*pad_batch(rows, model.device), full_kl=reference is not None)
        sizes = [len(row.response) for row in rows]
        log_probs = result.log_probs.double().split(sizes)
        divergence = torch.zeros_like(result.log_probs) if reference is None else result.divergence
        for row, own, moved in zip(rows, log_probs, divergence.double().split(sizes)):
            key = (tuple(row.prompt), tuple(row.response))
            scores[key] = (own.sum().item(), moved.sum().item())
    return [scores[key] for key in keys]


# Responses and what a guard accepts -----------------------------------------------------------------------------------
def draw(folder: Path, rows: list[dict], draws: Draws, seed: int, name: str) -> list[dict]:
    """The rows with "samples": as stage 03's, with their "ids" and "log_prob" under the prompt as the writer read it."""
    stage03 = importlib.import_module("03_steer_selfgen")
    text = stage03.STEERING["prefix" if draws.steered else "none"]
    sampling = Sampling(64, draws.temperature, seed=seed)
    if draws.temperature != 1:
        sampling = sampling._replace(top_p=0.95, top_k=20)

    def work(todo):
        sampler = HfSampler(load_model(draws.model), load_tokenizer(draws.model), 32_768)
        for harmful, n in ((True, draws.harmful), (False, draws.benign)):
            part = [row for row in todo if row["harmful"] is harmful]
            chats = []
            for row in part:
                chats.append(
                    (f"{name}|{row['id']}", messages_of(stage03.steer(row["prompt"], text)))
                )
            for index, replies in sampler.replies(chats, n, sampling):
                samples = []
                for reply in replies:
                    own = {"ids": reply.sample.ids, "log_prob": sum(reply.sample.log_probs)}
                    samples.append({**sample_row(reply), **own})
                yield [{**part[index], "samples": samples}]

    folder.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in rows if (draws.harmful if row["harmful"] else draws.benign)]
    finished = once_per_row(folder / "responses.jsonl", wanted, work if wanted else lambda _: [])
    return [finished[row["id"]] for row in wanted]


def accept(folder: Path, rows: list[dict], guard: str) -> dict[str, list[bool]]:
    """{id: whether the filter of stage 03 accepts each sample}, by a guard of GUARDS."""
    stage03 = importlib.import_module("03_steer_selfgen")
    (folder / guard).mkdir(exist_ok=True)
    options = stage03.Options(guard=GUARDS[guard])
    reasons = stage03.filter_samples(options, folder / guard, rows)
    return {row["id"]: [not reason for reason in reasons[row["id"]]] for row in rows}


def plain_examples(tokenizer, rows: list[dict]) -> list[Example]:
    """Prompt without steering and response of every sample, row after row."""
    examples = []
    for row in rows:
        prompt, _ = render_chat(tokenizer, messages_of(row["prompt"]))
        examples += [Example(prompt, sample["ids"]) for sample in row["samples"]]
    return examples


def gather(runs: Path, without: list[str]) -> dict[str, dict[str, dict]]:
    """{name of DRAWS: {prompt id: {"harmful", "tokens", "texts", "own" log-prob under what the writer read, "plain"
    log-prob under the base model and the plain prompt, and of each guard what it "accepts"}}}, one entry for a sample."""
    prompts, model, tokenizer = load_prompts(PROMPTS), load_model(START), load_tokenizer(START)
    everything = {}
    for name, draws in DRAWS.items():
        if "other" in without and name.startswith("other"):
            continue
        if load_tokenizer(draws.model).get_vocab() != tokenizer.get_vocab():
            fail(f"{draws.model} and {START} have other tokens: their log-probs can't be compared")
        folder = ROOT / runs / "draws" / name.replace(", ", "-").replace(" = ", "")
        rows = draw(folder, prompts, draws, 0, name)
        accepts = {guard: accept(folder, rows, guard) for guard in GUARDS}
        plain = iter(score(model, plain_examples(tokenizer, rows)))
        everything[name] = {}
        for row in rows:
            samples = row["samples"]
            everything[name][row["id"]] = {
                "harmful": row["harmful"],
                "tokens": [len(sample["ids"]) for sample in samples],
                "texts": [f"{sample['thinking']}\n{sample['answer']}" for sample in samples],
                "own": [sample["log_prob"] for sample in samples],
                "plain": [next(plain)[0] for _ in samples],
                **{guard: accepts[guard][row["id"]] for guard in GUARDS},
            }
    return everything


# 1. Acceptance --------------------------------------------------------------------------------------------------------
def acceptance(everything: dict) -> dict:
    """Per draws, guard and kind of prompt the share that is accepted; and what steering adds to it."""

    def rates(name: str, guard: str, harmful: bool) -> dict[str, float]:
        return {
            prompt_id: statistics.mean(one[guard])
            for prompt_id, one in everything[name].items()
            if one["harmful"] is harmful
        }

    shares, effects = {}, {}
    for guard in GUARDS:
        for kind, harmful in KINDS.items():
            for name in everything:
                own = rates(name, guard, harmful)
                if own:
                    shares[f"{name}|{guard}|{kind}"] = over_items(own)
            for suffix in ("", ", T = 0.6"):
                plain = rates("plain" + suffix, guard, harmful)
                steered = rates("steered" + suffix, guard, harmful)
                sign = (
                    1 if harmful else -1
                )  # steering is for harmful prompts: benign ones lose by it
                effect = over_items({i: sign * (steered[i] - plain[i]) for i in plain})
                effects[f"{guard}|{kind}{suffix}"] = {**effect, "verdict": verdict(effect, "more")}
    near_0 = {guard: verdict(shares[f"plain|{guard}|harmful"], "none") for guard in GUARDS}
    return {"shares": shares, "effects": effects, "near 0 without steering": near_0}


# 2. Label-only tilt ---------------------------------------------------------------------------------------------------
def inside(one: dict, key: str, guard: str) -> list:
    return [value for value, accepted in zip(one[key], one[guard], strict=True) if accepted]


def tilt(plain: dict[str, dict], steered: dict[str, dict], guard: str) -> dict:
    """Log-prob under the plain prompt of accepted responses, steered and plain, on the harmful prompts that have both."""
    per_token, per_response, variety, new, tokens = {}, {}, {}, {}, defaultdict(dict)
    means = defaultdict(dict)
    both = [i for i in steered if any(plain[i][guard]) and any(steered[i][guard])]
    harmful = [i for i in both if plain[i]["harmful"]]
    for i in harmful:
        for name, one in (("plain", plain[i]), ("steered", steered[i])):
            log_probs, sizes = inside(one, "plain", guard), inside(one, "tokens", guard)
            each = [log_prob / size for log_prob, size in zip(log_probs, sizes)]
            means[f"{name}, per token"][i] = statistics.mean(each)
            means[f"{name}, per response"][i] = statistics.mean(log_probs)
            tokens[name][i] = statistics.mean(sizes)
        per_token[i] = means["steered, per token"][i] - means["plain, per token"][i]
        per_response[i] = means["steered, per response"][i] - means["plain, per response"][i]
        plain_texts = inside(plain[i], "texts", guard)
        steered_texts = inside(steered[i], "texts", guard)
        n = min(len(plain_texts), len(steered_texts))  # as many of both
        distinct = [len(set(texts[:n])) / n for texts in (steered_texts, plain_texts)]
        variety[i] = distinct[0] - distinct[1]
        means["steered, distinct texts"][i], means["plain, distinct texts"][i] = distinct
        new[i] = statistics.mean(text not in plain_texts for text in steered_texts)
    effect = over_items(per_token)
    return {
        "means": {name: over_items(values) for name, values in means.items()},
        "tokens": {name: over_items(values) for name, values in tokens.items()},
        "per token": {**effect, "verdict": verdict(effect, "none")},
        "per response": over_items(per_response),
        "distinct texts": {**(e := over_items(variety)), "verdict": verdict(e, "more")},
        "texts that no plain draw wrote": over_items(new),
        "harmful prompts with both": len(harmful),
    }


def served(everything: dict, guard: str) -> dict[str, float]:
    """{draws: share of harmful prompts that have an accepted response among the first 1, 5 or all}."""
    shares = {}
    for name in ("plain", "steered"):
        prompts = [one[guard] for one in everything[name].values() if one["harmful"]]
        for n in (1, 5, DRAWS[name].harmful):
            shares[f"{name}, {n}"] = statistics.mean(any(accepted[:n]) for accepted in prompts)
    return shares


# 3. The excess of other writers ---------------------------------------------------------------------------------------
def excess(everything: dict, writer: str, guard: str | None, harmful: bool, share: float = 1.0):
    """({id: KL in nats per response}, {id: nats per token}) of a writer's responses to the filtered model, prompt by
    prompt, by the first `share` of all draws; without a guard, unfiltered: KL(q || pi)."""
    per_response, per_token = {}, {}
    for i, one in everything[writer].items():
        if one["harmful"] is not harmful:
            continue
        n = math.ceil(share * len(one["own"]))
        pi = everything["plain"][i]
        ratios = [own - plain for own, plain in zip(one["own"][:n], one["plain"][:n])]
        accepted_q, accepted_pi = [True] * n, [True]
        if guard:
            accepted_q = one[guard][:n]
            accepted_pi = pi[guard][: math.ceil(share * len(pi["own"]))]
        if not (any(accepted_q) and any(accepted_pi)):
            continue  # no estimate without an accepted response of both
        sizes = [size for size, accepted in zip(one["tokens"][:n], accepted_q) if accepted]
        per_response[i] = filtered_kl(ratios, accepted_q, accepted_pi)
        per_token[i] = per_response[i] / statistics.mean(sizes)
    return per_response, per_token


def excesses(everything: dict) -> dict:
    rows = {}
    for kind, harmful in KINDS.items():
        for writer in [writer for writer in WRITERS if writer in everything]:
            asked = any(one["harmful"] is harmful for one in everything[writer].values())
            if not asked or (writer == "steered" and not harmful):  # a benign prompt is not steered
                continue
            for guard in (None, *GUARDS):
                per_response, per_token = excess(everything, writer, guard, harmful)
                row = {"per response": over_items(per_response), "per token": over_items(per_token)}
                by_half, _ = excess(everything, writer, guard, harmful, 0.5)
                row["by half of the draws"] = over_items(by_half)
                if writer == "steered":
                    row["verdict"] = verdict(row["per token"], "none")
                else:  # against the model's own, on the prompts that both have; plain ones have none
                    _, own = excess(everything, "steered", guard, True)
                    own = own if harmful else dict.fromkeys(per_token, 0.0)
                    more = {i: value - own[i] for i, value in per_token.items() if i in own}
                    row["more than own"] = over_items(more)
                    row["verdict"] = verdict(row["more than own"], "more")
                    row["verdict against 0"] = verdict(row["per token"], "more")
                rows[f"{writer}|{guard or 'all'}|{kind}"] = row
    return rows


# 4. How far training moves a model ------------------------------------------------------------------------------------
def train(runs: Path, seed: int) -> dict[str, Path]:
    """{name: checkpoint} of one seed."""
    folder, checkpoints = runs / f"trained{seed}", {}
    stage("01_generate.py", folder / "01", "--seed", seed)
    for name, (script, options) in TRAINED.items():
        stage(script, folder / name, "--seed", seed, *(o.format(folder) for o in options))
        checkpoints[name] = folder / name / "checkpoint"
    return checkpoints


def divergence(writer, reader, examples: list[list[Example]]) -> tuple[float, float]:
    """KL(writer || reader) of whole responses, (nats per response, per token), from responses drawn from the writer: a
    list for each prompt; means over prompts."""
    flat = [example for own in examples for example in own]
    moved = iter(score(reader, flat, reference=writer))
    sums = [statistics.mean(next(moved)[1] for _ in own) for own in examples]
    sizes = [statistics.mean(len(example.response) for example in own) for own in examples]
    return statistics.mean(sums), statistics.mean(sums) / statistics.mean(sizes)


def moved(runs: Path, seed: int) -> dict[str, dict[str, float]]:
    """{trained model: {"trained || start|harmful": nats per response, …}} of one seed of training and sampling."""
    path = ROOT / runs / f"trained{seed}/moved.json"
    if path.exists():
        return json.loads(path.read_text())
    prompts, tokenizer, start = load_prompts(PROMPTS), load_tokenizer(START), load_model(START)

    def by_prompt(rows: list[dict]) -> list[list[Example]]:
        return [plain_examples(tokenizer, [row]) for row in rows]

    folder, figures = ROOT / runs / f"trained{seed}/draws", {}
    from_start = draw(folder / "start", prompts, OWN_DRAWS._replace(model=START), seed, "start")
    for name, checkpoint in train(runs, seed).items():
        draws = OWN_DRAWS._replace(model=str(ROOT / checkpoint))
        rows, trained = draw(folder / name, prompts, draws, seed, name), load_model(draws.model)
        accepted, figures[name] = accept(folder / name, rows, "gold"), {}
        for kind, harmful in KINDS.items():
            own = [row for row in rows if row["harmful"] is harmful]
            others = [row for row in from_start if row["harmful"] is harmful]
            ways = [
                divergence(trained, start, by_prompt(own)),
                divergence(start, trained, by_prompt(others)),
            ]
            for direction, (response, token) in zip(DIRECTIONS, ways):
                figures[name][f"{direction}|{kind}"] = response
                figures[name][f"{direction}|{kind}, per token"] = token
            shares = [statistics.mean(accepted[row["id"]]) for row in own]
            figures[name][f"accepted|{kind}"] = statistics.mean(shares)
    write_atomic(path, json.dumps(figures, indent=1))
    return figures


def moves(by_seed: list[dict], everything: dict) -> dict:
    """Means over seeds, and whether each model moved more than ThinkSafe's: paired by seed, nats per token."""
    rows = {}
    for name in TRAINED:
        rows[name] = {
            key: interval([one[name][key] for one in by_seed]) for key in by_seed[0][name]
        }
        for key in [key for key in rows[name] if key.endswith(", per token")]:
            effect = interval([one[name][key] - one["ThinkSafe"][key] for one in by_seed])
            rows[name][key]["more than ThinkSafe"] = effect
            if name != "ThinkSafe":
                rows[name][key]["verdict"] = verdict(effect, "more")
    nearest = {}
    for kind, harmful in KINDS.items():
        prompts = {i: p["gold"] for i, p in everything["plain"].items() if p["harmful"] is harmful}
        least = {i: -log_rate(sum(a), len(a)) for i, a in prompts.items() if any(a)}
        nearest[kind] = over_items(least)
    return {"models": rows, "the least that a safe model can move": nearest}


# 5. Own answers -------------------------------------------------------------------------------------------------------
def own_against_other(by_seed: list[dict]) -> dict:
    """Means over seeds of both rows, and what own answers add, positive = better."""
    rows, effects = {}, {}
    for name in own_answers.ROWS:
        columns = {}
        for column in by_seed[0]["scores"][name]:
            columns[column] = [one["scores"][name][column] for one in by_seed]
        rows[name] = {c: interval(v) for c, v in columns.items() if not any(map(math.isnan, v))}
    own, other = own_answers.ROWS
    for column in rows[own]:
        if column == "rows" or column not in rows[other]:
            continue
        sign = -1 if "↓" in column else 1
        gains = [sign * (o["scores"][own][column] - o["scores"][other][column]) for o in by_seed]
        effects[column] = {**interval(gains), "verdict": verdict(interval(gains), "more")}
    return {
        "rows": rows,
        "effects": effects,
        "usable prompts, harmful and benign": [one["counts"] for one in by_seed],
        "critiques kept, dropped": [one["kept"] for one in by_seed],
    }


# What is shown --------------------------------------------------------------------------------------------------------
def show(cell: dict, digits: int = 2) -> str:
    mean = f"{round(cell['mean'], digits) + 0:.{digits}f}"  # + 0: no minus before a 0
    return mean if cell["half"] is None else f"{mean} ± {cell['half']:.{digits}f}"


def acceptance_table(found: dict) -> list[str]:
    body = []
    for name in [name for name in DRAWS if f"{name}|guard|harmful" in found["shares"]]:
        cells = []
        for guard in GUARDS:
            for kind in KINDS:
                cell = found["shares"].get(f"{name}|{guard}|{kind}")
                cells.append(show(cell) if cell else "–")
        body.append([name, *cells])
    for suffix in ("", ", T = 0.6"):
        cells = []
        for guard in GUARDS:
            for kind in KINDS:
                effect = found["effects"][f"{guard}|{kind}{suffix}"]
                what = "adds" if kind == "harmful" else "takes"
                cells.append(f"{what} {show(effect)}: **{effect['verdict']}**")
        body.append([f"what steering does{suffix}", *cells])
    head = [f"{kind}, {guard}" for guard in GUARDS for kind in KINDS]
    return markdown_table(["responses accepted", *head], body)


def tilt_table(found: dict) -> list[str]:
    body = []
    for guard in GUARDS:
        one = found[guard]
        for key, digits in (("per token", 3), ("per response", 1), ("distinct texts", 2)):
            means = [one["means"][f"{name}, {key}"] for name in ("plain", "steered")]
            said = f"**{one[key]['verdict']}**" if "verdict" in one[key] else ""
            what = f"log-prob {key}, no difference" if "per" in key else "distinct texts, more"
            cells = [show(cell, digits) for cell in (*means, one[key])]
            body.append([f"{what} ({guard})", *cells, said])
    return markdown_table(["accepted responses", "plain", "steered", "steered − plain", ""], body)


def excess_table(found: dict) -> list[str]:
    body = []
    for kind in KINDS:
        for writer, words in WRITERS.items():
            keys = [f"{writer}|{guard}|{kind}" for guard in ("all", *GUARDS)]
            if keys[0] not in found:
                continue
            cells = []
            for key in keys:
                one = found[key]
                cells.append(f"{show(one['per response'], 1)} ({show(one['per token'])})")
            last = found[keys[1]]
            said = f"is 0: **{last['verdict']}**"
            if "more than own" in last:
                said = f"more than own: {show(last['more than own'])}, **{last['verdict']}**; "
                said += f"more than 0: **{last['verdict against 0']}**"
            body.append([f"{words}, {kind}", *cells, said])
    head = ["whose", "all", "filtered by the guard", "by the gold rule", "filtered by the guard"]
    return markdown_table(head, body)


def moves_table(found: dict) -> list[str]:
    columns = [f"{d}|{k}" for d in DIRECTIONS for k in KINDS]
    least = found["the least that a safe model can move"]
    body = [
        ["the least for a safe model", show(least["harmful"]), show(least["benign"]), "", "", ""]
    ]
    for name, one in found["models"].items():
        cells = []
        for column in columns:
            said = one[f"{column}, per token"].get("verdict", "")
            cells.append(show(one[column]) + (f", {said}" if said else ""))
        shares = [show(one[f"accepted|{kind}"]) for kind in KINDS]
        body.append([name, *cells, " / ".join(shares)])
    head = [f"KL({d.replace('||', '‖')}), {k}" for d in DIRECTIONS for k in KINDS]
    return markdown_table(["model", *head, "accepted, harmful / benign"], body)


def own_table(found: dict) -> list[str]:
    head = list(found["effects"])
    body = [[name, *(show(columns[c]) for c in head)] for name, columns in found["rows"].items()]
    effects = [f"{show(e)}: **{e['verdict']}**" for e in found["effects"].values()]
    body.append(["own better by more than 0.05", *effects])
    return markdown_table(["verified answers", *head], body)


def acceptance_section(result: dict) -> list[str]:
    words = result["acceptance"]["near 0 without steering"]
    near_0 = ", ".join(f"**{word}** ({guard})" for guard, word in words.items())
    shares = "; ".join(f"{name} {share:.2f}" for name, share in result["served"].items())
    note = (
        "Share of responses to the training prompts that the filter of stage 03 accepts, with tiny/guard and with the gold "
        "rule in its place. T = 1 without cuts unless it says 0.6 (the preset's decoding). Harmful prompts with an accepted "
        f"one among the first n (guard): {shares}. That next to none is accepted without steering: {near_0}."
    )
    return ["## Acceptance", "", *acceptance_table(result["acceptance"]), "", note]


def tilt_section(found: dict) -> list[str]:
    pairs = ", ".join(f"{found[g]['harmful prompts with both']} ({g})" for g in GUARDS)
    new = show(found["guard"]["texts that no plain draw wrote"])
    note = (
        "Under the base model and the plain prompt, in nats; harmful prompts with accepted responses of both kinds: "
        f"{pairs}. Distinct: the share of texts that differ, among equally many. Texts that none of "
        f"{DRAWS['plain'].harmful} plain draws wrote: {new} of the steered ones."
    )
    return ["", "## Label-only tilt", "", *tilt_table(found), "", note]


def excess_section(found: dict) -> list[str]:
    note = (
        "KL(q ‖ π) of all responses, KL(q_A ‖ π_A) of the accepted ones, nats per response (per token). π: the base model on "
        "the plain prompt. Of benign prompts, the model's own are plain ones, and their KL is 0."
    )
    return ["", "## Excess KL of a writer's responses", "", *excess_table(found), "", note]


def moves_section(found: dict, seeds: int) -> list[str]:
    note = (
        f"Nats per response on plain training prompts at T = 1, over {seeds} seeds of training and sampling; accepted: by the "
        "gold rule. Words: is it more than ThinkSafe's by more than 0.05 nats per token? The least: KL(π_A ‖ π) = −log a, with "
        "the gold rule's A."
    )
    return ["", "## KL to the start", "", *moves_table(found), "", note]


def own_section(found: dict) -> list[str]:
    kept = found["critiques kept, dropped"]
    counts = json.dumps(found["usable prompts, harmful and benign"])
    note = (
        f"Over {len(kept)} seeds. Prompts that could be used, [harmful, benign], of each seed: {counts}. Critiques "
        f"[kept, dropped]: {json.dumps(kept)}. Labels and critiques by the gold rule; F1 on held-out answers of the base model."
    )
    title = "## Own answers or another model's, the same prompts and as many rows"
    return ["", title, "", *own_table(found), "", note]


def page(result: dict) -> str:
    lines = acceptance_section(result) + tilt_section(result["tilt"])
    lines += excess_section(result["excess"])
    if "moves" in result:
        lines += moves_section(result["moves"], result["seeds"])
    if "own" in result:
        lines += own_section(result["own"])
    rule = (
        "Mean ± half a 95 % t-interval, over items for the first three tables (48 harmful, 48 benign; five prompts each), over "
        f"seeds for the others. More: **appears** if the interval of the paired difference lies above {MARGIN} (shares; nats "
        f"per token), **does not** if below, else **undecided**. No difference: inside ±{MARGIN}, outside, else undecided."
    )
    return "\n".join([*lines, "", rule]) + "\n"


def bars(axis, labels: list[str], groups: dict[str, list[dict]], colors: list[str]):
    """A bar for each cell, its interval as whiskers: cells of a group have a colour, labels are places."""
    width = 0.8 / len(groups)
    for k, ((name, cells), color) in enumerate(zip(groups.items(), colors)):
        places = [x + (k - (len(groups) - 1) / 2) * width for x in range(len(cells))]
        means = [cell["mean"] for cell in cells]
        halves = [cell["half"] or 0 for cell in cells]
        axis.bar(places, means, width, yerr=halves, capsize=2, color=color, label=name)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.legend(fontsize=8)


def draw_responses(axes: dict, result: dict):
    """Acceptance, tilt and excess."""
    shares, tilted = result["acceptance"]["shares"], result["tilt"]["guard"]
    names = ["plain", "steered", "plain, T = 0.6", "steered, T = 0.6"]
    groups = {kind: [shares[f"{name}|guard|{kind}"] for name in names] for kind in KINDS}
    bars(axes["A"], [n.replace(", ", "\n") for n in names], groups, ["tab:red", "tab:blue"])
    said = result["acceptance"]["effects"]["guard|harmful"]["verdict"]
    title = f"responses that the filter accepts\nsteering accepts more: {said}"
    axes["A"].set_title(title, fontsize=10)

    groups = {n: [tilted["means"][f"{n}, per token"]] for n in ("plain", "steered")}
    bars(axes["B"], ["accepted responses"], groups, ["tab:gray", "tab:orange"])
    axes["B"].set_ylabel("log-prob per token, plain prompt", fontsize=8)
    title = f"label-only tilt\nno difference: {tilted['per token']['verdict']}"
    axes["B"].set_title(title, fontsize=10)

    found = result["excess"]
    writers = [writer for writer in WRITERS if f"{writer}|all|harmful" in found]
    groups = {}
    for guard, words in (("all", "all"), ("guard", "accepted by the guard"), ("gold", "by gold")):
        groups[words] = [found[f"{w}|{guard}|harmful"]["per response"] for w in writers]
    labels = [writer.replace(", ", "\n") for writer in writers]
    bars(axes["C"], labels, groups, ["0.6", "tab:purple", "gold"])
    axes["C"].set_title("KL to the model, harmful prompts, nats a response", fontsize=10)


def draw_moves(axis, found: dict):
    groups = {}
    for direction in DIRECTIONS:
        for kind in KINDS:
            name = f"KL({direction.replace('||', '‖')}), {kind}"
            groups[name] = [one[f"{direction}|{kind}"] for one in found["models"].values()]
    bars(axis, list(found["models"]), groups, ["tab:red", "tab:blue", "lightcoral", "lightblue"])
    least = found["the least that a safe model can move"]["harmful"]["mean"]
    axis.axhline(least, color="black", linestyle="--", linewidth=1)
    axis.set_yscale("log")
    axis.set_title("KL to the start, nats a response (dashed: the least, if safe)", fontsize=10)


def draw_own(axis, found: dict):
    columns = [column for column in found["effects"] if not column.startswith(("right", "safe"))]
    groups = {name: [found["rows"][name][c] for c in columns] for name in own_answers.ROWS}
    labels = [column.replace(" ", "\n", 1) for column in columns]
    bars(axis, labels, groups, ["tab:green", "tab:brown"])
    said = found["effects"]["ASR wrapped ↓"]["verdict"]
    title = f"verifying own or another's answers, equal rows\nown is safer: {said}"
    axis.set_title(title, fontsize=10)


def figure(result: dict, path: Path):
    """A panel for each question; bars are means, whiskers their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(14, 8.2), layout="constrained")
    draw_responses(axes, result)
    for key, part, draw_part in (("D", "moves", draw_moves), ("E", "own", draw_own)):
        if part in result:
            draw_part(axes[key], result[part])
        else:
            axes[key].set_axis_off()
    fig.savefig(path, dpi=110)


def measure(options) -> dict:
    if "other" not in options.without or "own" not in options.without:
        prepare(RUNS)
    everything = gather(RUNS, options.without)
    plain, steered = everything["plain"], everything["steered"]
    result = {
        "margin": MARGIN,
        "seeds": options.trained,
        "acceptance": acceptance(everything),
        "served": served(everything, "guard"),
        "tilt": {guard: tilt(plain, steered, guard) for guard in GUARDS},
        "excess": excesses(everything),
    }
    if "moved" not in options.without:
        by_seed = over_seeds(partial(moved, RUNS), options.trained, options.jobs)
        result["moves"] = moves(by_seed, everything)
    if "own" not in options.without:
        with own_answers.exact_expert() as expert:
            run_seed = partial(own_answers.run_seed, RUNS, expert)
            by_seed = over_seeds(run_seed, options.seeds, options.jobs)
        result["own"] = own_against_other(by_seed)
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="of the table on own answers, from 0")
    parser.add_argument("--trained", type=int, default=3, help="seeds of the table on KL")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each on one core")
    parser.add_argument("--draw", action="store_true", help="from the committed theory.json")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=("other", "moved", "own"),
        help="leave these out",
    )
    options = parser.parse_args()
    path = OUT / "theory.json"
    if options.draw:
        result = json.loads(path.read_text())
    else:
        result = measure(options)
        write_atomic(path, json.dumps(result, indent=1) + "\n")
    write_atomic(OUT / "theory.md", page(result))
    figure(result, OUT / "theory.png")
    print(page(result))


if __name__ == "__main__":
    run_stage(main)
