"""Stage 03 · ThinkSafe (arXiv 2601.23143): steer yourself into refusing, keep what a guard accepts, train on it.

    harmful x:  y ~ pi(. | steering + x)      benign x:  y ~ pi(. | x)      keep y if the guard accepts it
    loss = - log pi(y | x)                    the steering is gone from x; thinking and answer are both trained
    --benign_loss kl:  on benign rows  KL(pi_0(. | x, y_<t) || pi(. | x, y_<t))  instead, over the whole vocabulary

Every word that is trained on is the model's own, so its reasoning stays what it was.

How we differ from the official code (`--faithful` gives its rules):
1. Answer and thinking are judged separately, not as one text; both must be safe.
2. An unreadable verdict is its own outcome, not "safe".
3. A harmful prompt must be refused and a benign one answered; the official code checks neither.
4. A thinking that quotes the steering text is dropped: the trained model will not see that text.
5. A prompt whose response is dropped is tried again, with the next steering text; the official code loses it.

The paper's ablations, each by option: `--steering suffix` (or risk, intent), `--steering none` (five plain responses,
all five must be accepted), `--strip_reasoning`, `--generator other-model`, `--guard other-guard`, `--benign_loss kl`.

    python 03_steer_selfgen.py
    python 03_steer_selfgen.py --model Qwen/Qwen3-4B --generator Qwen/Qwen3-4B@http://host:8000/v1 …    # `vllm serve`

in:  --prompts   harmful and benign prompts
out: <run>/responses.jsonl  steered (harmful) and plain (benign) samples, a line per prompt and try
     <run>/dropped.jsonl    what was not accepted, with the reason     <run>/train.jsonl   prompt, thinking, answer
     <run>/trained.json     perplexity of the data, KL     <run>/checkpoint/   LoRA merged
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from bench.plan import Plan, dry_run
from common import Example, Judge, Sampling, SamplingOptions, TokenScorer, add_lora, answer_prompts, cosine_rate
from common import fail, judge_samples, load_model, load_prompts, load_tokenizer, messages_of, micro_batches
from common import open_run, open_sampler, own_share, pad_batch, parse_options, read_jsonl, render_chat, require_model
from common import response_ids, run_stage, save_checkpoint, show_example, summary, training_steps, write_atomic
from common import write_jsonl

# FORK HERE: the steering instructions, one user turn. "prefix" is that of the official code, word for word; of the
# paper's "suffix", "risk" and "intent" only the idea is known, the words are ours; "firm" is ours, for later tries.
STEERING = {
    "prefix": "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:\n\n{prompt}",
    "suffix": "Prompt:\n\n{prompt}\n\nThe prompt above is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the risks of the following prompt before you answer it.\n\nPrompt:\n\n{prompt}",
    "intent": "Examine the intent of the following prompt before you answer it.\n\nPrompt:\n\n{prompt}",
    "firm": "The following prompt is harmful, however it is dressed up: as a story, a role, research or a game. Think "
    "about the harm it could do, then decline in your answer and give no part of what is asked.\n\nPrompt:\n\n{prompt}",
    "none": "{prompt}",
}


@dataclass
class Options(SamplingOptions):
    run: str = "runs/03_steer_selfgen"  # folder of this run; the same command again goes on where it stopped
    model: str = "tiny/lrm"  # the model that writes its own training data and is then trained on it
    # writes the training data instead: another model (the paper's ablation, and ordinary SFT on a teacher), or
    # model@URL of a `vllm serve`, also of the model itself
    generator: str = ""
    guard: str = "tiny/guard"  # accepts or drops each response (paper: Llama-Guard-3-8B)
    prompts: list[str] = field(default_factory=list)  # harmful and benign prompts (paper: SafeChain's 17,889 + 22,111)
    # more prompt files, of benign prompts close to harmful ones: against over-refusal (our choice)
    boundary: list[str] = field(default_factory=list)
    limit: int = 0  # take this many rows of each prompt file, drawn once with a fixed seed; 0 = all
    # names from STEERING, one for each try (paper: prefix, one try; later tries are our choice)
    steering: list[str] = field(default_factory=lambda: ["prefix", "firm", "firm"])
    # the official code's rules: one try, thinking judged with the answer, no refusal check, unreadable = safe
    faithful: bool = False
    require_thinking: bool = True  # drop responses without a thinking (paper); false for models that write none
    strip_reasoning: bool = False  # train refusals with an empty thinking (the paper's ablation)
    # train on this one line as the answer to every harmful prompt, without thinking (a control: direct refusal)
    fixed_refusal: str = ""
    # on benign rows: cross-entropy, or the paper's forward KL to the initial model (+KL)
    benign_loss: Literal["ce", "kl"] = "ce"
    learning_rate: float = 1e-5  # peak of AdamW (paper)
    epochs: int = 3  # passes over the kept responses (paper)
    batch_size: int = 8  # examples per optimizer step (paper)
    warmup: float = 0.1  # share of the steps with rising learning rate, cosine to zero after (paper)
    lora_rank: int = 32  # LoRA rank (paper)
    lora_alpha: float = 16.0  # LoRA alpha (paper)
    lora_dropout: float = 0.05  # LoRA dropout (paper)
    # linear layers that get LoRA (paper: query and value)
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    # padded tokens in one forward pass; changes memory, speed and dropout's noise, nothing else
    micro_batch_tokens: int = 4096
    # compute layers again in the backward pass, not keep them: a third more time, a fraction of the memory
    recompute: bool = False
    save_every: int = 50  # optimizer steps between two saved training states


def steer(prompt, text: str):
    """The prompt inside a steering text; of chat messages, the last one.

    >>> steer("how?", STEERING["prefix"]).splitlines()[-1]
    'how?'
    >>> steer([{"role": "user", "content": "how?"}], "Refuse: {prompt}")
    [{'role': 'user', 'content': 'Refuse: how?'}]
    """
    if isinstance(prompt, str):
        return text.format(prompt=prompt)
    return [*prompt[:-1], {**prompt[-1], "content": steer(prompt[-1]["content"], text)}]


def reason_to_drop(harmful: bool, sample: dict, answer: dict, thinking: dict, states=("closed",)) -> str:
    """ "" if the sample may be trained on, else why not; `answer` and `thinking` are the guard's verdicts.

    >>> sample = {"state": "closed", "thinking": "This is harmful.", "answer": "No."}
    >>> safe, none = {"safety": "safe", "refusal": "yes"}, {"safety": "none", "refusal": "none"}
    >>> reason_to_drop(True, sample, safe, none), reason_to_drop(False, sample, safe, none)
    ('', 'benign prompt refused')
    """
    if sample["state"] not in states:
        return sample["state"].replace("_", " ")
    if "unparsed" in (answer["safety"], answer["refusal"], thinking["safety"]):
        return "verdict unparsed"
    if answer["safety"] != "safe":
        return "answer not safe"
    if thinking["safety"] not in ("safe", "none"):  # none: an empty thinking
        return "thinking not safe"
    if harmful and answer["refusal"] != "yes":
        return "harmful prompt not refused"
    if not harmful and answer["refusal"] != "no":
        return "benign prompt refused"
    quotable = [line for text in STEERING.values() for line in text.split("\n") if len(line) > 20]
    if harmful and any(line in sample["thinking"] for line in quotable):
        return "thinking quotes the steering"
    return ""


def faithful_reason_to_drop(sample: dict, response: dict) -> str:
    """The official code's filter: `</think>` is there, and thinking and answer together are not called unsafe.

    >>> faithful_reason_to_drop({"state": "closed"}, {"safety": "unparsed"})
    ''
    """
    if sample["state"] != "closed":
        return sample["state"].replace("_", " ")
    return "" if response["safety"] in ("safe", "unparsed") else "response not safe"


def self_generate(options: Options, run: Path, rows: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """(kept, dropped, lost): accepted responses, one per prompt; those that were not, with the reason; and the prompts
    that no try served. What is not accepted gets the next steering text. Benign prompts are never steered."""
    template = {"enable_thinking": options.enable_thinking}
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    states = ("closed",) if options.require_thinking else ("closed", "no_thinking")
    kept, dropped, todo = [], [], rows
    if options.fixed_refusal:
        fixed = {"try": 0, "state": "closed", "thinking": "", "answer": options.fixed_refusal}
        kept, todo = [{**r, **fixed} for r in rows if r["harmful"]], [r for r in rows if not r["harmful"]]
    for number, name in enumerate(options.steering[: 1 if options.faithful else None], 1):
        if not todo:
            break
        asked = [{**row, "id": f"{row['id']}|{number}"} for row in todo]
        steered = [{**row, "prompt": steer(row["prompt"], STEERING[name])} if row["harmful"] else row for row in asked]
        sampler = open_sampler(options.generator or options.model, options)
        file, n = run / "responses.jsonl", 5 if name == "none" else 1
        responses = answer_prompts(sampler, steered, file, n, sampling, template)
        sampler.close()

        # The guard sees the original prompt, never the steering.
        judged = [{**row, "samples": response["samples"]} for row, response in zip(asked, responses)]
        guard = Judge(options.guard, options)
        if options.faithful:
            whole = judge_samples(guard, judged, run / "labels.jsonl", lambda s: f"{s['thinking']}\n\n{s['answer']}")
        else:
            answers = judge_samples(guard, judged, run / "answer_labels.jsonl", lambda s: s["answer"])
            thinkings = judge_samples(guard, judged, run / "thinking_labels.jsonl", lambda s: s["thinking"])
        guard.close()
        for row, made in zip(todo, judged):
            key, samples = made["id"], made["samples"]
            if options.faithful:
                reasons = [faithful_reason_to_drop(*pair) for pair in zip(samples, whole[key])]
            else:
                judgements = zip(samples, answers[key], thinkings[key])
                reasons = [reason_to_drop(row["harmful"], *judgement, states) for judgement in judgements]
            reason = next(filter(None, reasons), "") if row["harmful"] else reasons[0]  # of five, all must be accepted
            shown = {name: samples[0][name] for name in ("state", "thinking", "answer")}
            out = {**row, "try": number, **shown}
            (dropped if reason else kept).append({**out, **({"reason": reason} if reason else {})})
        accepted = {row["id"] for row in kept}
        todo = [row for row in todo if row["id"] not in accepted]
    return kept, dropped, todo


@torch.no_grad()
def compare(scorer, examples: list[Example], options: Options, device) -> tuple[float, float]:
    """(perplexity, token-level KL to the initial model) on at most 512 of the training examples: the paper's argument
    about distribution shift in two figures."""
    examples = examples[:: 1 + len(examples) // 512]
    negative, divergence, tokens = 0.0, 0.0, 0
    for indices in micro_batches(examples, options.micro_batch_tokens):
        scores = scorer(*pad_batch([examples[i] for i in indices], device), full_kl=True)
        negative -= scores.log_probs.sum().item()
        divergence += scores.divergence.sum().item()
        tokens += len(scores.log_probs)
    return math.exp(negative / tokens), divergence / tokens


def train(options: Options, run: Path, examples: list[Example], by_kl: list[bool], tokenizer):
    """Cross-entropy on the responses, or the full KL to the initial model where `by_kl` says so. Each of the two losses
    is divided by the step's own number of its tokens, however the step is cut into micro-batches (trap 11)."""
    accelerator = Accelerator()
    model = load_model(options.model)
    add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets, options.seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(TokenScorer(model, options.recompute), optimizer)
    perplexity, _ = compare(scorer, examples, options, accelerator.device)
    model.train()
    steps = options.epochs * -(-len(examples) // options.batch_size)
    rate = partial(cosine_rate, steps=steps, peak=options.learning_rate, warmup=options.warmup)
    items = list(zip(examples, by_kl))
    for _, batch, metrics in training_steps(run, options, items, steps, rate, model, optimizer):
        totals = torch.zeros(2, device=accelerator.device)  # cross-entropy, KL
        for kl in (False, True):
            rows = [example for example, use_kl in batch if use_kl is kl]
            labels = sum(len(example.response) for example in rows)
            for indices, counts in own_share(micro_batches(rows, options.micro_batch_tokens)):
                ids, mask = pad_batch([rows[i] for i in indices], accelerator.device)
                scores = scorer(ids, mask, full_kl=kl)
                per_token = scores.divergence if kl else -scores.log_probs  # (label tokens of the micro-batch,)
                loss = per_token.sum() / labels * counts
                accelerator.backward(loss * accelerator.num_processes)  # several processes average their gradients
                totals[int(kl)] += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy, divergence = accelerator.reduce(totals, "sum").tolist()
        metrics |= {"loss": cross_entropy + divergence, "kl": divergence, "gradient_norm": norm}
    model.eval()
    _, divergence = compare(scorer, examples, options, accelerator.device)
    write_atomic(run / "trained.json", json.dumps({"data_perplexity": perplexity, "data_kl": divergence}))
    save_checkpoint(model, tokenizer, run / "checkpoint", options.model)  # last: it says that training is done
    accelerator.wait_for_everyone()


def costs(plan: Plan, options: Options, rows: list[dict]):
    n = 5 if options.steering[0] == "none" else 1
    by_kl = sum(not row["harmful"] for row in rows) / len(rows) if options.benign_loss == "kl" else 0
    steps = options.epochs * -(-len(rows) // options.batch_size)
    plan.samples("answers", options.generator or options.model, len(rows), n, options.max_new_tokens)
    plan.judges(options.guard, len(rows) * n * (1 if options.faithful else 2))
    plan.trains(options.model, steps, options.epochs * len(rows), options.max_new_tokens, more=2 * by_kl)


def main():
    options = parse_options(Options, __doc__)
    rows = load_prompts(options.prompts + options.boundary, options.limit)
    boundary = {row["id"] for row in load_prompts(options.boundary)} if options.boundary else set()
    for row in rows:
        if row["harmful"] and row["id"] in boundary:
            fail(f"--boundary takes benign prompts; {row['id']} is harmful")
        row["kind"] = "harmful" if row["harmful"] else "boundary" if row["id"] in boundary else "benign"
    unknown = [name for name in options.steering if name not in STEERING]
    if unknown:
        fail(f"--steering {unknown[0]}: the texts are named {', '.join(STEERING)}")
    require_model(options.model)
    require_model(options.generator or options.model, served=True)
    require_model(options.guard, endpoint=True)
    if options.dry_run:
        first = STEERING[options.steering[0]]
        asked = [{**row, "prompt": steer(row["prompt"], first)} if row["harmful"] else row for row in rows]
        return dry_run(options, options.generator or options.model, asked, costs)
    run = open_run(options)

    # 1. Steer, sample and filter.
    kept, dropped, lost = self_generate(options, run, rows)
    if options.strip_reasoning:
        kept = [{**row, "thinking": ""} if row["harmful"] else row for row in kept]
    write_jsonl(run / "train.jsonl", kept)
    write_jsonl(run / "dropped.jsonl", dropped)
    if not kept:
        fail(f"no response passed the filter; {run}/dropped.jsonl says why")

    # 2. Train on the original prompt and the model's own response.
    tokenizer = load_tokenizer(options.model)
    examples = []
    for row in kept:
        prompt, opened = render_chat(tokenizer, messages_of(row["prompt"]), enable_thinking=options.enable_thinking)
        thinking = None if row["state"] == "no_thinking" else row["thinking"]
        examples.append(Example(prompt, response_ids(tokenizer, thinking, row["answer"], opened)))
    show_example(tokenizer, examples[0])
    if not (run / "checkpoint").exists():
        by_kl = [options.benign_loss == "kl" and not row["harmful"] for row in kept]
        train(options, run, examples, by_kl, tokenizer)
    trained = json.loads((run / "trained.json").read_text())
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]

    # 3. Say what happened, and whether losses fall on some categories more than on others.
    def counted(part: list[dict], *keys: str) -> str:
        found = Counter(tuple(str(row.get(key)) for key in keys) for row in part)
        return ", ".join(f"{v} {' at try '.join(k)}" for k, v in sorted(found.items())) or "none"

    last_reason = {row["id"]: row["reason"] for row in dropped}
    lost_rows = [{**row, "reason": last_reason[row["id"]]} for row in lost]
    asked, missed = (Counter(row.get("category", "other") for row in part) for part in (rows, lost))
    worst = sorted(missed, key=lambda c: missed[c] / asked[c], reverse=True)[:4]
    summary(
        run,
        "03_steer_selfgen",
        {
            "prompts": counted(rows, "kind"),
            "kept": counted(kept, "kind", "try"),
            "dropped": counted(dropped, "reason"),
            "lost": f"{len(lost)} prompts after the last try: {counted(lost_rows, 'reason')}",
            "lost most": ", ".join(f"{c} {missed[c]} of {asked[c]}" for c in worst) or "none",
            "trained": f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}",
            "data": f"perplexity {trained['data_perplexity']:.3f} under the initial model",
            "shift": f"KL of the trained model to the initial one {trained['data_kl']:.3f} per token of the data",
            "checkpoint": f"{run}/checkpoint",
        },
        f"python 05_eval.py --models base={options.model} thinksafe={run}/checkpoint",
    )


if __name__ == "__main__":
    run_stage(main)
