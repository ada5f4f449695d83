"""On-policy self-distillation (OPSA, arXiv 2605.15239): imitate the self that has been warned.

    y ~ pi(. | x);    loss = mean over tokens of sum_w pi(w) (log pi(w) - log pi_0(w))
    pi(w) = pi(w | x, y_<t), trained;    pi_0(w) = pi_0(w | steering + x, y_<t), frozen

Rollouts are the model's own on the plain prompt, as in GRPO. No reward: the teacher is the model
that training started from, and reads the prompt in one of stage 03's steering texts; every token is
taught by its whole distribution. `opsa` takes the text of the highest flip rate, as the paper says
(forks/flip_rates.py; all rates stand in <run>/flip_rates.json), `opsa-prefix` ThinkSafe's text. The
guard's reward is only looked at.

Ours: the direction of the KL; benign prompts and sums are not steered, so that the teacher says
there: stay. Replaced in the stage: the reference model, which is the teacher, and the update.

    python forks/opsa.py        # 60 steps of 16 x 4 each, about four minutes on two cores
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import table  # first: it opens the project's folder for imports

import flip_rates
import torch

import engines
import plumbing
from common import Example, messages_of, micro_batches, pad_batch, render_chat

steering = table.stage("03_steer_selfgen")
TEXT = ""  # name of the steering text; empty = the one of the highest flip rate


class Teacher(NamedTuple):
    model: torch.nn.Module  # frozen
    prompt_of: Callable  # rollout -> ids of its prompt as the teacher reads it


def steered_teacher(trainer, options) -> Teacher:
    sampler = engines.open_sampler(options.model, options)
    rates = flip_rates.flip_rates(sampler, options)
    plumbing.write_atomic(Path(options.run) / "flip_rates.json", json.dumps(rates))
    text = TEXT or max(rates, key=rates.get)
    print(f"flip rates: {rates}; the teacher reads {text}")

    def prompt_of(rollout) -> list[int]:
        [row] = steering.steered([rollout.row], text)
        chat, template = messages_of(row["prompt"]), {"enable_thinking": options.enable_thinking}
        return render_chat(sampler.tokenizer, chat, **template)[0]

    return Teacher(sampler.model, prompt_of)


def distribution(model, examples, temperature: float) -> torch.Tensor:
    """(N, V) log-probs of what may follow, at each of the N response tokens."""
    ids, mask = pad_batch(examples, model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][mask[:, 1:]]
    return (logits.float() / temperature).log_softmax(-1)


def update(rollouts, trainer, teacher, step, options) -> dict[str, float]:
    """One optimizer step on the reverse KL to the teacher, in place of the stage's."""
    if plumbing.processes().num_processes > 1:
        plumbing.fail("distillation on own rollouts runs in one process; start it with python")
    own = [Example(r.prompt, r.reply.sample.ids) for r in rollouts]
    taught = [Example(teacher.prompt_of(r), r.reply.sample.ids) for r in rollouts]
    tokens, total = sum(len(example.response) for example in own), 0.0
    trainer.model.train()
    for batch in micro_batches(own, options.micro_batch_tokens):
        log_p = distribution(trainer.model, [own[i] for i in batch], options.temperature)
        with torch.no_grad():
            log_q = distribution(teacher.model, [taught[i] for i in batch], options.temperature)
        loss = (log_p.exp() * (log_p - log_q)).sum() / tokens
        trainer.backward(loss)
        total += loss.item()
    return {"loss": total, "gradient_norm": trainer.step()}


if __name__ == "__main__":
    grpo = table.stage("04_grpo")
    grpo.reference_scorer = steered_teacher  # called because beta is not 0
    grpo.update = update
    same = ["--beta", 1, "--steps", 60, "--group_size", 4]
    table.run("opsa", grpo, *same)
    TEXT = "prefix"
    table.run("opsa-prefix", grpo, *same)
