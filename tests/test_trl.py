"""Stage 04 against TRL's GRPOTrainer on the same recorded responses and rewards: its functions, then the whole stage.

Masks, log-probs, reference, advantages, loss and gradient are TRL's own; `rollout_func` only hands it the record. Cut
responses agree in all three losses: they count in their group's statistics, in the mean over responses (grpo) and in
responses * max_new_tokens (dr_grpo), and their tokens do not count in dapo's mean. What differs:
1. TRL masks cut responses only with mask_truncated_completions=True, and multiplies the KL by the ratio unless
   use_bias_correction_kl=False. Both are set here.
2. A missing reward: TRL gives the row advantage 0 and leaves it in, so that its tokens count in dapo's mean and, when
   beta > 0, its KL in every loss. Ours is masked. `test_missing_rewards` has it in numbers.
3. For TRL a response is cut if its last token is no end token, for ours also if it ends before `</think>` (none here).
4. A step in which every response is masked has loss 0 in TRL; ours stops with an error.
"""

import copy
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from datasets import Dataset
from torch.nn.utils import parameters_to_vector as flat

import judges
from common import Example, TokenScorer, pad_batch, render_chat
from engines import Sampling
from engines.hf import HfSampler
from plumbing import load_prompts

trl = pytest.importorskip("trl")
grpo = load("04_grpo")
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

T, G, LIMIT, SOURCE = 0.7, 4, 50, "tiny/prompts/train.jsonl"
PROMPTS = load_prompts([SOURCE], 3)
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.3, 0.5], [1.0, 0.0, 0.0, 0.0]])
MISSING = torch.tensor([[1.0, 1.0, math.nan, 0.0], [0.5, 0.5, 0.5, 0.5], [math.nan, 0.7, math.nan, math.nan]])
LOSSES = pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])


@pytest.fixture(scope="module")
def record(model, tokenizer):
    """(prompt ids, Sample) of all responses, group after group: hot, so that lengths differ; four are cut, below
    LIMIT, so that the longest length is not dr_grpo's constant."""
    asked = [(row["id"], render_chat(tokenizer, [{"role": "user", "content": row["prompt"]}])[0]) for row in PROMPTS]
    groups = dict(HfSampler(model, tokenizer, 32_768).generate(asked, G, Sampling(40, 2.0, seed=1)))
    assert [sum(s.finish == "length" for s in groups[i]) for i in range(3)] == [2, 1, 1]
    rows = [(ids, sample) for i, (_, ids) in enumerate(asked) for sample in groups[i]]
    at_t = [TokenScorer(model)(*pad_batch([Example(ids, s.ids)]), T)[0].tolist() for ids, s in rows]
    return [(ids, s._replace(log_probs=log_probs)) for (ids, s), log_probs in zip(rows, at_t)]


@pytest.fixture
def trainer_of(record, tokenizer, tmp_path):
    """Makes a GRPOTrainer whose responses and rewards are the recorded ones."""
    rollouts = {"prompt_ids": [p for p, _ in record], "completion_ids": [s.ids for _, s in record], "logprobs": None}
    fixed = dict(temperature=T, num_generations=G, max_completion_length=LIMIT, num_iterations=2, scale_rewards="group")
    fixed |= dict(mask_truncated_completions=True, use_bias_correction_kl=False, use_cpu=True, bf16=False)
    fixed |= dict(gradient_checkpointing=False, report_to="none", save_strategy="no", output_dir=str(tmp_path / "trl"))

    def make(model, rewards, optimizer=None, **options):
        def judge(**_):
            return [None if math.isnan(r) else r for r in rewards.flatten().tolist()]

        rows, config = Dataset.from_list([{"prompt": r["prompt"]} for r in PROMPTS]), trl.GRPOConfig(**fixed, **options)
        more = dict(processing_class=tokenizer, optimizers=(optimizer, None), rollout_func=lambda *_: rollouts)
        return trl.GRPOTrainer(model.train(), judge, config, rows, **more)

    return make


def both(model, record, trainer_of, rewards, loss, beta=0.0, low=0.2, high=0.28):
    """[loss, clipped share, KL, gradient, advantages], ours and TRL's, with the same pi_old."""
    noise = torch.Generator().manual_seed(0)
    policy = copy.deepcopy(model)  # pi; the reference is tiny/lrm itself
    for p in policy.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=noise)
    options = dict(per_device_train_batch_size=len(record), epsilon=low, epsilon_high=high)
    trainer = trainer_of(copy.deepcopy(policy), rewards, loss_type=loss, beta=beta, **options)
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * len(record))
    old = inputs["old_per_token_logps"]
    old += 0.3 * torch.randn(old.shape, generator=noise)  # ratios well outside the clip range too
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    metrics = trainer._metrics["train"]
    theirs = [value.item(), metrics["clip_ratio/region_mean"][0], metrics["kl"][0] if beta else 0.0]

    advantages, lengths = grpo.group_advantages(rewards).flatten(), torch.tensor([len(s.ids) for _, s in record])
    kept = torch.tensor([s.finish == "stop" for _, s in record]) & ~rewards.flatten().isnan()
    weights, active = grpo.token_weights(lengths, kept, loss, LIMIT), kept.nonzero().flatten()
    ids, mask = pad_batch([Example(record[i][0], record[i][1].ids) for i in active])
    log_probs, reference = (TokenScorer(m)(ids, mask, T)[0] for m in (policy, model))
    per_token = torch.stack([advantages, weights])[:, active].repeat_interleave(lengths[active], 1)
    old, reference = torch.cat([old[i, : lengths[i]] for i in active]), reference.detach() if beta else None
    ours = grpo.grpo_loss(log_probs, old, reference, *per_token, low, high, beta, "k3")
    ours[0].backward()
    gradients = [flat(p.grad for p in m.parameters()) for m in (policy, trainer.model)]
    return [*(x.item() for x in ours), gradients[0], advantages], [*theirs, gradients[1], inputs["advantages"]]


@LOSSES
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28)])
def test_loss_and_gradient(model, record, trainer_of, loss, beta, low, high):
    ours, theirs = both(model, record, trainer_of, REWARDS, loss, beta, low, high)
    assert ours[0] == pytest.approx(theirs[0], rel=0, abs=1e-5)
    assert (ours[3] - theirs[3]).abs().max() < 1e-5 < 0.01 < ours[3].abs().max()
    if loss == "dapo":  # TRL's metrics are means over tokens
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=0, abs=1e-5) and ours[1] > 0.1


@LOSSES
def test_missing_rewards(model, record, trainer_of, loss):
    """The same advantages and, without KL, the same sums over tokens; TRL's dapo divides by the masked ones as well."""
    ours, theirs = both(model, record, trainer_of, MISSING, loss)
    torch.testing.assert_close(ours[4].nan_to_num(0.0), theirs[4], rtol=0, atol=1e-5)
    tokens = [(len(s.ids), r) for (_, s), r in zip(record, MISSING.flatten().tolist()) if s.finish == "stop"]
    share = sum(n for n, r in tokens if not math.isnan(r)) / sum(n for n, _ in tokens) if loss == "dapo" else 1.0
    assert share * ours[0] == pytest.approx(theirs[0], rel=0, abs=1e-5)
    assert (share * ours[3] - theirs[3]).abs().max() < 1e-5 < 0.01 < ours[3].abs().max()


@LOSSES
def test_whole_stage(trainer_of, record, model, tmp_path, monkeypatch, loss):
    """main() against train(): two SGD updates on the same rollouts, in micro-batches: loss, gradient norm, weights."""
    policy = copy.deepcopy(model)
    options = dict(per_device_train_batch_size=6, gradient_accumulation_steps=2, max_steps=2, logging_steps=1)
    options |= dict(loss_type=loss, beta=0.04, epsilon=0.2, epsilon_high=0.28, lr_scheduler_type="constant")
    trainer = trainer_of(policy, REWARDS, torch.optim.SGD(policy.parameters(), lr=0.03), **options)
    trainer.train()

    def generate(sampler, asked, *_):
        return [(i, samples[tuple(ids)]) for i, (_, ids) in enumerate(asked)]

    samples = {tuple(record[i][0]): [s for _, s in record[i:][:G]] for i in range(0, len(record), G)}
    rewards = {row["id"]: iter(group) for row, group in zip(PROMPTS, REWARDS.tolist())}
    monkeypatch.setattr(HfSampler, "generate", generate)
    monkeypatch.setattr(judges, "Judge", lambda *_: SimpleNamespace(verdicts=lambda pairs: [{}] * len(pairs)))
    monkeypatch.setattr(grpo, "reward", lambda row, *_: next(rewards[row["id"]]))
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr=lr))
    line = f"04 --run {tmp_path}/run --prompts {SOURCE} --limit 3 --steps 1 --batch_size 3 --group_size {G}"
    line += f" --loss {loss} --beta 0.04 --clip_low 0.2 --clip_high 0.28 --temperature {T} --max_new_tokens {LIMIT}"
    line += " --updates_per_batch 2 --micro_batch_tokens 200 --learning_rate 0.03 --warmup_steps 0"
    monkeypatch.setattr(sys, "argv", line.split())
    grpo.main()
    trained = type(model).from_pretrained(f"{tmp_path}/run/checkpoint")
    start, ours, theirs = (flat(m.parameters()) for m in (model, trained, policy))
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (ours - start).abs().max()
    metrics, (*_, last, whole) = json.loads((tmp_path / "run/metrics.jsonl").read_text()), trainer.state.log_history
    assert metrics["loss"] == pytest.approx(whole["train_loss"], rel=0, abs=1e-5) and metrics["clipped"] > 0.01
    assert metrics["gradient_norm"] == pytest.approx(last["grad_norm"], rel=1e-4)
