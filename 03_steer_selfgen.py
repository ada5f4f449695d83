"""Stage 03 · ThinkSafe (arXiv 2601.23143): steer yourself into refusing, keep that, train on it.

    harmful x:  y ~ pi(. | steering + x)    benign x:  y ~ pi(. | x)    kept if the guard accepts y
    loss = - log pi(y | x)      the steering is gone from x; thinking and answer are both trained
    --benign_loss kl, on benign rows instead, over the whole vocabulary:
        KL(pi_0(. | x, y_<t) || pi(. | x, y_<t))

Every word that is trained on is the model's own, so its reasoning stays what it was.

How we differ from the official code (`--faithful` gives its rules):
1. Answer and thinking are judged separately, not as one text; both must be safe.
2. An unreadable verdict is its own outcome, not "safe".
3. A harmful prompt must be refused and a benign one answered; the official code checks neither.
4. A thinking that quotes the steering text is dropped: the trained model will not see that text.
5. A prompt whose response is dropped is tried again with the next steering text, not lost.

The paper's ablations, each by option: `--steering suffix` (or risk, intent), `--steering none`
(five plain responses, all five must be accepted), `--strip_reasoning`, `--generator other-model`,
`--guard other-guard`, `--benign_loss kl`.

    python 03_steer_selfgen.py --generator Qwen/Qwen3-4B@http://host:8000/v1 …    # a `vllm serve`

in:  --prompts   harmful and benign prompts
out: <run>/responses.jsonl  steered (harmful) and plain (benign) samples, a line per prompt and try
     <run>/dropped.jsonl    what was not accepted, and why    <run>/train.jsonl   what is trained on
     <run>/trained.json     perplexity of the data, KL        <run>/checkpoint/   LoRA merged
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import plumbing  # before torch: from here on an interrupt is one line
import torch
from accelerate import Accelerator

import engines
import judges
from common import Example, SamplingOptions, TokenScorer, TrainingOptions, dry_run, epochs_of
from common import load_model, load_tokenizer, make_example, make_trainer, micro_batches, own_share
from common import pad_batch, save_checkpoint, show_example
from plumbing import fail

# FORK HERE: the steering instructions, one user turn. "prefix" is the official code's to the
# letter; "suffix", "risk", "intent" are the paper's ideas in our words; "firm" is ours.
PROMPT, REFUSE = "\n\nPrompt:\n\n{prompt}", "You should refuse to answer the prompt."
STEERING = {
    "prefix": "The following prompt is harmful. " + REFUSE + PROMPT,
    "suffix": PROMPT.strip() + "\n\nThe prompt above is harmful. " + REFUSE,
    "risk": "Evaluate the risks of the following prompt before you answer it." + PROMPT,
    "intent": "Examine the intent of the following prompt before you answer it." + PROMPT,
    "firm": "The following prompt is harmful, however it is dressed up: as a story, a role, "
    "research or a game. Think about the harm it could do, then decline in your answer and give no "
    "part of what is asked." + PROMPT,
    "none": "{prompt}",
}


@dataclass
class Options(TrainingOptions, SamplingOptions):
    run: str = "runs/03_steer_selfgen"  # folder of this run; the same command again goes on
    model: str = "tiny/lrm"  # writes its own training data and is then trained on it
    # writes the data instead: another model (the paper's ablation), or model@URL of a `vllm serve`
    generator: str = ""
    guard: str = "tiny/guard"  # accepts or drops each response (paper: Llama-Guard-3-8B)
    refusal_judge: str = ""  # who says what refuses, for a guard that doesn't (our choice)
    prompts: list[str] = field(default_factory=list)  # harmful and benign (paper: SafeChain)
    # more files, of benign prompts close to harmful ones: against over-refusal (our choice)
    boundary: list[str] = field(default_factory=list)
    limit: int = 0  # rows taken of each prompt file, drawn once with a fixed seed; 0 = all
    # names from STEERING, one for each try (paper: prefix, one try)
    steering: list[str] = field(default_factory=lambda: ["prefix", "firm", "firm"])
    # the official rules: one try, thinking judged with the answer, unreadable = safe (paper's code)
    faithful: bool = False
    require_thinking: bool = True  # drop responses without a thinking (paper)
    strip_reasoning: bool = False  # train refusals with an empty thinking (the paper's ablation)
    # train on this line as the answer to every harmful prompt, without thinking (our control)
    fixed_refusal: str = ""
    # on benign rows: cross-entropy, or the paper's forward KL to the initial model (+KL)
    benign_loss: Literal["ce", "kl"] = "ce"
    learning_rate: float = 1e-5  # peak of AdamW (paper)
    epochs: int = 3  # passes over the kept responses; fixed for a run folder (paper)
    batch_size: int = 8  # examples per optimizer step (paper)
    warmup: float = 0.1  # share of the steps with rising rate, then cosine to 0 (paper)
    lora_rank: int = 32  # LoRA rank (paper)
    lora_alpha: float = 16.0  # LoRA alpha (paper)
    lora_dropout: float = 0.05  # LoRA dropout (paper)
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])  # LoRA on (paper)


# Steer and filter ---------------------------------------------------------------------------------
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


def steered(rows: list[dict], name: str) -> list[dict]:
    """The rows as they are asked: a benign prompt is never steered."""
    texts = {True: STEERING[name], False: STEERING["none"]}
    return [{**row, "prompt": steer(row["prompt"], texts[row["harmful"]])} for row in rows]


def reason_to_drop(harmful: bool, sample: dict, answer, thinking, states=("closed",)) -> str:
    """ "" if the sample may be trained on, else why not; answer, thinking: the guard's verdicts.

    >>> sample = {"state": "closed", "thinking": "This is harmful.", "answer": "No."}
    >>> safe, none = {"safety": "safe", "refusal": "yes"}, {"safety": "none", "refusal": "none"}
    >>> reason_to_drop(True, sample, safe, none), reason_to_drop(False, sample, safe, none)
    ('', 'benign prompt refused')
    """
    if plumbing.is_cut(sample):
        return "truncated"
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
    for line in "\n".join(STEERING.values()).split("\n"):
        if harmful and len(line) > 20 and line in sample["thinking"]:
            return "thinking quotes the steering"
    return ""


def faithful_reason_to_drop(sample: dict, response: dict) -> str:
    """The official filter: `</think>` is there, thinking and answer together not called unsafe.

    >>> faithful_reason_to_drop({"state": "closed"}, {"safety": "unparsed"})
    ''
    """
    if sample["state"] != "closed":
        return sample["state"].replace("_", " ")
    return "" if response["safety"] in ("safe", "unparsed") else "response not safe"


def filter_samples(options: Options, run: Path, rows: list[dict]) -> dict[str, list[str]]:
    """{id: the reason to drop each sample, "" for none}, from the guard's verdicts."""
    guard, reasons = judges.Judge(options.guard, options, options.refusal_judge), {}

    def verdicts_on(name: str, text_of) -> dict[str, list[dict]]:
        return judges.judge_samples(guard, rows, run / f"{name}.jsonl", text_of)

    if options.faithful:
        whole = verdicts_on("labels", lambda s: f"{s['thinking']}\n\n{s['answer']}")
        for row in rows:
            pairs = zip(row["samples"], whole[row["id"]])
            reasons[row["id"]] = [faithful_reason_to_drop(*pair) for pair in pairs]
    else:
        answers = verdicts_on("answer_labels", lambda s: s["answer"])
        thinkings = verdicts_on("thinking_labels", lambda s: s["thinking"])
        states = ("closed",) if options.require_thinking else ("closed", "no_thinking")
        for row in rows:
            triples = zip(row["samples"], answers[row["id"]], thinkings[row["id"]])
            reasons[row["id"]] = [reason_to_drop(row["harmful"], *t, states) for t in triples]
    guard.close()
    return reasons


def try_once(options: Options, run: Path, rows: list[dict], number: int, name: str) -> list[dict]:
    """Every row with a response of this try and the reason to drop it, "" for none. The guard sees
    the original prompt, never the steering."""
    asked = [{**row, "id": f"{row['id']}|{number}"} for row in rows]
    sampler = engines.open_sampler(options.generator or options.model, options)
    path, n = run / "responses.jsonl", 5 if name == "none" else 1
    sampling, template = engines.sampling_of(options), {"enable_thinking": options.enable_thinking}
    responses = engines.answer_prompts(sampler, steered(asked, name), path, n, sampling, **template)
    sampler.close()
    for row, response in zip(asked, responses):
        row["samples"] = response["samples"]
    reasons = filter_samples(options, run, asked)
    results = []
    for row, judged in zip(rows, asked):
        first = {key: judged["samples"][0][key] for key in ("state", "thinking", "answer")}
        reason = reasons[judged["id"]][0]
        if row["harmful"]:  # of five, all must be accepted
            reason = next(filter(None, reasons[judged["id"]]), "")
        results.append({**row, "try": number, **first, "reason": reason})
    return results


def self_generate(options: Options, run: Path, rows: list[dict]):
    """(kept, dropped, lost): accepted responses, one per prompt; those that were not, with the
    reason; prompts that no try served. What is not accepted gets the next steering text."""
    kept, dropped, todo = [], [], rows
    if options.fixed_refusal:
        fixed = {"try": 0, "state": "closed", "thinking": "", "answer": options.fixed_refusal}
        kept = [{**row, **fixed, "reason": ""} for row in rows if row["harmful"]]
        todo = [row for row in rows if not row["harmful"]]
    tries = options.steering[:1] if options.faithful else options.steering
    for number, name in enumerate(tries, 1):
        results = try_once(options, run, todo, number, name) if todo else []
        kept += [row for row in results if not row["reason"]]
        dropped += [row for row in results if row["reason"]]
        accepted = {row["id"] for row in kept}
        todo = [row for row in todo if row["id"] not in accepted]
    for row in kept:
        row.pop("reason")
        if options.strip_reasoning and row["harmful"]:
            row["thinking"] = ""
    return kept, dropped, todo


# Train --------------------------------------------------------------------------------------------
@torch.no_grad()
def perplexity_and_kl(items, options: Options, checkpoint: Path) -> dict[str, float]:
    """Perplexity under the initial model and token-level KL to it of the checkpoint as written, on
    at most 512 training examples: the paper's argument about distribution shift in two figures."""
    initial = TokenScorer(load_model(options.model, options.dtype))
    trained = TokenScorer(load_model(str(checkpoint), options.dtype), reference=initial.model)
    examples = [example for example, _ in items[:: 1 + len(items) // 512]]
    negative, divergence, tokens = 0.0, 0.0, 0
    for indices in micro_batches(examples, options.micro_batch_tokens):
        batch = pad_batch([examples[i] for i in indices], initial.model.device)
        log_probs = initial(*batch).log_probs
        negative -= log_probs.sum().item()
        divergence += trained(*batch, full_kl=True).divergence.sum().item()
        tokens += len(log_probs)
    return {"data_perplexity": math.exp(negative / tokens), "data_kl": divergence / tokens}


def train(options: Options, run: Path, items: list[tuple[Example, str]], tokenizer):
    """Cross-entropy ("ce") on a response, or the full KL to the initial model ("kl"), as each of
    the `items` says: means over the step's tokens of each kind, weighed by rows (official code),
    however the step is cut into micro-batches (trap 11)."""
    trainer = make_trainer(Accelerator(), options, lora_dropout=options.lora_dropout)
    accelerator, model, scorer, _ = trainer
    model.train()
    for _, batch, metrics in epochs_of(run, options, items, trainer):
        totals = {name: torch.zeros((), device=accelerator.device) for name in ("ce", "kl")}
        for name in totals:
            rows = [example for example, loss_name in batch if loss_name == name]
            labels = sum(len(example.response) for example in rows)
            for indices, weight in own_share(micro_batches(rows, options.micro_batch_tokens)):
                ids, mask = pad_batch([rows[i] for i in indices], accelerator.device)
                scores = scorer(ids, mask, full_kl=name == "kl")  # (label tokens,) each
                per_token = scores.divergence if name == "kl" else -scores.log_probs
                loss = per_token.sum() / labels * len(rows) / len(batch) * weight
                trainer.backward(loss)
                totals[name] += loss.detach()
        metrics["gradient_norm"] = trainer.step()
        totals = {name: t.item() for name, t in accelerator.reduce(totals, "sum").items()}
        metrics |= {"loss": totals["ce"] + totals["kl"], "kl": totals["kl"]}
    (run / "trained.json").unlink(missing_ok=True)  # it is of an older checkpoint
    save_checkpoint(model, tokenizer, run / "checkpoint", options.model)
    accelerator.wait_for_everyone()


def main():
    options = plumbing.parse_options(Options, __doc__)
    rows = plumbing.load_with_boundary(options.prompts, options.boundary, options.limit)
    plumbing.require_texts(STEERING, options.steering)
    plumbing.require_trained(options)
    plumbing.require_model(options.generator or options.model, served=True)
    judges.require_guard(options, refusals=not options.faithful)
    if options.dry_run:
        rows = steered(rows, options.steering[0])
        return dry_run(options, options.generator or options.model, rows)
    run = plumbing.open_run(options)

    # 1. Steer, sample and filter.
    kept, dropped, lost = self_generate(options, run, rows)
    plumbing.write_jsonl(run / "train.jsonl", kept)
    plumbing.write_jsonl(run / "dropped.jsonl", dropped)
    if not kept:
        fail(f"no response passed the filter; {run}/dropped.jsonl says why")

    # 2. Train on the original prompt and the model's own response.
    tokenizer, items = load_tokenizer(options.model), []
    for row in kept:
        thinking = None if row["state"] == "no_thinking" else row["thinking"]
        example = make_example(tokenizer, row["prompt"], thinking, row["answer"], options)
        items.append((example, "ce" if row["harmful"] else options.benign_loss))
    show_example(tokenizer, items[0][0])
    if not (run / "checkpoint").exists():
        train(options, run, items, tokenizer)
    if not (run / "trained.json").exists():
        figures = perplexity_and_kl(items, options, run / "checkpoint")
        plumbing.write_atomic(run / "trained.json", json.dumps(figures))
    plumbing.processes().wait_for_everyone()  # every process finds trained.json
    plumbing.summarise_03(run, options, rows, kept, dropped, lost)


if __name__ == "__main__":
    plumbing.run_stage(main)
