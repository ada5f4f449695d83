"""The claims: rows are trained, measured and judged; the rule by hand and with SciPy and NumPy, the page from its file."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import claims as tables  # noqa: E402
import curves  # noqa: E402
import matrix  # noqa: E402
import rows  # noqa: E402
import verdicts  # noqa: E402
from matrix import ASR, BOTH, COMPLIANCE, CONDITIONS, COST, DATA, GAP, KL  # noqa: E402

OUT = ROOT / "results/claims"


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# The rule -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("effect, kept, verdict", [
    ([0.20, 0.30, 0.40], False, "appears"),  # 0.30 ± 0.248: above 0.05
    ([0.19, 0.29, 0.39], False, "undecided"),  # 0.29 ± 0.248: from 0.042
    ([0.03, 0.04, 0.045], False, "undecided"),  # 0.038 ± 0.019: above 0, but up to 0.057
    ([0.01, 0.02, 0.02], False, "does not"),  # 0.017 ± 0.014: above 0, below the bar
    ([-0.03, -0.02, -0.01], True, "appears"),  # -0.02 ± 0.025: from -0.045
    ([-0.04, -0.03, -0.02], True, "undecided"),  # -0.03 ± 0.025: from -0.055
    ([-0.20, -0.19, -0.18], True, "does not"),
    ([0.06] * 3, False, "appears"), ([0.05] * 3, False, "undecided"), ([0.04] * 3, False, "does not"),
    ([0.0] * 3, True, "appears"), ([0.9], False, "undecided"), ([], False, "undecided"),
])  # fmt: skip
def test_the_rule_is_an_interval_against_the_bar(effect, kept, verdict):
    """Intervals of three seeds by hand, Student's quantile of two degrees of freedom 4.302653."""
    bar = -0.05 if kept else 0.05
    found = verdicts.verdict_of(*verdicts.p_values(effect, bar))
    assert found == verdict
    if len(effect) > 1 and len({*effect}) > 1:
        half = 4.302653 * np.std(effect, ddof=1) / math.sqrt(3)
        low, high = np.mean(effect) - half, np.mean(effect) + half
        assert verdict == ("appears" if low > bar else "does not" if high < bar else "undecided")


def test_p_values_by_the_integral_of_students_density():
    """t of two degrees of freedom has the closed distribution 1/2 + t / (2 sqrt(2 + t²))."""
    effect = np.array([0.12, 0.31, 0.22])
    t = (effect.mean() - 0.05) / (effect.std(ddof=1) / math.sqrt(3))
    above = 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert verdicts.p_values(list(effect), 0.05) == pytest.approx((above, 1 - above), abs=1e-9)
    interval = tables.mean_interval(list(effect))
    low, high = scipy.stats.ttest_1samp(effect, 0).confidence_interval(0.95)
    assert (interval["mean"] - interval["half"], interval["mean"] + interval["half"]) == pytest.approx(
        (low, high), abs=1e-4
    )


@pytest.mark.parametrize("p, corrected", [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5, 0.0, 1.0], [1.0, 0.0, 1.0]),
    ([0.02, 0.02], [0.04, 0.04]),
    ([], []),
])  # fmt: skip
def test_holm_by_hand(p, corrected):
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and never falling: the last is 0.06."""
    assert verdicts.holm(p) == pytest.approx(corrected)


def test_holm_rejects_as_the_step_down_method_does():
    """Its textbook form: from the smallest on, reject while p ≤ 0.025 / (number that is left)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(size=12) ** 4
        rejected, order = set(), np.argsort(p)
        for rank, index in enumerate(order):
            if p[index] > 0.025 / (len(p) - rank):
                break
            rejected.add(index)
        assert rejected == {i for i, value in enumerate(verdicts.holm(list(p))) if value <= 0.025}


# One word -------------------------------------------------------------------------------------------------------------
A, N, U, C, X = "appears", "does not", "undecided", "confounded", "not run"


@pytest.mark.parametrize("cells, word", [
    ({("0", "preset"): A, ("0", "T = 1"): A, ("1", "preset"): A, ("2", "preset"): X}, "appears"),
    ({("0", "preset"): X, ("1", "preset"): X}, "not run"),
    ({("0", "preset"): A, ("0", "T = 1"): N, ("0", "any of 8"): A}, "depends on decoding"),
    ({("0", "any of 8"): A, ("0", "any of 8, T = 1"): N}, "depends on decoding"),
    ({("0", "preset"): A, ("0", "T = 1"): A, ("0", "think-open"): N}, "depends on attack"),
    ({("0", "T = 1"): A, ("0", "preset"): U, ("0", "search"): N}, "depends on attack"),
    ({("0", "preset"): A, ("0", "T = 1"): A, ("1", "preset"): N, ("1", "T = 1"): N}, "depends on base model"),
    ({("0", "preset"): A, ("0", "T = 1"): N, ("1", "preset"): N, ("1", "T = 1"): N}, "depends on decoding, base model"),
    ({("0", "preset"): A, ("0", "search"): N}, "depends on decoding, attack"),
    ({("0", "preset"): A, ("0", "T = 1"): U, ("1", "preset"): U, ("1", "T = 1"): N},
     "depends on decoding, base model"),
    ({("0", "preset"): A, ("0", "T = 1"): U, ("1", "preset"): X}, "undecided (appears in 1 of 2)"),
    ({("0", "preset"): U, ("0", "T = 1"): U}, "undecided"),
    ({("0", "preset"): C, ("0", "T = 1"): A}, "depends on decoding"),
    ({("0", "data"): A, ("1", "data"): N}, "depends on base model"),
])  # fmt: skip
def test_one_word_only_where_all_agree(cells, word):
    assert verdicts.one_word(cells) == word


def made_up(shift=None, bases=("0", "1", "2"), left_out=()):
    """A matrix of three seeds: every share is 0.5 + noise of the row; `shift`: {(base, row, condition, column): change}."""
    rng, table = np.random.default_rng(1), {"bases": {}}
    names = ["base", *rows.CORE, *rows.ABLATIONS]
    for base in bases:
        own = {}
        for name in [name for name in names if name not in left_out]:
            own[name] = {c: {column: None for column in (ASR, BOTH)} for c in CONDITIONS}
            for decoding in matrix.DECODINGS:
                own[name][decoding] |= dict.fromkeys([matrix.PLAIN, GAP, COMPLIANCE, matrix.SUMS])
                own[name][decoding] |= dict.fromkeys([tables.CHECKED, tables.WELL, matrix.COMPLIANCE_PLAIN])
            own[name][DATA] = dict.fromkeys([matrix.PERPLEXITY, KL, COST])
            for condition, columns in own[name].items():
                for column in columns:
                    change = (shift or {}).get((base, name, condition, column), 0)
                    columns[column] = [round(0.5 + change + rng.normal(0, 0.001), 4) for _ in range(3)]
        own[matrix.UNTIL] = {DATA: {COST: [1.0, 1.0, 1.0]}}
        table["bases"][base] = {"seeds": 3, "rows": own}
    return table


def claim_of(made, ours, other, column):
    [claim] = [c for c in verdicts.all_claims(made) if (c["ours"], c["other"], c["column"]) == (ours, other, column)]
    return claim


def test_effects_are_paired_and_signed():
    """Seeds move together by more than the methods differ: only the differences of the same seed are small."""
    made = made_up()
    rows_of_0 = made["bases"]["0"]["rows"]
    rows_of_0["base"]["preset"][ASR] = [0.9, 0.5, 0.7]
    rows_of_0["SInternal"]["preset"][ASR] = [0.7, 0.31, 0.49]  # 0.20, 0.19, 0.21 less
    rows_of_0["SInternal"]["preset"][COMPLIANCE] = [0.3, 0.3, 0.3]
    rows_of_0["base"]["preset"][COMPLIANCE] = [0.5, 0.51, 0.49]
    cell = claim_of(made, "SInternal", "base", ASR)["bases"]["0"]["preset"]
    assert cell["effect"]["values"] == [0.2, 0.19, 0.21] and cell["verdict"] == "appears"
    assert cell["means"] == {"SInternal": 0.5, "base": 0.7}
    cell = claim_of(made, "SInternal", "base", COMPLIANCE)["bases"]["0"]["preset"]
    assert cell["effect"]["values"] == [-0.2, -0.21, -0.19] and cell["verdict"] == "does not"


def test_a_seed_without_a_value_is_left_out():
    made = made_up()
    made["bases"]["0"]["rows"]["base"]["preset"][tables.WELL] = [0.5, None, 0.5]
    cell = claim_of(made, "SInternal", "base", tables.WELL)["bases"]["0"]["preset"]
    assert len(cell["effect"]["values"]) == 2


def test_a_claim_that_turns_round_depends():
    shift = {(base, "SInternal", c, ASR): -0.3 for base in "012" for c in CONDITIONS}
    key = ("SInternal", "base", ASR)
    assert claim_of(made_up(shift), *key)["word"] == "appears"
    shift["1", "SInternal", "think-open", ASR] = 0.3
    assert claim_of(made_up(shift), *key)["word"] == "depends on attack, base model"
    for condition in CONDITIONS:
        shift["1", "SInternal", condition, ASR] = 0.3
    assert claim_of(made_up(shift), *key)["word"] == "depends on base model"


def test_what_was_not_run_stays_visible():
    made = made_up(bases=("0", "1"), left_out=("verdict-only", "with-KL"))
    claims = verdicts.all_claims(made)
    gone = [claim for claim in claims if "verdict-only" in claim.values() or "with-KL" in claim.values()]
    assert len(gone) == 2 and {claim["word"] for claim in gone} == {"not run"}
    assert all(claim["bases"]["2"][claim["first"]] == {"verdict": "not run"} for claim in claims)
    page = verdicts.page_of(claims, made)
    assert sum("the verdict alone does less" in line and "**not run**" in line for line in page.splitlines()) == 1
    assert sum("**does not, base 0 and 1 only**" in line for line in page.splitlines()) > 10
    tested = len(claims) - 2
    assert f"\n{tested} claims of the column" in page


def test_a_control_that_does_as_much_confounds():
    shift = {("0", "other-answers", c, ASR): 0.4 for c in CONDITIONS}
    key = ("SInternal", "other-answers", ASR)
    assert claim_of(made_up(shift), *key)["bases"]["0"]["preset"]["verdict"] == "appears"
    shift |= {("0", "half-the-rows", c, ASR): 0.4 for c in CONDITIONS}  # as few rows, as little safety
    cell = claim_of(made_up(shift), *key)["bases"]["0"]["preset"]
    assert cell["verdict"] == "confounded" == cell["after Holm"]["verdict"]
    shift = {("0", "half-the-rows", c, ASR): 0.4 for c in CONDITIONS}  # no effect: nothing to confound
    cell = claim_of(made_up(shift), *key)["bases"]["0"]["preset"]
    assert cell["verdict"] == "does not" == cell["after Holm"]["verdict"]


def test_holm_is_over_the_column_of_base_0():
    """Three seeds: a clear effect stays, one that only its own interval decides does not."""
    shift = {("0", "ThinkSafe", "preset", ASR): -0.4}
    made = made_up(shift)
    made["bases"]["0"]["rows"]["base"]["preset"][ASR] = [0.5, 0.5, 0.5]
    made["bases"]["0"]["rows"]["SInternal"]["preset"][ASR] = [0.3, 0.2, 0.1]
    weak = claim_of(made, "SInternal", "base", ASR)["bases"]["0"]["preset"]
    clear = claim_of(made, "ThinkSafe", "base", ASR)["bases"]["0"]["preset"]
    assert weak["verdict"] == "appears" and weak["after Holm"]["verdict"] == "undecided"
    assert clear["verdict"] == "appears" == clear["after Holm"]["verdict"]
    cells = [claim["bases"]["0"][claim["first"]] for claim in verdicts.all_claims(made)]
    assert len(cells) == len(verdicts.CLAIMS)
    assert [cell["after Holm"]["above"] for cell in cells] == verdicts.holm([cell["above"] for cell in cells])


def test_every_claim_once_and_of_rows_that_are_trained():
    keys = [(claim.column, claim.ours, claim.other, claim.kept) for claim in verdicts.CLAIMS]
    assert len({*keys}) == len(keys) == 47
    trained = {"base", *rows.ROWS, matrix.UNTIL}
    for claim in verdicts.CLAIMS:
        assert {claim.ours, claim.other, claim.control or "base"} <= trained, claim.text
    parents = {row.start for row in rows.ROWS.values()}
    assert parents <= trained


# Training and measuring, with a stage runner that writes what the stages would -----------------------------------------
class Fake:
    """Stands in for every script: writes its outputs with numbers that tell who asked for what."""

    def __init__(self, monkeypatch, base_asr=0.8):
        self.asked, self.base_asr = [], base_asr
        monkeypatch.setattr(tables, "execute", self.execute)
        monkeypatch.setattr(matrix, "execute", self.execute)
        monkeypatch.setattr(rows, "execute", self.execute)

    def execute(self, words, home, what):
        script, words = words[0].name, list(map(str, words[1:]))
        self.asked.append((script, words, home))
        if script == "build.py":
            out = words[words.index("--out") + 1]
            built = words[words.index("--only") + 1 : words.index("--out")]
            folder = home / out
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "scores.json"
            old = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**old, **dict.fromkeys(built, {})}))
            prompts = [{"id": f"{k}", "prompt": "make it?", "harmful": k < 2} for k in range(3)]
            write(folder / "prompts/test_wrapped.jsonl", prompts)
            return
        place = words[words.index("--run" if "--run" in words else "--out") + 1]
        run = home / place
        run.mkdir(parents=True, exist_ok=True)
        if script == "attack.py":
            names = [word.split("=")[0] for word in words[words.index("--models") + 1 :] if "=" in word]
            breaks = {"best-of-n": {"a": 3, "b": None, "c": None, "d": None}}
            breaks["suffix"] = {"a": 9, "b": 32, "c": None, "d": None}
            lines = [{"model": n, "attack": a, "breaks": b} for n in names for a, b in breaks.items()]
            return (run / "attack.json").write_text(json.dumps({"rows": lines}))
        (run / "summary.txt").write_text(what)
        if script == "05_eval.py":
            self.evaluation(run, words)
        if script == "03_steer_selfgen.py":
            (run / "trained.json").write_text(json.dumps({"data_perplexity": math.e, "data_kl": 0.25}))
        if script == "04_grpo.py" and "--eval_every" in words:
            write(run / "eval.jsonl", [{"step": s, "asr test_wrapped": 0.9 - s / 100} for s in range(0, 101, 10)])

    def evaluation(self, run, words):
        names = [word.split("=")[0] for word in words[words.index("--models") + 1 : words.index("--bench")]]
        cases = [word.split("=")[0] for word in words[words.index("--bench") + 1 : words.index("--n")]]
        cases += [f"{case}.uncut" for case in cases if "uncut" in words]
        if "--prefill" in words:
            begun = words[words.index("--prefill") + 1 : words.index("--judges")]
            cases += [f"wrapped.{start}" for start in begun]
        if "--verify_test" in words:
            cases += ["verify", "verify.uncut"]
        lines = []
        for name in names:
            for case in cases:
                for k, metric in enumerate(("asr", "asr_any", "compliance", "accuracy", "verify_f1")):
                    value = round((hash_of(name, case) + k) / 1000, 4)
                    if (name, case, metric) == ("ThinkSafe", "wrapped.uncut", "asr"):
                        value = 0.31
                    lines.append({"model": name, "metric": metric, "benchmark": case, "value": value})
                if case.startswith("wrapped"):
                    texts = ["this is harmful", "this is safe", "hm", "this is harmful"]
                    row = {"id": "p", "harmful": True, "samples": [{"thinking": text} for text in texts]}
                    write(run / name / f"{case}.responses.jsonl", [row])
                    told = [{"safety": word} for word in ("safe", "unsafe", "unsafe", "unsafe")]
                    write(run / name / f"{case}.gold-1.answer.jsonl", [{"id": "p", "verdicts": told}])
        (run / "results.json").write_text(json.dumps({"rows": lines}))

    def of(self, ending):
        """The words of the one call whose run folder ends so."""
        [words] = [w for _, w, _ in self.asked if any(word.endswith(f"/{ending}") for word in w[:2])]
        return words


def hash_of(name, case):
    return sum(map(ord, name + case)) % 900


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(matrix, "tokens", lambda *folders: {"stage 03": (100, 300), "a GRPO step": (20, 10)})
    return Fake(monkeypatch)


def run_matrix(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(matrix, "OUT", tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--runs", str(tmp_path / "runs"), "--jobs", "1", *words])
    matrix.main()
    return json.loads((tmp_path / "out/matrix.json").read_text())


def test_from_the_worlds_to_the_page(monkeypatch, tmp_path, fake, capsys):
    """Two bases, two seeds: every number goes where its row, condition and column are; then the claims and the figure."""
    result = run_matrix(monkeypatch, tmp_path, "--bases", "1", "0", "--seeds", "2")
    assert list(result["bases"]) == ["0", "1"] and result["bases"]["1"]["seeds"] == 2
    cores = {"base", *rows.CORE, matrix.UNTIL}
    assert {*result["bases"]["0"]["rows"]} == cores | {*rows.ABLATIONS}
    assert {*result["bases"]["1"]["rows"]} == {"base", *rows.SHORT}
    own = result["bases"]["1"]["rows"]["SInternal+GRPO"]

    def value(case, k):
        return (hash_of("SInternal+GRPO", case) + k) / 1000

    assert own["preset"][ASR] == [value("wrapped", 0)] * 2
    assert own["T = 1"][ASR] == [value("wrapped.uncut", 0)] * 2
    assert own["any of 8, T = 1"][ASR] == [value("wrapped.uncut", 1)] * 2
    assert own["think-open"][ASR] == [value("wrapped.think-open", 0)] * 2
    assert own["answer"][ASR] == [value("wrapped.answer", 0)] * 2
    assert own["T = 1"][matrix.F1] == [value("verify.uncut", 4)] * 2
    assert own["search"][ASR] == [0.5] * 2  # a and b of four: broken by either attack
    assert own["T = 1"][COMPLIANCE] == [value("benign.uncut", 2)] * 2
    assert own["preset"][matrix.SUMS] == [value("sums", 3)] * 2
    assert own["preset"][GAP] == [round(value("wrapped", 0) - value("plain", 0), 4)] * 2
    assert own["any of 8"][BOTH] == [round(value("wrapped", 1) + 1 - value("benign", 2), 4)] * 2
    assert own["search"][BOTH] == [round(0.5 + 1 - value("benign.uncut", 2), 4)] * 2
    assert own["preset"][tables.CHECKED] == [0.75] * 2 and own["preset"][tables.WELL] == [round(1 / 3, 4)] * 2
    assert own["preset"][tables.RIGHT] == [round(2 / 3, 4)] * 2 and own["preset"][tables.SAFE] == [0.5] * 2
    data = result["bases"]["0"]["rows"]["ThinkSafe"][DATA]
    assert data[matrix.PERPLEXITY] == [1.0] * 2 and data[KL] == [0.25] * 2
    # 0.31 is reached at step 60, and a step is (2 · 20 + 6 · 10) / (2 · 100 + 6 · 300) = 1/20 of stage 03
    assert data[COST] == [round(1 / 3, 4)] * 2

    for name in ("sinternal", "thinksafe", "grpo"):
        shutil.copy(OUT / f"{name}.json", tmp_path / "out")
    monkeypatch.setattr(verdicts, "OUT", tmp_path / "out")
    verdicts.main()
    claims = json.loads((tmp_path / "out/claims.json").read_text())["claims"]
    assert (tmp_path / "out/claims.md").read_text() == verdicts.page_of(claims, result)
    assert (tmp_path / "out/matrix.json").read_text().count("\n") < 3000
    assert (tmp_path / "out/claims.png").stat().st_size > 10_000
    assert "not run" in (tmp_path / "out/claims.md").read_text()


def test_how_the_rows_are_trained_and_asked(monkeypatch, tmp_path, fake):
    monkeypatch.setattr(rows, "SHORT", list(rows.CORE))  # on another base, whose paths say where a stage is started
    run_matrix(monkeypatch, tmp_path, "--bases", "2", "--seeds", "1", "--groups", "core", "ablations")
    world = tmp_path / "runs/world2"
    (builds, places) = ([a for a in fake.asked if a[0] == "build.py"], [a for a in fake.asked if a[0] != "build.py"])
    [(_, built, _)] = builds
    assert built == ["--only", "lrm", "guard", "expert", "other", "--out", str(world / "tiny"), "--seed", "2"]
    assert {home for _, _, home in places} == {world}

    def option(row, name):
        words = fake.of(f"seed0/{row}")
        return words[words.index(name) + 1]

    assert option("SInternal-ThinkSafe", "--model") == str(world / "seed0/SInternal/checkpoint")
    assert option("ThinkSafe-SInternal", "--model") == str(world / "seed0/ThinkSafe/checkpoint")
    assert option("ThinkSafe-SInternal", "--responses") == str(world / "seed0/01")
    assert option("other-answers", "--responses") == str(world / "seed0/01-other")
    assert option("01-other", "--model") == str(world / "tiny/other")
    assert option("half-the-rows", "--responses") == str(world / "seed0/01-half")
    assert option("SInternal+GRPO", "--steps") == "40" and option("base+GRPO-100", "--steps") == "100"
    assert option("base+GRPO", "--model") == "tiny/lrm" == option("SInternal", "--model")
    assert option("SInternal-rank-16", "--lora_rank") == "16" and "--lora_rank" not in fake.of("seed0/SInternal")
    assert "--eval_every" in fake.of("seed0/base+GRPO") and "--eval_every" not in fake.of("seed0/ThinkSafe+GRPO")
    assert fake.of("seed0/verification-rows+GRPO")[-1] == str(world / "seed0/SInternal/train.jsonl")
    wrapped, others, starts = (fake.of(f"seed0/core-{name}") for name in ("wrapped", "others", "starts"))
    assert wrapped[wrapped.index("--n") + 1] == "8" and others[others.index("--n") + 1] == "2"
    assert starts[starts.index("--prefill") + 1] == "think-open" and "uncut" not in starts
    for words in (wrapped, others, starts):
        assert "base=tiny/lrm" in words and words[words.index("--judges") + 1] == "tiny/gold.py"
        assert f"ThinkSafe+GRPO={world}/seed0/ThinkSafe+GRPO/checkpoint" in words
    files = [
        [json.loads(line)["id"] for line in (world / f"wrapped_{name}.jsonl").open()] for name in ("harmful", "benign")
    ]
    assert files == [["0", "1"], ["2"]]


def test_what_has_finished_is_not_run_again_and_other_bases_stay(monkeypatch, tmp_path, fake):
    first = run_matrix(monkeypatch, tmp_path, "--bases", "1", "--seeds", "1")
    count = len(fake.asked)
    assert run_matrix(monkeypatch, tmp_path, "--bases", "1", "--seeds", "1") == first and len(fake.asked) == count
    (tmp_path / "runs/world1/seed0/SInternal+GRPO/summary.txt").unlink()
    run_matrix(monkeypatch, tmp_path, "--bases", "1", "--seeds", "1")
    assert len(fake.asked) == count + 1
    both = run_matrix(monkeypatch, tmp_path, "--bases", "2", "--seeds", "1")
    assert both["bases"]["1"] == first["bases"]["1"] and list(both["bases"]) == ["1", "2"]


def test_a_group_alone_keeps_the_other_rows(monkeypatch, tmp_path, fake):
    core = run_matrix(monkeypatch, tmp_path, "--bases", "0", "--seeds", "2", "--groups", "core")["bases"]["0"]
    assert {*core["rows"]} == {"base", *rows.CORE, matrix.UNTIL}
    shutil.rmtree(tmp_path / "runs")  # figures outlive the runs
    (tmp_path / f"runs/world0/seed0/{rows.LONGER}").mkdir(parents=True)
    fake.asked.clear()
    words = ["--bases", "0", "--groups", "ablations", "--seeds"]
    both = run_matrix(monkeypatch, tmp_path, *words, "2")["bases"]["0"]
    assert {*both["rows"]} == {*core["rows"], *rows.ABLATIONS} and len(both["rows"]["with-KL"]["preset"][ASR]) == 2
    assert {name: both["rows"][name] for name in core["rows"]} == core["rows"]
    measured = [words for script, words, _ in fake.asked if script in ("05_eval.py", "attack.py")]
    assert len(measured) == 10 and not any("ThinkSafe+GRPO" in " ".join(words) for words in measured)
    with pytest.raises(SystemExit, match="have 2 seeds: --seeds 2"):  # rows are paired by seed
        run_matrix(monkeypatch, tmp_path, *words, "1")


def test_grpo_goes_on_from_a_copy(tmp_path):
    write(tmp_path / "short/metrics.jsonl", [{"step": 40}])
    (tmp_path / "short/summary.txt").write_text("done")
    (tmp_path / "long.part").mkdir()  # a copy that was cut off
    rows.go_on_from(tmp_path / "short", tmp_path / "long")
    assert {path.name for path in (tmp_path / "long").iterdir()} == {"metrics.jsonl"}
    assert (tmp_path / "short/summary.txt").exists() and not (tmp_path / "long.part").exists()
    (tmp_path / "long/state").write_text("60")
    rows.go_on_from(tmp_path / "short", tmp_path / "long")
    assert (tmp_path / "long/state").exists()


def test_tokens_of_stage_03_and_of_a_grpo_step(tmp_path, tokenizer):
    """Two prompts, one kept at its second try, three epochs; GRPO with 8 responses of 10 and 20 tokens, half flat."""
    prompts = [json.loads(line) for file in curves.PROMPTS for line in (ROOT / file).open()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in prompts]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    length = {row["id"]: len(i) for row, i in zip(prompts, ids)}
    a, b = prompts[0]["id"], prompts[5]["id"]
    steered, grpo = tmp_path / "ThinkSafe", tmp_path / "base"
    made = [(f"{a}|1", 40, 7), (f"{a}|2", 50, 5), (f"{b}|1", 12, 11)]
    write(steered / "responses.jsonl", [{"id": i, "prompt_tokens": p, "samples": [{"tokens": n}]} for i, p, n in made])
    write(steered / "train.jsonl", [{"id": a, "try": 2}, {"id": b, "try": 1}])
    write(steered / "options.json", [{"options": {"epochs": 3}}])
    write(grpo / "options.json", [{"options": {"batch_size": 2, "group_size": 4}}])
    write(grpo / "metrics.jsonl", [{"response_tokens": n, "zero_spread_groups": 0.5} for n in (10, 20)])
    prompt = sum(length.values()) / len(length)
    assert curves.tokens(steered, grpo) == {
        "stage 03": (40 + 7 + 50 + 5 + 12 + 11, 3 * (length[a] + 5 + length[b] + 11)),
        "a GRPO step": (round(2 * prompt + 8 * 15), round(4 * prompt + 4 * 15)),
    }


# The committed files --------------------------------------------------------------------------------------------------
needs_matrix = pytest.mark.skipif(not (OUT / "matrix.json").exists(), reason="no results/claims/matrix.json")


@needs_matrix
def test_committed_pages_are_what_the_scripts_write():
    result = json.loads((OUT / "matrix.json").read_text())
    claims = verdicts.all_claims(result)
    assert json.loads((OUT / "claims.json").read_text())["claims"] == json.loads(json.dumps(claims))
    assert (OUT / "claims.md").read_text() == verdicts.page_of(claims, result)
    assert (OUT / "rows.md").read_text() == matrix.rows_page(result)
    assert (OUT / "claims.md").read_text().strip() in (ROOT / "docs/claims.md").read_text()


@needs_matrix
def test_every_committed_verdict_by_scipy():
    """From the values per seed, by SciPy's confidence interval of the paired difference."""
    result, seen = json.loads((OUT / "matrix.json").read_text()), 0
    for claim in json.loads((OUT / "claims.json").read_text())["claims"]:
        for base, cells in claim["bases"].items():
            for condition, cell in cells.items():
                if cell["verdict"] in ("not run", "confounded"):
                    continue
                own = result["bases"][base]["rows"]
                pair = [own[name][condition][claim["column"]] for name in (claim["ours"], claim["other"])]
                pair = [(a, b) for a, b in zip(*pair) if None not in (a, b)]
                effect = np.array([a - b for a, b in pair]) * (-1 if "↓" in claim["column"] else 1)
                if len(effect) < 2 or np.ptp(effect) < 1e-9:
                    continue
                low, high = scipy.stats.ttest_1samp(effect, 0).confidence_interval(0.95)
                bar = -0.05 if claim["kept"] else 0.05
                word = "appears" if low > bar else "does not" if high < bar else "undecided"
                assert cell["verdict"] == word, (claim["text"], base, condition)
                seen += 1
    assert seen > 100
