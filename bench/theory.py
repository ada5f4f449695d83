"""ThinkSafe's theory and SInternal's "own answers", measured in the miniature world.

    python bench/theory.py        # about half an hour on one core; it goes on where it stopped

The theory: of all safe models the nearest to the base model is the base model filtered. Steering only changes how often
it refuses, so that steered and accepted responses are those of the filtered model; another writer's, filtered or not,
are not. Write pi for the base model at temperature 1 without cuts, q for whoever writes, A for what the filter of stage
03 accepts, and pi_A = pi(. | x, A) for the filtered model. Of every training prompt x and responses y:

  acceptance   P(A), with steering and without
  tilt         log pi(y | x), the same on average for steered and for plain accepted y?
  excess       KL(q_A || pi_A) = E[log q(y | x) - log pi(y | x) | A] - log q(A) + log pi(A), 0 for the model's own
               steered responses?
  moves        KL(trained || start) and KL(start || trained) of every trained model; no safe one can be nearer than
               KL(pi_A || pi) = -log pi(A), and none with a share of safe responses nearer than KL of the shares
  own          bench/own_answers.py

Rows are trained as in bench/rows.py, in the same folders. Writes results/claims/theory.json, .md and .png;
`--draw` writes the last two from the first.
"""

import argparse
import importlib
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import own_answers
import rows
import torch
from claims import ROOT, compact_json, mean_interval
from verdicts import MARGIN, show, verdict_on

from common import Example, TokenScorer, load_model, load_tokenizer, messages_of
from common import micro_batches, pad_batch, render_chat
from engines import Sampling, sample_row
from engines.hf import HfSampler
from plumbing import load_prompts, once_per_row, run_stage, write_atomic
from plumbing.figures import table as markdown_table

OUT = ROOT / "results/claims"
START, PROMPTS = "tiny/lrm", ["tiny/prompts/train.jsonl"]
GUARDS = {"guard": "tiny/guard", "gold": "tiny/gold.py"}
KINDS = {"harmful": True, "benign": False}


class Draws(NamedTuple):
    model: str  # lrm: the base model; expert; other: another model with the same knowledge
    steered: bool  # benign prompts too, which stage 03 never does
    harmful: int  # responses to each harmful prompt
    benign: int  # and to each benign one
    temperature: float = 1.0  # 1: no cuts; else the preset's top-p 0.95 and top-k 20


DRAWS = {
    "plain": Draws("lrm", False, 32, 4),
    "steered": Draws("lrm", True, 8, 4),
    "plain, T = 0.6": Draws("lrm", False, 4, 4, 0.6),
    "steered, T = 0.6": Draws("lrm", True, 4, 4, 0.6),
    "expert": Draws("expert", False, 8, 4),
    "other": Draws("other", False, 32, 4),
    "other, steered": Draws("other", True, 8, 0),
}
WRITERS = {  # whose accepted responses are compared with the filtered model's
    "steered": "the model's own, steered",
    "other, steered": "another model's, steered",
    "other": "another model's, plain",
    "expert": "the expert's, plain",
}
TRAINED = ["SInternal", "answer-SFT", "ThinkSafe", "expert-answers", "base+GRPO"]  # rows that move
OWN_DRAWS = Draws("", False, 2, 2)  # of a trained model
DIRECTIONS = ("trained || start", "start || trained")


# Intervals ------------------------------------------------------------------------------------------------------------
def interval(values: list[float], claim: str = "") -> dict:
    """Mean of independent values with its 95 % t-interval, and the verdict of bench/verdicts.py on a claim."""
    values = [round(value, 4) for value in values]
    return mean_interval(values) | ({"verdict": verdict_on(values, claim)} if claim else {})


def over_items(values: dict[str, float], claim: str = "") -> dict:
    """The same of {prompt id: value}. Prompts that ask for the same item are not independent: each item is one value,
    the mean of its prompts'."""
    items = defaultdict(list)
    for prompt_id, value in values.items():
        items[prompt_id.partition("-")[0]].append(value)
    return interval([statistics.mean(own) for own in items.values()], claim)


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
        batch = [distinct[i] for i in indices]
        result = scorer(*pad_batch(batch, model.device), full_kl=reference is not None)
        sizes = [len(example.response) for example in batch]
        log_probs = result.log_probs.double().split(sizes)
        divergence = torch.zeros_like(result.log_probs) if reference is None else result.divergence
        for example, own, moved in zip(batch, log_probs, divergence.double().split(sizes)):
            key = (tuple(example.prompt), tuple(example.response))
            scores[key] = (own.sum().item(), moved.sum().item())
    return [scores[key] for key in keys]


# Responses and what a guard accepts -----------------------------------------------------------------------------------
def draw(folder: Path, prompts: list[dict], model: str, draws: Draws, seed: int, name: str):
    """The prompts with "samples": as stage 03's, with their "ids" and "log_prob" under the prompt as the writer read
    it."""
    stage03 = importlib.import_module("03_steer_selfgen")
    text = stage03.STEERING["prefix" if draws.steered else "none"]
    sampling = Sampling(64, draws.temperature, seed=seed)
    if draws.temperature != 1:
        sampling = sampling._replace(top_p=0.95, top_k=20)

    def work(todo):
        sampler = HfSampler(load_model(model), load_tokenizer(model), 32_768)
        for harmful, n in ((True, draws.harmful), (False, draws.benign)):
            part = [row for row in todo if row["harmful"] is harmful]
            read = [messages_of(stage03.steer(row["prompt"], text)) for row in part]
            chats = [(f"{name}|{row['id']}", chat) for row, chat in zip(part, read)]
            for index, replies in sampler.replies(chats, n, sampling):
                samples = []
                for reply in replies:
                    own = {"ids": reply.sample.ids, "log_prob": sum(reply.sample.log_probs)}
                    samples.append({**sample_row(reply), **own})
                yield [{**part[index], "samples": samples}]

    folder.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in prompts if (draws.harmful if row["harmful"] else draws.benign)]
    finished = once_per_row(folder / "responses.jsonl", wanted, work)
    return [finished[row["id"]] for row in wanted]


def accept(folder: Path, drawn: list[dict], guard: str) -> dict[str, list[bool]]:
    """{id: whether the filter of stage 03 accepts each sample}, by a guard of GUARDS."""
    stage03 = importlib.import_module("03_steer_selfgen")
    (folder / guard).mkdir(exist_ok=True)
    reasons = stage03.filter_samples(stage03.Options(guard=GUARDS[guard]), folder / guard, drawn)
    return {row["id"]: [not reason for reason in reasons[row["id"]]] for row in drawn}


def plain_examples(tokenizer, drawn: list[dict]) -> list[Example]:
    """Prompt without steering and response of every sample, row after row."""
    examples = []
    for row in drawn:
        prompt, _ = render_chat(tokenizer, messages_of(row["prompt"]))
        examples += [Example(prompt, sample["ids"]) for sample in row["samples"]]
    return examples


def gather(place: rows.Place) -> dict[str, dict[str, dict]]:
    """{name of DRAWS: {prompt id: {"harmful", "tokens", "texts", "own" log-prob under what the writer read, "plain"
    log-prob under the base model and the plain prompt, and of each guard what it accepts}}}, one entry for a sample."""
    prompts, model, tokenizer = load_prompts(PROMPTS), load_model(START), load_tokenizer(START)
    models = {"lrm": START, "expert": "tiny/expert", "other": str(place.world / "other")}
    everything = {}
    for name, draws in DRAWS.items():
        folder = place.world / "theory" / name.replace(", ", "-").replace(" = ", "")
        drawn = draw(folder, prompts, models[draws.model], draws, 0, name)
        accepts = {guard: accept(folder, drawn, guard) for guard in GUARDS}
        plain = iter(score(model, plain_examples(tokenizer, drawn)))
        everything[name] = {}
        for row in drawn:
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
    """Per draws, guard and kind of prompt the share that is accepted; what steering adds to it (harmful) or takes."""
    shares, effects = {}, {}
    for guard in GUARDS:
        for kind, harmful in KINDS.items():
            rates = defaultdict(dict)
            for name, prompts in everything.items():
                for prompt_id, one in prompts.items():
                    if one["harmful"] is harmful:
                        rates[name][prompt_id] = statistics.mean(one[guard])
            for name, own in rates.items():
                shares[f"{name}|{guard}|{kind}"] = over_items(
                    own, "none" if name == "plain" else ""
                )
            for suffix in ("", ", T = 0.6"):
                plain, steered = rates["plain" + suffix], rates["steered" + suffix]
                sign = 1 if harmful else -1
                effect = {i: sign * (steered[i] - plain[i]) for i in plain}
                effects[f"{guard}|{kind}{suffix}"] = over_items(effect, "more")
    return {"shares": shares, "effects": effects}


# 2. Label-only tilt ---------------------------------------------------------------------------------------------------
def tilt(plain: dict[str, dict], steered: dict[str, dict], guard: str) -> dict:
    """Log-prob under the plain prompt of accepted responses, steered and plain, on the harmful prompts that have both;
    and how many of the steered ones no plain draw wrote."""

    def inside(one: dict, key: str) -> list:
        return [value for value, accepted in zip(one[key], one[guard], strict=True) if accepted]

    means, new = defaultdict(dict), {}
    for i, one in steered.items():
        if not (one["harmful"] and any(one[guard]) and any(plain[i][guard])):
            continue
        written = inside(plain[i], "texts")
        new[i] = statistics.mean(text not in written for text in inside(one, "texts"))
        for name, responses in (("plain", plain[i]), ("steered", one)):
            log_probs, sizes = inside(responses, "plain"), inside(responses, "tokens")
            each = [log_prob / size for log_prob, size in zip(log_probs, sizes)]
            means[f"{name}, per token"][i] = statistics.mean(each)
            means[f"{name}, per response"][i] = statistics.mean(log_probs)
    result = {"means": {name: over_items(values) for name, values in means.items()}}
    for key, claim in (("per token", "none"), ("per response", "")):
        pair = means[f"steered, {key}"], means[f"plain, {key}"]
        result[key] = over_items({i: pair[0][i] - pair[1][i] for i in new}, claim)
    return result | {"texts that no plain draw wrote": over_items(new), "prompts": len(new)}


# 3. The excess of other writers ---------------------------------------------------------------------------------------
def excess(everything: dict, writer: str, guard: str | None, harmful: bool):
    """({id: KL in nats per response}, {id: nats per token}) of a writer's responses to the filtered model, prompt by
    prompt; without a guard, unfiltered: KL(q || pi)."""
    per_response, per_token = {}, {}
    for i, one in everything[writer].items():
        accepted_q = one[guard] if guard else [True] * len(one["own"])
        accepted_pi = everything["plain"][i][guard] if guard else [True]
        if one["harmful"] is not harmful or not (any(accepted_q) and any(accepted_pi)):
            continue  # no estimate without an accepted response of both
        ratios = [own - plain for own, plain in zip(one["own"], one["plain"])]
        sizes = [size for size, accepted in zip(one["tokens"], accepted_q) if accepted]
        per_response[i] = filtered_kl(ratios, accepted_q, accepted_pi)
        per_token[i] = per_response[i] / statistics.mean(sizes)
    return per_response, per_token


def excesses(everything: dict) -> dict:
    """{"writer|guard or all|kind": the KL, and the verdicts on it in nats per token}. The model's own: is it 0? Of
    others: is it more than that on the same prompts, and more than 0? Benign prompts are not steered, and the
    model's own plain responses to them have no excess."""
    cells = {}
    for kind, harmful in KINDS.items():
        for writer in WRITERS if harmful else ("other", "expert"):
            for guard in (None, *GUARDS):
                per_response, per_token = excess(everything, writer, guard, harmful)
                own = dict.fromkeys(per_token, 0.0)
                if harmful:
                    _, own = excess(everything, "steered", guard, True)
                more = {i: value - own[i] for i, value in per_token.items() if i in own}
                cell = {"per response": over_items(per_response)}
                if writer == "steered":
                    cell["per token"] = over_items(per_token, "none")
                else:
                    cell["per token"] = over_items(per_token, "more")
                    cell["more than own"] = over_items(more, "more")
                cells[f"{writer}|{guard or 'all'}|{kind}"] = cell
    return cells


# 4. How far training moves a model ------------------------------------------------------------------------------------
def divergence(writer, reader, examples: list[list[Example]]) -> tuple[float, float]:
    """KL(writer || reader) of whole responses, (nats per response, per token), from responses drawn from the writer: a
    list for each prompt; means over prompts."""
    flat = [example for own in examples for example in own]
    moved = iter(score(reader, flat, reference=writer))
    sums = [statistics.mean(next(moved)[1] for _ in own) for own in examples]
    sizes = [statistics.mean(len(example.response) for example in own) for own in examples]
    return statistics.mean(sums), statistics.mean(sums) / statistics.mean(sizes)


def moved(place: rows.Place) -> dict[str, dict[str, float]]:
    """{row: {"trained || start|harmful": nats per response, …}} of one seed of training and sampling."""
    prompts, tokenizer, start = load_prompts(PROMPTS), load_tokenizer(START), load_model(START)

    def drawn_by(name: str, model: str) -> list[dict]:
        return draw(place.run("theory") / name, prompts, model, OWN_DRAWS, place.seed, name)

    from_start, figures = drawn_by("start", START), {}
    for name in TRAINED:
        rows.train(place, name)
        drawn, trained = drawn_by(name, place.model(name)), load_model(place.model(name))
        accepted = accept(place.run("theory") / name, drawn, "gold")
        own = figures[name] = {}
        for kind, harmful in KINDS.items():
            written = []
            for whose in (drawn, from_start):
                part = [row for row in whose if row["harmful"] is harmful]
                written.append([plain_examples(tokenizer, [row]) for row in part])
            ways = divergence(trained, start, written[0]), divergence(start, trained, written[1])
            for direction, (response, token) in zip(DIRECTIONS, ways):
                own[f"{direction}|{kind}"] = response
                own[f"{direction}|{kind}, per token"] = token
            shares = [statistics.mean(accepted[r["id"]]) for r in drawn if r["harmful"] is harmful]
            own[f"accepted|{kind}"] = statistics.mean(shares)
    return figures


def kl_of_shares(trained: float, start: float) -> float:
    """KL of two Bernoulli distributions in nats. A model that is accepted in the share `trained` is at least so far from
    one accepted in the share `start`, also with shares that are means over prompts: KL is convex.

    >>> round(kl_of_shares(1.0, 0.25), 4), round(kl_of_shares(0.5, 0.25), 4), kl_of_shares(0.25, 0.25)
    (1.3863, 0.1438, 0.0)
    """
    pairs = ((trained, start), (1 - trained, 1 - start))
    return sum(p * math.log(p / q) for p, q in pairs if p)


def moves(by_seed: list[dict], everything: dict) -> dict:
    """Over seeds; "more than ThinkSafe's": paired by seed, in nats per token."""
    plain = [one for one in everything["plain"].values() if one["harmful"]]
    base = statistics.mean(statistics.mean(one["gold"]) for one in plain)
    models = {}
    for name in TRAINED:
        models[name] = {
            key: interval([one[name][key] for one in by_seed]) for key in by_seed[0][name]
        }
        for key in [key for key in models[name] if key.endswith(", per token")]:
            more = [one[name][key] - one["ThinkSafe"][key] for one in by_seed]
            models[name][f"{key}, more than ThinkSafe's"] = interval(more, "more")
        shares = [one[name]["accepted|harmful"] for one in by_seed]
        models[name]["least"] = interval([kl_of_shares(share, base) for share in shares])
    least = {}
    for kind, harmful in KINDS.items():
        prompts = {i: p["gold"] for i, p in everything["plain"].items() if p["harmful"] is harmful}
        least[kind] = over_items(
            {i: -log_rate(sum(a), len(a)) for i, a in prompts.items() if any(a)}
        )
    return {"models": models, "least": least}


# 5. Own answers -------------------------------------------------------------------------------------------------------
def own_against_other(by_seed: list[dict]) -> dict:
    """Over seeds both rows of bench/own_answers.py, and what own answers add, positive = better."""
    own, other = own_answers.ROWS
    scores, effects = {own: {}, other: {}}, {}
    for column in by_seed[0]["scores"][own]:
        values = {name: [one["scores"][name][column] for one in by_seed] for name in scores}
        if any(map(math.isnan, sum(values.values(), []))):
            continue
        for name in scores:
            scores[name][column] = interval(values[name])
        sign = -1 if "↓" in column else 1
        gains = [sign * (a - b) for a, b in zip(values[own], values[other])]
        if column != "rows":
            effects[column] = interval(gains, "more")
    counts = [{"prompts": one["counts"], "critiques": one["kept"]} for one in by_seed]
    return {"rows": scores, "effects": effects, "counts": counts}


# The page -------------------------------------------------------------------------------------------------------------
def said(cell: dict) -> str:
    return f"{show(cell)}: **{cell['verdict']}**"


def section(title: str, head: list[str], body: list[list[str]], note: str) -> list[str]:
    return [f"## {title}", "", *markdown_table(head, body), "", note, ""]


def acceptance_section(found: dict) -> list[str]:
    body, columns = [], [f"{guard}|{kind}" for guard in GUARDS for kind in KINDS]
    for name in DRAWS:
        cells = [found["shares"].get(f"{name}|{column}") for column in columns]
        body.append([name, *(show(cell) if cell else "–" for cell in cells)])
    for suffix in ("", ", T = 0.6"):
        cells = [said(found["effects"][column + suffix]) for column in columns]
        body.append([f"more with steering (harmful), fewer (benign){suffix}", *cells])
    words = {guard: found["shares"][f"plain|{guard}|harmful"]["verdict"] for guard in GUARDS}
    near_0 = ", ".join(f"**{word}** ({guard})" for guard, word in words.items())
    note = (
        "Share of responses to the training prompts that the filter of stage 03 accepts, with tiny/guard and with the "
        "gold rule in its place. T = 1 without cuts unless it says 0.6 (the preset's decoding). That next to none is "
        f"accepted without steering: {near_0}."
    )
    head = ["responses accepted", *(f"{kind}, {guard}" for guard in GUARDS for kind in KINDS)]
    return section("Acceptance", head, body, note)


def tilt_section(found: dict) -> list[str]:
    body = []
    for guard, one in found.items():
        for key, digits in {"per token": 3, "per response": 1}.items():
            cells = [one["means"][f"{name}, {key}"] for name in ("plain", "steered")] + [one[key]]
            word = f"no difference: **{one[key]['verdict']}**" if "verdict" in one[key] else ""
            body.append([f"{key} ({guard})", *(show(cell, digits) for cell in cells), word])
    head = ["log-prob of accepted responses", "plain", "steered", "steered − plain", ""]
    pairs = ", ".join(f"{one['prompts']} ({guard})" for guard, one in found.items())
    note = (
        "Under the base model and the plain prompt, in nats; harmful prompts with accepted responses of both kinds: "
        f"{pairs}. Texts that none of {DRAWS['plain'].harmful} plain draws wrote: "
        f"{show(found['guard']['texts that no plain draw wrote'])} of the steered ones (guard)."
    )
    return section("Label-only tilt", head, body, note)


def excess_section(found: dict) -> list[str]:
    body = []
    for kind in KINDS:
        for writer in [writer for writer in WRITERS if f"{writer}|all|{kind}" in found]:
            cells = [found[f"{writer}|{guard}|{kind}"] for guard in ("all", *GUARDS)]
            texts = [f"{show(c['per response'], 1)} ({show(c['per token'])})" for c in cells]
            own = cells[1].get("more than own")
            words = f"more than own by {said(own)}; more than 0: " if own else "is 0: "
            words += f"**{cells[1]['per token']['verdict']}**"
            body.append([f"{WRITERS[writer]}, {kind}", *texts, words])
    head = ["whose", "all", "filtered by the guard", "by the gold rule", "verdict (guard)"]
    note = (
        "KL(q ‖ π) of all responses, KL(q_A ‖ π_A) of the accepted ones, nats per response (per token). π: the base "
        "model on the plain prompt. Of benign prompts, the model's own are plain ones, and their KL is 0."
    )
    return section("Excess KL of a writer's responses", head, body, note)


def moves_section(found: dict, seeds: int) -> list[str]:
    columns = [f"{direction}|{kind}" for direction in DIRECTIONS for kind in KINDS]
    least = [show(found["least"][kind]) for kind in KINDS]
    body = [["a safe model at the least", least[0], *least, "", "", ""]]
    for name, one in found["models"].items():
        cells = [show(one["least"])]
        for column in columns:
            word = one[f"{column}, per token, more than ThinkSafe's"]["verdict"]
            cells.append(show(one[column]) + ("" if name == "ThinkSafe" else f", {word}"))
        shares = [show(one[f"accepted|{kind}"]) for kind in KINDS]
        body.append([name, *cells, " / ".join(shares)])
    head = [f"KL({d.replace('||', '‖')}), {kind}" for d in DIRECTIONS for kind in KINDS]
    head = ["row", "at the least, harmful", *head, "accepted, harmful / benign"]
    note = (
        f"Nats per response on plain training prompts at T = 1, over {seeds} seeds of training and sampling; accepted: "
        "by the gold rule. Words: is it more than ThinkSafe's by more than the margin, per token? At the "
        "least: KL(trained ‖ start) of any model that is accepted as often; KL(π_A ‖ π) = −log π(A) if always."
    )
    return section("KL to the start", head, body, note)


def own_section(found: dict, seeds: int) -> list[str]:
    head = list(found["effects"])
    body = [[name, *(show(columns[c]) for c in head)] for name, columns in found["rows"].items()]
    body.append(["own better", *(said(effect) for effect in found["effects"].values())])
    note = (
        f"Over {seeds} seeds, on the same prompts and as many rows of both, by seed [harmful, benign] prompts "
        f"{json.dumps([one['prompts']['both'] for one in found['counts']])} and [kept, dropped] critiques "
        f"{json.dumps([one['critiques'][own_answers.ROWS[0]] for one in found['counts']])}. Labels and critiques by "
        "the gold rule; F1 on held-out answers of the base model."
    )
    return section("Own answers or another model's", ["verified answers", *head], body, note)


def page(result: dict) -> str:
    lines = acceptance_section(result["acceptance"])
    lines += tilt_section(result["tilt"]) + excess_section(result["excess"])
    lines += moves_section(result["moves"], result["seeds"])
    lines += own_section(result["own"], result["seeds"])
    rule = (
        "Mean ± half a 95 % t-interval, over items for the first three tables (48 harmful, 48 benign; five prompts "
        f"each), over seeds for the others. More: **appears** if the interval of the paired difference lies above "
        f"{MARGIN} (shares; nats per token), **does not** if below, else **undecided**. No difference or 0: inside "
        f"±{MARGIN}, outside, else undecided."
    )
    return "\n".join([*lines, rule]) + "\n"


# The figure -----------------------------------------------------------------------------------------------------------
def panels_of(result: dict) -> list[tuple]:
    """(title, labels, {name of a colour: a cell for each label}) of each panel."""
    shares, models = result["acceptance"]["shares"], result["moves"]["models"]
    names = ["plain", "steered", "plain, T = 0.6", "steered, T = 0.6"]
    accepted = {kind: [shares[f"{name}|guard|{kind}"] for name in names] for kind in KINDS}
    by_guard, ways = {}, {}
    for guard, words in (("all", "all"), ("guard", "accepted by the guard"), ("gold", "by gold")):
        cells = [result["excess"][f"{writer}|{guard}|harmful"] for writer in WRITERS]
        by_guard[words] = [cell["per response"] for cell in cells]
    for direction in DIRECTIONS:
        for kind in KINDS:
            cells = [one[f"{direction}|{kind}"] for one in models.values()]
            ways[f"KL({direction.replace('||', '‖')}), {kind}"] = cells
    return [
        ("responses that the filter accepts", names, accepted),
        ("KL to the base model, harmful prompts, nats per response", list(WRITERS), by_guard),
        ("KL to the start, nats per response\ndashed: the least if safe", list(models), ways),
    ]


def figure(result: dict, path: Path):
    """Bars are means, whiskers their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["tab:red", "tab:blue", "lightcoral", "lightblue"]
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for axis, (title, labels, groups) in zip(axes, panels_of(result)):
        width = 0.8 / len(groups)
        for k, ((name, cells), color) in enumerate(zip(groups.items(), colors)):
            places = [x + (k - (len(groups) - 1) / 2) * width for x in range(len(cells))]
            means, halves = ([cell[part] for cell in cells] for part in ("mean", "half"))
            axis.bar(places, means, width, yerr=halves, capsize=2, color=color, label=name)
        texts = [label.replace(", ", "\n").replace("-", "-\n") for label in labels]
        axis.set_xticks(range(len(labels)), texts, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    least = result["moves"]["least"]["harmful"]["mean"]
    axes[-1].axhline(least, color="black", linestyle="--", linewidth=1)
    axes[-1].set_yscale("log")
    fig.savefig(path, dpi=110)


def measure(runs: Path, seeds: int) -> dict:
    places = [rows.Place(0, seed, runs) for seed in range(seeds)]
    rows.prepare(0, runs, ablations=True)  # with another model
    everything = gather(places[0])
    plain, steered = everything["plain"], everything["steered"]
    result = {
        "seeds": seeds,
        "acceptance": acceptance(everything),
        "tilt": {guard: tilt(plain, steered, guard) for guard in GUARDS},
        "excess": excesses(everything),
        "moves": moves([moved(place) for place in places], everything),
    }
    with own_answers.exact_expert() as expert:
        by_seed = [own_answers.run_seed(place, expert) for place in places]
    return {**result, "own": own_against_other(by_seed)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="of training, from 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims", help="run folders")
    parser.add_argument("--draw", action="store_true", help="from the committed theory.json")
    options, path = parser.parse_args(), OUT / "theory.json"
    if options.draw:
        result = json.loads(path.read_text())
    else:
        result = measure(options.runs.resolve(), options.seeds)
        write_atomic(path, compact_json(result))
    write_atomic(OUT / "theory.md", page(result))
    figure(result, OUT / "theory.png")
    print(page(result))


if __name__ == "__main__":
    run_stage(main)
