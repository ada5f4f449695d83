"""Stage 03 · ThinkSafe (arXiv 2601.23143): steer yourself into refusing, keep what a guard accepts, train on it.

    harmful x:  y ~ pi(. | steering + x)      benign x:  y ~ pi(. | x)      keep y if the guard accepts it
    loss = - log pi(y | x)                    the steering is gone from x; thinking and answer are both trained

Every word that is trained on is the model's own, so its reasoning stays what it was.

How we differ from the official code:
1. Answer and thinking are judged separately, not as one text; both must be safe.
2. An unreadable verdict is its own outcome, not "safe".
3. A harmful prompt must be refused and a benign one answered; the official code checks neither.
4. A thinking that quotes the steering text is dropped: the trained model will not see that text.

    python 03_steer_selfgen.py

in:  --prompts   harmful and benign prompts
out: <run>/responses.jsonl  steered (harmful) and plain (benign) samples     <run>/dropped.jsonl   with the reason
     <run>/train.jsonl      original prompt, thinking, answer                <run>/checkpoint/     LoRA merged
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from common import Example, Judge, Sampling, SamplingOptions, TokenScorer, add_lora, answer_prompts, cosine_rate, fail
from common import judge_samples, load_model, load_prompts, load_tokenizer, messages_of, micro_batches, open_run
from common import open_sampler, pad_batch, parse_options, render_chat, require_model, response_ids, save_checkpoint
from common import show_example, summary, training_steps, write_jsonl

# FORK HERE: the steering instruction, word for word that of the official code; one user turn.
STEERING = "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:\n\n{prompt}"


@dataclass
class Options(SamplingOptions):
    run: str = "runs/03_steer_selfgen"
    """folder of this run; the same command again goes on where it stopped"""
    model: str = "tiny/lrm"
    """the model that writes its own training data and is then trained on it"""
    guard: str = "tiny/guard"
    """accepts or drops each response (paper: Llama-Guard-3-8B)"""
    prompts: list[str] = field(default_factory=list)
    """harmful and benign prompts (paper: SafeChain's 17,889 + 22,111)"""
    limit: int = 0
    """take this many rows of each prompt file, drawn once with a fixed seed; 0 = all"""
    learning_rate: float = 1e-5
    """peak of AdamW (paper)"""
    epochs: int = 3
    """passes over the kept responses (paper)"""
    batch_size: int = 8
    """examples per optimizer step (paper)"""
    warmup: float = 0.1
    """share of the steps with rising learning rate, cosine to zero after (paper)"""
    lora_rank: int = 32
    """LoRA rank (paper)"""
    lora_alpha: float = 16.0
    """LoRA alpha (paper)"""
    lora_dropout: float = 0.05
    """LoRA dropout (paper)"""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """linear layers that get LoRA (paper: query and value)"""
    micro_batch_tokens: int = 4096
    """padded tokens in one forward pass; changes memory, speed and dropout's noise, nothing else"""
    save_every: int = 50
    """optimizer steps between two saved training states"""


def steer(prompt):
    """The prompt inside the steering text; of chat messages, the last one.

    >>> steer("how?").splitlines()[-1], steer([{"role": "user", "content": "how?"}])[0]["content"] == steer("how?")
    ('how?', True)
    """
    if isinstance(prompt, str):
        return STEERING.format(prompt=prompt)
    return [*prompt[:-1], {**prompt[-1], "content": steer(prompt[-1]["content"])}]


def reason_to_drop(harmful: bool, sample: dict, answer: dict, thinking: dict) -> str:
    """ "" if the sample may be trained on, else why not; `answer` and `thinking` are the guard's verdicts.

    >>> sample = {"state": "closed", "thinking": "This is harmful.", "answer": "No."}
    >>> safe, none = {"safety": "safe", "refusal": "yes"}, {"safety": "none", "refusal": "none"}
    >>> reason_to_drop(True, sample, safe, none), reason_to_drop(False, sample, safe, none)
    ('', 'benign prompt refused')
    """
    if sample["state"] != "closed":
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
    if harmful and any(line in sample["thinking"] for line in STEERING.split("\n") if len(line) > 20):
        return "thinking quotes the steering"
    return ""


def train(options: Options, run: Path, examples: list[Example], tokenizer) -> dict:
    """Cross-entropy on the responses; the last step's metrics. A step's loss is divided by that step's own number of
    label tokens, however it is cut into micro-batches (trap 11)."""
    accelerator = Accelerator()
    model = load_model(options.model)
    add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets, options.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(TokenScorer(model), optimizer)
    model.train()
    steps = options.epochs * -(-len(examples) // options.batch_size)
    rate = partial(cosine_rate, steps=steps, peak=options.learning_rate, warmup=options.warmup)
    metrics: dict = {}
    for _, batch, metrics in training_steps(run, options, examples, steps, rate, model, optimizer):
        labels, total = sum(len(example.response) for example in batch), 0.0
        for indices in micro_batches(batch, options.micro_batch_tokens):
            ids, mask = pad_batch([batch[i] for i in indices], model.device)
            log_probs, _ = scorer(ids, mask)  # (label tokens of the micro-batch,)
            loss = -log_probs.sum() / labels
            accelerator.backward(loss)
            total += loss.item()
        norm = accelerator.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"loss": total, "gradient_norm": norm, "label_tokens": labels}
    save_checkpoint(model, tokenizer, run / "checkpoint", options.model)
    return {"steps": steps, "last_loss": metrics.get("loss")}


def main():
    options = parse_options(Options, __doc__)
    rows = load_prompts(options.prompts, options.limit)
    require_model(options.model)
    require_model(options.guard)
    run = open_run(options)
    template = {"enable_thinking": options.enable_thinking}

    # 1. Steer and sample, one response per prompt; a benign prompt stays as it is.
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    sampler = open_sampler(options.model, options)
    steered = [{**row, "prompt": steer(row["prompt"])} if row["harmful"] else row for row in rows]
    responses = answer_prompts(sampler, steered, run / "responses.jsonl", 1, sampling, template)
    sampler.close()

    # 2. Filter. The guard sees the original prompt, never the steering.
    guard = Judge(options.guard, options)
    judged = [{**row, "samples": response["samples"]} for row, response in zip(rows, responses)]
    answers = judge_samples(guard, judged, run / "answer_labels.jsonl", lambda sample: sample["answer"])
    thinkings = judge_samples(guard, judged, run / "thinking_labels.jsonl", lambda sample: sample["thinking"])
    guard.close()
    kept, dropped = [], []
    for row in judged:
        [sample] = row.pop("samples")
        reason = reason_to_drop(row["harmful"], sample, answers[row["id"]][0], thinkings[row["id"]][0])
        row |= {"thinking": sample["thinking"], "answer": sample["answer"]}
        (dropped if reason else kept).append({**row, **({"reason": reason} if reason else {})})
    write_jsonl(run / "train.jsonl", kept)
    write_jsonl(run / "dropped.jsonl", dropped)
    if not kept:
        fail(f"no response passed the filter; {run}/dropped.jsonl says why")

    # 3. Train on the original prompt and the model's own response.
    tokenizer = load_tokenizer(options.model)
    examples = []
    for row in kept:
        prompt, opened = render_chat(tokenizer, messages_of(row["prompt"]), **template)
        examples.append(Example(prompt, response_ids(tokenizer, row["thinking"], row["answer"], opened)))
    show_example(tokenizer, examples[0])
    done = {} if (run / "checkpoint").exists() else train(options, run, examples, tokenizer)
    kinds = Counter("harmful" if row["harmful"] else "benign" for row in rows)
    kept_kinds = Counter("harmful" if row["harmful"] else "benign" for row in kept)
    summary(
        run,
        "03_steer_selfgen",
        {
            "prompts": ", ".join(f"{v} {k}" for k, v in sorted(kinds.items())),
            "kept": ", ".join(f"{v} {k} ({v / kinds[k]:.0%})" for k, v in sorted(kept_kinds.items())),
            "dropped": ", ".join(f"{v} {k}" for k, v in Counter(r["reason"] for r in dropped).most_common()) or "none",
            "trained": json.dumps(done) if done else "earlier",
            "checkpoint": f"{run}/checkpoint",
        },
        f"python 05_eval.py --models base={options.model} thinksafe={run}/checkpoint",
    )


if __name__ == "__main__":
    main()
