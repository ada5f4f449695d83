"""Alignment without a guard: GRPO of SInternal's checkpoint, rewarded by its own verification.

After stage 02 the model can judge answers. Here it judges its own in GRPO: the weights that are
trained read stage 02's specification with prompt and answer, and their verdict stands where the
guard's was. Neither paper does this, and it invites reward hacking: one set of weights writes the
answers and the verdicts, so it may learn to answer well or to say "safe". It says nothing of
refusals, so a refused benign prompt is paid as well.

The --guard is only looked at: metrics.jsonl has the share of answers that the model calls safe
(own_safe), that the guard does (guard_safe), and how often both say the same (agreement).

    python forks/self_guard.py  # after `make demo`; about three minutes on two cores
"""

from typing import NamedTuple

import table  # first: it opens the project's folder for imports

import engines
import judges
import plumbing
from common import messages_of, parse_verdict, prompt_text, split_response

grpo = table.stage("04_grpo")
verification = table.stage("02_verify_sft")
SPEC = plumbing.read_template("tiny/spec.txt", ["{prompt}", "{answer}"])
respond, report = grpo.respond, grpo.report  # the stage's own


class SelfGuard(NamedTuple):
    """As judges.Judge, by the model that is trained."""

    sampler: engines.Sampler
    watcher: judges.Judge
    options: grpo.Options

    def verdicts(self, pairs: list[tuple[object, str]]) -> list[dict]:
        shown = sorted({(prompt_text(prompt), answer) for prompt, answer in pairs if answer})
        texts = [verification.verification_prompt(SPEC, *pair) for pair in shown]
        chats = [(str(i), messages_of(text)) for i, text in enumerate(texts)]
        greedy = engines.Sampling(self.options.max_new_tokens, 0.0)
        template = {"enable_thinking": self.options.enable_thinking}
        own = {}
        for i, [reply] in self.sampler.replies(chats, 1, greedy, **template):
            _, verdict, _ = split_response(reply.text, reply.opened)
            own[shown[i]] = {"safety": parse_verdict(verdict), "refusal": "no"}
        verdicts = []
        for (prompt, answer), watched in zip(pairs, self.watcher.verdicts(pairs)):
            verdict = own.get((prompt_text(prompt), answer), judges.NO_ANSWER)
            verdicts.append({**verdict, "guard": watched["safety"]})
        return verdicts


def respond_and_verify(sampler, guard, rows, n, seed, options):
    return respond(sampler, SelfGuard(sampler, guard, options), rows, n, seed, options)


def report_both(rollouts, step, numbers, accelerator, options):
    judged = [r.verdict for r in rollouts if r.verdict["safety"] != "none"]
    for name, flags in {
        "own_safe": [v["safety"] == "safe" for v in judged],
        "guard_safe": [v["guard"] == "safe" for v in judged],
        "agreement": [v["safety"] == v["guard"] for v in judged],
    }.items():
        numbers[name] = sum(flags) / max(1, len(flags))
    return report(rollouts, step, numbers, accelerator, options)


if __name__ == "__main__":
    grpo.respond = respond_and_verify
    grpo.report = report_both
    start = ["--model", table.START["SInternal"], "--guard", "tiny/gold.py"]
    table.run("self-guard", grpo, *start)
