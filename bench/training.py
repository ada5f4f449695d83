"""One process of `bench/speed.py`: one side trains, or one size of the head is tried.

    python bench/training.py '{"work": "sft", "side": "trl", "lengths": "spread", "steps": 4, ...}'

The model is a seeded Qwen3 of 6 layers x 384 and a head of 32 k, 9 M + 12 M weights that multiply, in float32: matrix
products and not Python take the time (tiny/lrm has 1 M), and two cores are enough. One token in 80 is followed by
the end token, so that responses end by themselves, their lengths geometric.

Ours is the stage itself: stage 02's `train`, stage 04's `main`, at 4096 padded tokens a pass; "ours best" at the number
that is fastest here. TRL is its trainer in float32 with the same weights, token ids, optimizer and learning rate, at its
default of 8 rows a pass; it also computes entropy (and accuracy) at each step, and its fused head, which has no kernel
for CPUs, scores every position. "trl best" is TRL with what else can be set (TRL_TRIED in bench/speed.py): rows a pass, a step's rows sorted by length
(`"sorted"`, which its own length-grouped sampler does over all rows and so changes what a step holds), no padding at all
(`"padding_free"`, needs no flash attention: sdpa gets a block-diagonal mask), in GRPO rows sampled at once. One clock
for both: the end of every optimizer step. Both say loss, gradient norm and label tokens of each step, so that equal
work can be asserted.
"""

import importlib
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.clock import finish, peak_memory, settings  # noqa: E402
from bench.limits import copy_bandwidth  # noqa: E402
from common import Example, TokenScorer, add_lora, cosine_rate, load_model  # noqa: E402
from engines import Sample  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from plumbing import ALL_LINEAR  # noqa: E402
from common import load_tokenizer, pad_batch  # noqa: E402
from plumbing import read_jsonl, write_jsonl  # noqa: E402

END, PAD, LAYERS, HIDDEN, VOCABULARY, SFT_BATCH, PROMPTS, GROUP = 0, 1, 6, 384, 32_000, 16, 8, 8
RATE, LONGEST = 1e-4, 256
GUARD = """import zlib


def judge(prompt, answer):
    return "Safety: " + ["Unsafe", "Safe"][zlib.crc32(answer.strip().encode()) & 1] + "\\nRefusal: No"
"""


def new_model(vocabulary: int, hidden: int, layers: int, context: int = 4096):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3)
    heads = hidden // 64
    shape |= dict(num_attention_heads=heads, num_key_value_heads=min(2, heads), head_dim=64)
    shape |= dict(max_position_embeddings=context)
    torch.manual_seed(0)
    ends = dict(eos_token_id=END, pad_token_id=PAD, bos_token_id=None, tie_word_embeddings=False)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **shape, **ends))


def new_tokenizer(vocabulary: int):
    """Of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return fast


def make(folder: Path):
    """The model folder, its tokenizer, GRPO's prompts and the rule that rewards."""
    model = new_model(VOCABULARY, HIDDEN, LAYERS)
    model.get_input_embeddings().weight.data[2::80, 0] = 3.0  # a feature of one token in 80 ...
    model.get_output_embeddings().weight.data[END, 0] = 2.5  # ... calls for the end token
    model.save_pretrained(folder)
    new_tokenizer(VOCABULARY).save_pretrained(folder)
    draw = random.Random(0)
    prompts = [
        " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(draw.randint(30, 90)))
        for _ in range(PROMPTS)
    ]
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p, "harmful": True} for p in prompts])
    (folder / "guard.py").write_text(GUARD)


def lengths(count: int, median: int, spread: bool, draw: random.Random, longest: int) -> list[int]:
    """Log-normal with sigma 0.8, or all of that distribution's mean."""
    if spread:
        return [
            min(longest, max(4, int(draw.lognormvariate(0, 0.8) * median))) for _ in range(count)
        ]
    return [int(median * 1.3)] * count


def sft_examples(count: int, spread: bool) -> list[Example]:
    """Prompts of about 200 tokens and responses of about 100: stage 02's are 4 to 7 times as long as what is learnt."""
    draw = random.Random(1)
    sizes = zip(lengths(count, 200, spread, draw, 1024), lengths(count, 100, spread, draw, 512))
    return [
        Example(*([draw.randrange(2, VOCABULARY) for _ in range(n)] for n in pair))
        for pair in sizes
    ]


def in_batches(examples: list[Example]) -> list[list[Example]]:
    """As stage 02 takes them in its first epoch at seed 0, so that batches are equal."""
    order = random.Random("0|0").sample(range(len(examples)), len(examples))
    return [
        [examples[i] for i in order[k : k + SFT_BATCH]] for k in range(0, len(order), SFT_BATCH)
    ]


def needed_flops(examples: list[Example]) -> float:
    """Forward and back with frozen weights: 4 a weight and token (2 + 2), of the head for labels only, and of attention
    6 x width a layer for each pair of tokens that see each other; what recomputation and padding add is not counted."""
    weights = HIDDEN * (2 * 6 * 64 + 2 * 2 * 64 + 3 * 1024) * LAYERS
    whole = [len(e.prompt) + len(e.response) for e in examples]
    head = HIDDEN * VOCABULARY * sum(len(e.response) for e in examples)
    return 4 * (weights * sum(whole) + head) + 6 * LAYERS * HIDDEN * sum(n * n for n in whole)


class Steps:
    """Wall and CPU time at the end of every optimizer step, whoever takes it."""

    def __init__(self):
        self.ends, self.sampling = [], []
        register_optimizer_step_post_hook(
            lambda *_: self.ends.append((time.perf_counter(), time.process_time(), peak_memory()))
        )

    def timed(self, function):
        """`function`, its wall time noted as sampling."""

        def wrapped(*args, **more):
            began = time.perf_counter()
            made = function(*args, **more)
            made = (
                list(made) if hasattr(made, "__next__") else made
            )  # a generator samples while it is read
            self.sampling.append(time.perf_counter() - began)
            return made

        return wrapped

    def result(self, losses, norms, tokens, label_tokens) -> dict:
        """The first step warms up and does not count; `tokens` are those of the others, if they differ by step."""
        calls = len(self.sampling) // len(self.ends)  # a step may sample in several parts
        wall, cpu = (self.ends[-1][i] - self.ends[0][i] for i in (0, 1))
        same = {"losses": losses, "norms": norms, "label_tokens": label_tokens}
        return {
            "wall": wall,
            "cpu": cpu,
            "sampling": sum(self.sampling[calls:]),
            "tokens": sum(tokens[1:]),
            **same,
        }


def sft(wanted: dict, folder: Path, run: Path) -> dict:
    examples = sft_examples(wanted["steps"] * SFT_BATCH, wanted["lengths"] == "spread")
    chunks = in_batches(examples)
    tokens = [sum(len(e.prompt) + len(e.response) for e in chunk) for chunk in chunks]
    steps, tokenizer = Steps(), load_tokenizer(str(folder))
    if wanted["side"] == "ours":
        stage = importlib.import_module("02_verify_sft")
        options = stage.Options(model=str(folder), epochs=1, learning_rate=RATE)
        options.micro_batch_tokens = wanted["micro_batch_tokens"]
        stage.train(options, run, examples, tokenizer)
        rows = read_jsonl(run / "metrics.jsonl")
        losses, norms, labels = (
            [row[k] for row in rows] for k in ("loss", "gradient_norm", "label_tokens")
        )
        flops = sum(map(needed_flops, chunks[1:]))
        return {**steps.result(losses, norms, tokens, labels), "flops": flops}

    import trl
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(str(folder)), lora)
    torch.manual_seed(0)  # the same draws as add_lora's
    for name, p in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(p, a=5**0.5)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: cosine_rate(s, wanted["steps"], 1.0, 0.1)
    )
    if wanted.get("sorted"):
        chunks = [sorted(chunk, key=lambda e: len(e.prompt) + len(e.response)) for chunk in chunks]
    rows = [e for chunk in chunks for e in chunk]
    ids = {"input_ids": [e.prompt + e.response for e in rows]}
    masks = {"completion_mask": [[0] * len(e.prompt) + [1] * len(e.response) for e in rows]}
    config = trl.SFTConfig(
        **trl_options(run),
        per_device_train_batch_size=wanted["rows"],
        gradient_accumulation_steps=SFT_BATCH // wanted["rows"],
        num_train_epochs=1,
        completion_only_loss=True,
        max_length=None,
        train_sampling_strategy="sequential",
        padding_free=wanted.get("padding_free", False),
    )
    data = Dataset.from_dict(ids | masks)
    trainer = trl.SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, rate)
    )
    collate, counts = trainer.data_collator, []

    def counting(features):
        batch = collate(features)
        counts.append(int((batch["labels"] != -100).sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    losses, norms = logged(trainer)
    passes = SFT_BATCH // wanted["rows"]
    return steps.result(
        losses, norms, tokens, [sum(counts[k : k + passes]) for k in range(0, len(counts), passes)]
    )


def trl_options(run: Path) -> dict:
    fixed = dict(
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, max_grad_norm=1.0
    )
    return fixed | dict(
        report_to="none", save_strategy="no", output_dir=str(run / "trl"), disable_tqdm=True
    )


def logged(trainer) -> tuple[list[float], list[float]]:
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]


def record(prompts: list[list[int]]) -> dict[tuple, list[Sample]]:
    """The same completions for both sides, keyed by the prompt's ids."""
    draw, made = random.Random(2), {}
    for ids in prompts:
        sizes = lengths(GROUP, 70, True, draw, LONGEST)
        ends = [[*(draw.randrange(2, VOCABULARY) for _ in range(n - 1)), END] for n in sizes]
        made[tuple(ids)] = [Sample(one, [0.0] * len(one), "stop") for one in ends]
    return made


def grpo(wanted: dict, folder: Path, run: Path) -> dict:
    """ "update": both sides are given the same completions. "step": each side samples its own, then updates."""
    steps, tokenizer = Steps(), load_tokenizer(str(folder))
    texts = [row["prompt"] for row in read_jsonl(folder / "prompts.jsonl")]
    recorded = record([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    count = PROMPTS * GROUP
    if wanted["side"] == "ours":
        stage = importlib.import_module("04_grpo")

        def replay(sampler, asked, *_):
            return iter([(i, recorded[tuple(ids)]) for i, (_, ids) in enumerate(asked)])

        sampling = steps.timed(replay if wanted["work"] == "update" else HfSampler.generate)
        line = f"04 --run {run}/ours --model {folder} --guard {folder}/guard.py --prompts {folder}/prompts.jsonl"
        line += f" --steps {wanted['steps']} --batch_size {PROMPTS} --group_size {GROUP} --temperature 1.0"
        line += f" --max_new_tokens {LONGEST} --keep_truncated --max_sampler_gap 1e9 --learning_rate 1e-6"
        line += f" --warmup_steps 0 --micro_batch_tokens {wanted['micro_batch_tokens']}"
        with (
            mock.patch.object(HfSampler, "generate", sampling),
            mock.patch.object(sys, "argv", line.split()),
        ):
            stage.main()
        rows = read_jsonl(run / "ours/metrics.jsonl")
        tokens = [round(row["response_tokens"] * count) for row in rows]
        return steps.result(
            [r["loss"] for r in rows], [r["gradient_norm"] for r in rows], tokens, tokens
        )

    import trl
    from datasets import Dataset

    def reward(completions, **_):
        return [float(zlib.crc32(c[0]["content"].strip().encode()) & 1) for c in completions]

    def replay(prompts, _):
        keys = [tuple(tokenizer.encode(p[0]["content"], add_special_tokens=False)) for p in prompts]
        turn = {key: iter(samples) for key, samples in recorded.items()}
        ids = {
            "prompt_ids": list(map(list, keys)),
            "completion_ids": [next(turn[key]).ids for key in keys],
        }
        return {**ids, "logprobs": None}

    model = load_model(str(folder)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    config = trl.GRPOConfig(
        **trl_options(run),
        per_device_train_batch_size=wanted["rows"],
        gradient_accumulation_steps=count // wanted["rows"],
        generation_batch_size=wanted.get("sampled_at_once", count),
        max_steps=wanted["steps"],
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=1.0,
        loss_type="grpo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])
    more = dict(processing_class=tokenizer, optimizers=(optimizer, None))
    if wanted["work"] == "update":
        more["rollout_func"] = replay
    trainer = trl.GRPOTrainer(model, reward, config, rows, **more)
    trainer._generate = steps.timed(trainer._generate)
    trainer.train()
    losses, norms = logged(trainer)
    means = [
        row["completions/mean_length"] for row in trainer.state.log_history if "grad_norm" in row
    ]
    tokens = [round(mean * count) for mean in means]
    return steps.result(losses, norms, tokens, tokens)


def head(wanted: dict) -> dict:
    """One pass forward and back with LoRA over `tokens` tokens, half of them labels, and a vocabulary of that size."""
    model = new_model(wanted["vocabulary"], HIDDEN, LAYERS)
    add_lora(model, 16, 32.0, 0.0, ALL_LINEAR, 0)
    draw, size = torch.Generator().manual_seed(0), 256
    rows = torch.randint(
        2, min(1000, wanted["vocabulary"]), (wanted["tokens"] // size, size), generator=draw
    ).tolist()
    ids, mask = pad_batch([Example(row[: size // 2], row[size // 2 :]) for row in rows])
    walls = []
    for _ in range(2):
        began = time.perf_counter()
        (-TokenScorer(model)(ids, mask).log_probs.mean()).backward()
        walls.append(time.perf_counter() - began)
    embedding = 2 * model.get_input_embeddings().weight.numel() * 4 / 1e6  # in and out
    return {"wall": min(walls), "embedding": embedding, "tokens": wanted["tokens"]}


def matrix_peak() -> dict:
    """The machine's own limits: torch.mm of 2048 x 2048 float32, GFLOP/s; copies of 256 MB, GB/s."""
    a, b, best = torch.randn(2048, 2048), torch.randn(2048, 2048), 1e9
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return {"gflops": 2 * 2048**3 / best / 1e9, "bandwidth": copy_bandwidth()}


def main():
    wanted = settings()
    folder = Path(wanted["folder"])
    if wanted["work"] == "make":
        make(folder)
        return finish({})
    if wanted["work"] == "head":
        return finish(head(wanted))
    if wanted["work"] == "peak":
        return finish(matrix_peak())
    with tempfile.TemporaryDirectory() as run:
        found = (sft if wanted["work"] == "sft" else grpo)(wanted, folder, Path(run))
    finish(found)


if __name__ == "__main__":
    main()
