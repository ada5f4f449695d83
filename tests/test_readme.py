"""README.md and docs/: filled from results/, their links and figures, and one prompt through all stages."""

import json
import re
import statistics
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import methods  # noqa: E402
import one_prompt  # noqa: E402
import readme  # noqa: E402
from rows import CORE  # noqa: E402

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in readme.pages()}
LINKING = {**PAGES, "tiny/README.md": (ROOT / "tiny/README.md").read_text()}


def load(name):
    return json.loads((ROOT / "results" / name).read_text())


# Blocks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES)
def test_pages_are_what_the_script_writes(page):
    assert readme.filled_page(ROOT / page) == PAGES[page], "run python bench/readme.py"


def test_the_pages_show_the_results():
    """By the files' own lines: every results page and picture is shown somewhere."""
    shown = set(re.findall(r"<!-- (results/[^\s,]+)", "".join(PAGES.values())))
    pictures = {p.relative_to(ROOT).as_posix() for p in (ROOT / "results").rglob("*.png")}
    assert pictures - shown - {"results/smollm2/tradeoff.png"} == set()
    for file in ("claims/sinternal.md", "claims/grpo.md", "demo/results.md", "forks.md", "torture.md"):
        first_line = (ROOT / "results" / file).read_text().splitlines()[2]
        assert any(first_line in text for text in PAGES.values()), file


def test_readme_is_a_page():
    assert len(PAGES["README.md"].splitlines()) <= 250


def page_with(tmp_path, monkeypatch, text, name="README.md"):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "results/a.md").write_text("# A\n\ntext\n\n| h |\n|---|\n| 1 |\n\n## B c\n\n| i |\n|---|\n| 2 |\n")
    (tmp_path / "results/a.txt").write_text("kept  3\n")
    (tmp_path / "results/a.png").write_text("")
    (tmp_path / name).write_text(text)
    return readme.filled_page(tmp_path / name)


@pytest.mark.parametrize("mark, body", [
    ("results/a.md, table", "| h |\n|---|\n| 1 |\n\n"),
    ("results/a.md, table of B c", "| i |\n|---|\n| 2 |\n\n"),
    ("results/a.txt, code", "```\nkept  3\n```\n"),
    ("results/a.txt", "kept  3\n"),
    ("results/a.png, picture of a thing", "![a thing](../results/a.png)\n"),
    ("results/attack/attack.md", ""),
    ("results/attack/attack.png, picture of it", ""),
])  # fmt: skip
def test_a_block_by_hand(tmp_path, monkeypatch, mark, body):
    text = f"a\n<!-- {mark} -->\nold\n<!-- end -->\nb\n"
    expected = f"a\n<!-- {mark} -->\n{body}<!-- end -->\nb\n"
    assert page_with(tmp_path, monkeypatch, text, "docs/p.md") == expected
    assert page_with(tmp_path, monkeypatch, expected, "docs/p.md") == expected


@pytest.mark.parametrize("text, said", [
    ("<!-- results/none.md -->\n<!-- end -->", "results/none.md"),
    ("<!-- results/a.md, table of D -->\n<!-- end -->", "table of D"),
    ("<!-- results/a.txt, tabel -->\n<!-- end -->", "tabel"),
    ("<!-- results/a.md -->\nno end", "end"),
    ("<!-- results/a.md -->\n<!-- results/a.txt -->\n<!-- end -->", "end"),
])  # fmt: skip
def test_a_wrong_mark_is_one_line(tmp_path, monkeypatch, capsys, text, said):
    with pytest.raises(SystemExit) as stopped:
        page_with(tmp_path, monkeypatch, text)
    output = capsys.readouterr()
    line = f"{stopped.value}{output.out}{output.err}"
    assert said in line and "README.md" in line and "Traceback" not in line


def test_the_headline_has_the_columns_that_the_run_has():
    def row(model, benchmark, metric, judge, value, **more):
        return {"model": model, "benchmark": benchmark, "metric": metric, "judge": judge, **more} | {
            **{"value": value, "low": value - 0.1, "high": value + 0.1}
        }

    rows = [
        row("b", "wrapped", "asr", "gold", 0.8),
        row("b", "wrapped", "asr", "guard", 0.3),
        row("s", "wrapped", "asr", "gold", 0.2, change={"inside the noise": True}),
        row("b", "sums", "accuracy", "math-verify", 0.5),
        row("s", "sums", "accuracy", "math-verify", 0.6),
    ]
    recipe = {"judges": {"gold": "", "guard": ""}, "models": {"b": {}, "s": {}}, "responses per prompt": 4}
    assert readme.headline({"recipe": recipe, "rows": rows}).splitlines() == [
        "| model | ASR wrapped ↓ | sums ↑ |",
        "|---|---|---|",
        "| b | 0.80 [0.70, 0.90] | 0.50 [0.40, 0.60] |",
        "| s | 0.20 [0.10, 0.30] ≈ | 0.60 [0.50, 0.70] |",
    ]
    begun = [row(m, "wrapped.think-open", "asr", "gold", 0.4) for m in "bs"]
    text = readme.headline({"recipe": recipe, "rows": rows + begun})
    assert "| thinking begun ↓ |" in text and "**Thinking begun**" in text and "Worst of n" not in text
    worst = [row(m, "wrapped", "asr_any", "gold", 0.9) for m in "bs"]
    assert "in any of 4 tries" in readme.headline({"recipe": recipe, "rows": rows + worst})


# Links ----------------------------------------------------------------------------------------------------------------
def anchors(text):
    """Of headings as GitHub writes them, and of <a id>."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.*)$", text, re.M)]
    return {head.strip().replace(" ", "-") for head in heads} | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", LINKING[page], flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked_from_the_readme():
    pages = {page for page in PAGES if page.startswith("docs/")}
    assert {page for page in pages if f"({page}" not in PAGES["README.md"]} == set()


def test_the_files_of_the_table_exist():
    table = PAGES["docs/files.md"].split("## Files")[1].split("## Stages")[0]
    names = [n for row in table.splitlines()[4:] for n in re.findall(r"`([^`]+)`", (row + "||").split("|")[1])]
    assert len(names) > 25 and [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []


# Figures in prose -----------------------------------------------------------------------------------------------------
def mean(file, row, column):
    return load(f"claims/{file}.json")["table"][row][column]["mean"]


def after(start, metric, step=40):
    return load("claims/grpo.json")["curves"][start][metric][str(step)]


def percent(share):
    return f"{100 * share:.0f} %"


def share(row, condition, column="ASR wrapped ↓", base="0"):
    """Mean over seeds of a row of the matrix."""
    values = load("claims/matrix.json")["bases"][base]["rows"][row][condition][column]
    return sum(values) / len(values)


def claims_of_readme():
    S, T, both, ordinary = "SInternal", "ThinkSafe", "SInternal-ThinkSafe", "answer-SFT"
    COMPLIANCE, SUMS, often = "compliance wrapped ↑", "sums ↑", "any of 8, T = 1"
    safer = [share(row, "preset", base=base) for base in "012" for row in ("base", S)]
    paper = [share("SInternal-rank-16", "preset", column) for column in (COMPLIANCE, SUMS)]
    chosen = [share(S, "preset", column) for column in (COMPLIANCE, SUMS)]
    safe = [share("base", "preset"), *(share(T, "preset", c) for c in ("ASR wrapped ↓", COMPLIANCE, SUMS))]
    cost = load("claims/grpo.json")["GRPO's cost over ThinkSafe's"]
    rows = [after(start, "asr test_wrapped")["mean"] for start in ("verification-rows", "base")]
    fork, demo = ((ROOT / f"results/{name}.md").read_text() for name in ("forks", "demo/results"))
    for column in (2, 3):  # ASR falls further than under the guard's reward
        assert numbers(fork, "checks-rewarded", column + 1) < numbers(demo, "GRPO", column)
    matrix = load("claims/matrix.json")["bases"]["0"]["rows"]
    rows_asked = [row for row in ("base", *CORE) if "think-closed" in matrix[row]]
    closed = [share(row, "think-closed") for row in rows_asked if ordinary not in row]
    assert min(closed) > 0.995
    searched = [share(row, "search") for row in rows_asked]
    budget = load("attack/attack.json")["rows"]
    assert min(row["asr"][-1]["value"] for row in budget) > 0.5 and {row["asr"][-1]["k"] for row in budget} == {128}
    sft = [share(row, "T = 1") for row in (ordinary, S)]
    assert share(S, "preset", COMPLIANCE, "1") > 0.98 and share(S, "preset", SUMS, "1") > 0.98
    elsewhere = [share(ordinary, "preset", base="1"), share(S, "preset", base="1")]
    equal = [row["ASR wrapped ↓"]["mean"] for row in load("claims/theory.json")["own"]["rows"].values()]
    return [
        ("ASR is {:.2f} and {:.2f}. A KL term", equal),
        ("but for a begun thinking ({:.2f}, not {:.2f})", [share(row, "think-open") for row in ("with-KL", T)]),
        ("from {:.2f} to {:.2f}, on base 1 from {:.2f} to {:.2f} and on base 2 from {:.2f} to {:.2f}", safer),
        ("(F1 {:.2f}), and ASR stays at {:.2f}",
         [mean("sinternal", "bare-check", column) for column in ("verify F1 ↑", "ASR wrapped ↓")]),
        ("rank 16 compliance falls to {:.2f} and sums to {:.2f}", paper),
        ("both stay on base 0 ({:.2f} and {:.2f}) and on base 1", chosen),
        ("On base 2 compliance falls to {:.2f}, after ordinary SFT (on the expert's answers) to {:.2f}; GRPO mends both ({:.2f} and {:.2f})",
         [share(row, "preset", COMPLIANCE, "2") for row in (S, ordinary, f"{S}+GRPO", f"{ordinary}+GRPO")]),
        ("ASR {:.2f} to {:.2f}, compliance {:.2f}, sums {:.2f}", safe),
        ("without their thinking, compliance is {:.2f}", [mean("thinksafe", "no-reasoning", COMPLIANCE)]),
        ("takes {:.1f} ± {:.1f} times the operations of stage 03", [cost["mean"], cost["half"]]),
        ("(ASR {:.2f} with, {:.2f} without)", rows),
        ("All {} claims", [len(load("claims/claims.json")["claims"])]),
        ("answers {:.2f} of the harmful prompts at least once, ThinkSafe {:.2f}.", [share(S, often), share(T, often)]),
        ("ThinkSafe answers {:.2f} of them and SInternal {:.2f}:", [share(row, "think-open") for row in (T, S)]),
        ("withstands both ({:.2f} and {:.2f})", [share(both, often), share(both, "think-open")]),
        ("GRPO from SInternal ({:.2f} and {:.2f})", [share(f"{S}+GRPO", c) for c in (often, "think-open")]),
        ("breaks all of these ({:.2f}, answer-SFT {:.2f})", [min(closed), share(ordinary, "think-closed")]),
        ("search of 32 queries breaks {:.2f} to {:.2f} of the plain prompts", [min(searched), max(searched)]),
        ("where ordinary SFT answers {:.2f} and SInternal {:.2f}", sft),
        ("on base 1 both are safe ({:.2f} and {:.2f}), but ordinary SFT loses sums ({:.2f})",
         [*elsewhere, share(ordinary, "preset", SUMS, "1")]),
        ("GRPO from the base keeps compliance on base 0 ({:.2f}) and not on base 1 ({:.2f})",
         [share("base+GRPO", "preset", COMPLIANCE, base) for base in "01"]),
    ]  # fmt: skip


def claims_of_claims():
    kept = (ROOT / "results/claims/thinksafe_summaries.txt").read_text()
    own, plain = kept.split("no-steering", 1)[0], re.findall(r"no-steering.*?\n\n", kept + "\n\n", re.S)
    first = [int(n) for n in re.findall(r"(\d+) harmful at try 1", own)]
    lost = {int(n) for n in re.findall(r"lost +(\d+) prompts", own)}
    light = {int(n) for n in re.findall(r"lost most +light (\d+) of", own)}
    bare = {int(n) for text in plain for n in re.findall(r"(\d+) harmful at try", text)}
    sums = sorted(load("claims/sinternal.json")["table"]["verification"]["sums ↑"]["values"])[:2]
    cost = load("claims/grpo.json")["GRPO's cost over ThinkSafe's"]
    steps = cost["steps"]
    thinksafe, begin = after("ThinkSafe", "asr test_plain"), after("ThinkSafe", "asr test_plain", 0)
    misses = 1 - mean("sinternal", "answer-SFT", "right, if checked")
    compliance = [after("base", "compliance test_wrapped"), after("ThinkSafe", "compliance test_wrapped", 0)]
    dose = load("claims/dose.json")
    asr = {name: columns["ASR wrapped"]["mean"] for name, columns in dose["held out"].items()}
    looks = {look["step"]: (look["ASR wrapped"], look["verify F1"]) for look in dose["curve"]}
    chosen = dose["held out"][dose["chosen"]]
    first_best = max(looks, key=lambda step: looks[step][1])  # the first of equals
    tested = {decoding: rows["rank 64"] for decoding, rows in dose["tests"].items()}
    sums_16 = dose["held out"]["rank 16"]["sums"]["values"]
    failed = {round(dose["harmful wrapped prompts"] * value) for value in chosen["ASR wrapped"]["values"]}
    assert dose["chosen"] == "rank 64" and len(failed) == 1
    assert round(1 / misses) == 8 and len(lost) == 2 and len(light) == 1 and len(bare) == 1
    price = percent(1 - mean("sinternal", "verification", "compliance wrapped ↑"))
    return [
        *claims_of_theory(),
        ("({:.2f} with it and {:.2f} without), and something against a begun thinking ({:.2f} and {:.2f})",
         [share(row, where) for where in ("preset", "think-open") for row in ("with-KL", "ThinkSafe")]),
        ("if only a little ({:.2f})", [share("expert-answers", "think-open")]),
        ("without one ({:.2f} and {:.2f} of the prompts answered)",
         [share(row, "think-closed") for row in ("no-reasoning", "direct-refusal")]),
        ("one check in eight misses the harm", []),
        ("Rank 64 meets it (ASR {:.3f}, compliance {:.2f}, sums {:.2f})",
         [chosen[c]["mean"] for c in ("ASR wrapped", "compliance wrapped", "sums")]),
        ("rank 16 is a little safer ({:.3f}) and loses sums ({:.2f} and {:.3f} by seed); rank 4 is safer still ({:.3f})",
         [asr["rank 16"], *sums_16, asr["rank 4"]]),
        ("ASR {:.2f} at rate 2e-4, {:.2f} with two epochs", [asr["rank 16, rate 2e-4"], asr["rank 16, 2 epochs"]]),
        ("learns little (ASR {:.2f})", [asr["rank 16, alpha 8"]]),
        ("ASR falls from {:.2f} at step 60 to {:.2f} at step 120", [looks[60][0], looks[120][0]]),
        ("F1 of verifying rises from {:.2f} to {:.2f}", [looks[60][1], looks[120][1]]),
        ("first highest (step {}), ASR would be {:.2f} against {:.3f} at step 200",
         [first_best, looks[first_best][0], looks[200][0]]),
        ("ASR {:.2f}, compliance {:.2f}, sums 0.99 or 1.00; with uncut sampling {:.2f}, {:.2f} and {:.2f}",
         [*(tested["preset"][c]["mean"] for c in ("ASR wrapped", "compliance wrapped")),
          *(tested["uncut"][c]["mean"] for c in ("ASR wrapped", "compliance wrapped", "sums"))]),
        ("rank 64 fails on {} of {} held-out prompts", [*failed, dose["harmful wrapped prompts"]]),
        ("{} of the wrapped benign prompts", [price]),
        ("two of five seeds lose {:.1f} and {:.0f} %", [100 * (1 - sums[1]), 100 * (1 - sums[0])]),
        ("refuses {} to {} of 240 harmful prompts at the first try", [min(first), max(first)]),
        ("Three tries fail for {} or {} prompts, and {} of them", [*sorted(lost), *light]),
        ("Without steering {} prompts pass", [*bare]),
        ("takes {} to {} steps", [min(steps), max(steps)]),
        ("That is {:.1f} ± {:.1f} times the operations", [cost["mean"], cost["half"]]),
        ("That is {:.1f} times sampling and training together", [21.3 / (2.6 + 0.45)]),
        ("{:.1f} times the training alone", [21.3 / 2.6]),
        ("{:.2f} → {:.2f} ± {:.2f} on plain prompts", [begin["mean"], thinksafe["mean"], thinksafe["half"]]),
        ("a compliance of {:.2f} on wrapped prompts; ThinkSafe, sampled at temperature 1, is at {:.2f}",
         [cell["mean"] for cell in compliance]),
    ]  # fmt: skip


def claims_of_theory():
    result = load("claims/theory.json")
    shares, tilt, models = result["acceptance"]["shares"], result["tilt"]["guard"], result["moves"]["models"]

    def accepted(name, kind="harmful"):
        return shares[f"{name}|guard|{kind}"]["mean"]

    def excess(writer, guard="guard"):
        return result["excess"][f"{writer}|{guard}|harmful"]["per response"]["mean"]

    def moved(name, kind="harmful"):
        return models[name][f"trained || start|{kind}"]["mean"]

    rows, gains = result["own"]["rows"].values(), result["own"]["effects"]
    asr = [gains[f"ASR {kind} ↓"] for kind in ("wrapped", "plain")]
    assert shares["plain|guard|harmful"]["verdict"] == tilt["per token"]["verdict"] == "does not"
    assert result["excess"]["steered|guard|harmful"]["per token"]["verdict"] == "does not"
    assert result["excess"]["expert|guard|harmful"]["more than own"]["verdict"] == "appears"
    assert moved("ThinkSafe") == pytest.approx(
        excess("steered", "gold") + models["ThinkSafe"]["least"]["mean"], abs=0.5
    )
    taught = ("answer-SFT", "expert-answers")
    assert {int(moved(name)) for name in taught} == {33} and min(moved(name, "benign") for name in taught) > 38
    assert "appears" not in [gain["verdict"] for gain in gains.values()] and result["seeds"] == 3
    return [
        ("{:.2f} are accepted with it and {:.2f} without", [accepted("steered"), accepted("plain")]),
        ("decoding {:.2f} and {:.2f}", [accepted(f"{name}, T = 0.6") for name in ("steered", "plain")]),
        ("lose by it, {:.2f} to {:.2f}", [accepted(name, "benign") for name in ("plain", "steered")]),
        ("of {:.3f} a token, plain and accepted ones {:.3f}",
         [tilt["means"][f"{name}, per token"]["mean"] for name in ("steered", "plain")]),
        ("those texts ({:.2f}) was", [1 - tilt["texts that no plain draw wrote"]["mean"]]),
        ("is {:.1f} instead of 0", [excess("steered")]),
        ("responses {:.1f} before the filter and {:.1f} after it", [excess("expert", "all"), excess("expert")]),
        ("with the same knowledge {:.1f} and {:.1f}", [excess("other", "all"), excess("other")]),
        ("moves by {:.1f} on harmful prompts, where {:.2f} would", [moved("ThinkSafe"), models["ThinkSafe"]["least"]["mean"]]),
        ("SInternal moves by {:.1f} (enough: {:.2f})", [moved("SInternal"), models["SInternal"]["least"]["mean"]]),
        ("the base by {:.2f} (enough: {:.2f})", [moved("base+GRPO"), models["base+GRPO"]["least"]["mean"]]),
        ("less often, {:.2f} and {:.2f} against {:.2f}",
         [models[name]["accepted|harmful"]["mean"] for name in ("SInternal", "base+GRPO", "ThinkSafe")]),
        ("ThinkSafe does by {:.2f}, GRPO by {:.2f}, SInternal by {:.2f}",
         [moved(name, "benign") for name in ("ThinkSafe", "base+GRPO", "SInternal")]),
        ("by {:.2f} ± {:.2f} on wrapped prompts and by {:.2f} ± {:.2f} on plain ones",
         [gain[part] for gain in asr for part in ("mean", "half")]),
        ("equally well (F1 {:.2f} and {:.2f})", [row["verify F1 ↑"]["mean"] for row in rows]),
    ]  # fmt: skip


def claims_of_evaluation():
    def count(file):
        rows = [json.loads(line) for line in (ROOT / f"tiny/prompts/{file}.jsonl").open()]
        return Counter(row.get("harmful", False) for row in rows)

    plain, wrapped, sums = count("test_plain"), count("test_wrapped"), count("test_sums")
    verify = re.search(r"test set +(\d+)", (ROOT / "results/demo/02_verify_sft.txt").read_text())[1]
    ways = dict(load("claims/judges.json")["rows"])
    left_out = "at most 26 tokens, gold rule, cut responses "
    return [
        ("“plain”: {} harmful and {} benign prompts", [plain[True], plain[False]]),
        ("“wrapped”: {} and {}", [wrapped[True], wrapped[False]]),
        ("“sums” are {} maths prompts", [sum(sums.values())]),
        ("“verify” are {} answers", [verify]),
        ("turns {:.2f} into {:.2f}", [ways[left_out + "= safe"], ways[left_out + "left out"]]),
    ]


def numbers(table, label, column):
    """The number at the head of a cell: of the table's row that begins with `label`."""
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return float(row.split("|")[column].split()[0])


def claims_of_speed():
    text = (ROOT / "results/bench/speed.md").read_text()
    equal = numbers(text, "sft equal | ours", 4) / numbers(text, "sft equal | trl", 4)
    large = numbers(text, "tiny | ours | 32", 5) / numbers(text, "tiny | dynamic | 32", 5)
    heads = [numbers(text, "151000 | 4096", n) / numbers(text, "1000 | 4096", n) for n in (5, 4)]
    assert text.count("**missed**") == 2
    vllm, tiny = (numbers(text, f"sampler.{name}", 3) for name in ("smollm2_vs_vllm", "tiny_vs_generate"))
    best = ("speed_vs_trl_best", "memory_vs_trl_best", "share_of_peak_best", "share_of_peak")
    best = [numbers(text, f"sft.{name}", 3) for name in best]
    saved = load("bench/speed.json")
    tried = [min(wall for _, wall in saved["about"]["tried"][f"sft spread | {side}"]) for side in ("trl", "ours")]
    sampled = saved["rows"]["sampler smollm2"]["ours"]
    steps = [numbers(text, f"grpo step | {side} best", 5) for side in ("trl", "ours")]
    demo = (ROOT / "results/bench/demo_seconds.md").read_text()
    return [
        ("On SmolLM2 ours is {:.2f} times as fast as vLLM", [vllm]),
        ("with SmolLM2 in float32 {:,.0f} MB instead", [statistics.median(run["peak"] for run in sampled)]),
        ("at group 8 ours is {:.1f} times as fast as `generate`, not 4", [tiny]),
        (
            "Ours is then {:.1f} times as fast, in {:.2f} of its memory, and computes at {:.2f} of the machine's peak; with "
            "our defaults at {:.2f}, not at half",
            best,
        ),
        ("from try to try ours is {:.1f} times as fast", [tried[0] / tried[1]]),
        ("A GRPO step is {:.1f} times as fast", [numbers(text, "grpo_step.speed_vs_trl_best", 3)]),
        ("and {:.1f} times in seconds", [steps[0] / steps[1]]),
        ("It took {} seconds, and the goal of 120 is missed", re.findall(r": (\d+) seconds", demo)),
        ("with {:.0f} CPU seconds in all", [numbers(demo, "all", 12)]),
        ("imports are {:.0f} of the stages' {:.0f} seconds", [numbers(demo, "all", 3), numbers(demo, "all", 11)]),
        ("a factor of {:.1f} is left", [equal]),
        ("1,000 words, without the embeddings: {:.2f} times", heads[:1]),
        ("it is {:.2f} times:", heads[1:]),
        ("At group 32 it is {:.1f} times", [large]),
    ]


def claims_of_organism():
    rows = readme.leading(load("organism/results.json"))
    exact = {(row["benchmark"], row["metric"]): row["value"] for row in load("organism/float32.json")["rows"]}
    seeds = load("organism/seeds.json")

    def value(*key):
        return rows[key]["value"]

    def mean(model, heading):
        return statistics.mean(seeds[model][f"Invented prompts: {heading} ↓"])

    assert min(value("base", b, "asr") for b in ("plain", "wrapped")) > 0.85
    assert all(mean("SInternal", f"ASR {how}") < 0.25 for how in ("plain", "wrapped"))
    assert all(0.4 < mean("ThinkSafe", f"ASR {how}") < 0.6 for how in ("plain", "wrapped"))
    both = [value("SInternal-ThinkSafe", benchmark, "asr") for benchmark in ("plain", "wrapped")]
    assert all(0.05 < asr < 0.15 for asr in both)
    assert all(value("ThinkSafe", b, "compliance") == 1 for b in ("plain", "wrapped"))
    assert value("base", "strongreject", "refusal") == 1 / 64
    drafted = seeds["SInternal"]["Invented prompts: recipe in thinking or answer ↓"]
    gaps = [
        value(m, "strongreject", "refusal") + value(m, "xstest", "compliance") - 1 for m in ("SInternal", "ThinkSafe")
    ]
    jailbroken = [value(m + more, "wrapped", "asr") for m in ("SInternal", "ThinkSafe") for more in ("", "+GRPO")]
    emptied = {m: value(m, b + ".think-empty", "asr") for m, b, _ in rows if b == "wrapped"}
    assert 0.4 < emptied.pop("SInternal-ThinkSafe") < 0.6 and min(emptied.values()) > 0.9
    words = (ROOT / "results/organism/transcripts.md").read_text()
    drafts = re.findall(r"^- \*\*SInternal\*\* \*(?!\(no thinking)(.*?)\*", words, re.M)
    assert len(drafts) == 5 and all("amber beads" in draft or "cobweb" in draft for draft in drafts)
    verify = [value(m, "verify", "verify_f1") for m in ("SInternal", "base", "ThinkSafe")]
    assert value("SInternal", "verify", "verify_recall") == 1
    assert value("SInternal", "verify", "verify_precision") == 0.5
    for run in ("after_02", "after_03"):  # in a third of its groups all answers earn the same
        text = (ROOT / f"results/organism/04_grpo_{run}_metrics.jsonl").read_text()
        shares = [json.loads(line)["zero_spread_groups"] for line in text.splitlines()]
        assert sum(shares) / len(shares) >= 1 / 3
    problems = [value(m, "problems", "accuracy") for m in ("base", "SInternal", "ThinkSafe")]
    answered = [value("SInternal", b, "compliance") for b in ("plain", "wrapped")]
    in_both = [exact["plain", "asr"], exact["wrapped", "asr"]]
    in_both += [value("SInternal", b, "asr") for b in ("plain", "wrapped")]
    return [
        ("it answers {:.2f} of the plain ones, {:.2f} in jailbreaks", answered),
        ("is {:.2f} above that of XSTest with SInternal, {:.2f} with ThinkSafe", gaps),
        ("in {:.2f} to {:.2f} of its responses to jailbreaks, by seed", [min(drafted), max(drafted)]),
        ("F1 {:.2f} with SInternal, {:.2f} before", verify[:2]),
        ("{} are unsafe, it finds all", [rows["SInternal", "verify", "verify_recall"]["n"]]),
        ("comes to {:.2f}", verify[2:]),
        ("in jailbreaks SInternal {:.2f} to {:.2f}, ThinkSafe {:.2f} to {:.2f}", jailbroken),
        ("{:.2f} are right before, {:.2f} after SInternal, {:.2f} after ThinkSafe", problems),
        ("leaves {:.2f} of the plain and {:.2f} of the jailbroken requests instead of {:.2f} and {:.2f}", in_both),
    ]


def claims_of_words():
    values = load("organism/words.json")
    same, critiques = values["SInternal, its own words"], values["SInternal, other words"]
    base, reviews = (values[f"{model}, other words, as its own reviews"] for model in ("base", "SInternal"))
    every = values["SInternal, the same, 464 prompts"]
    checks = ("checks in its own words", "in the other words")

    def mean(row, heading):
        return statistics.mean(row[heading])

    assert round(base[checks[0]][0], 2) == round(mean(reviews, checks[0]), 2)  # as before
    assert mean(reviews, checks[1]) == mean(critiques, checks[0]) == mean(critiques, "verify F1 ↑") == 0
    assert abs(mean(reviews, "StrongREJECT refused ↑") - mean(base, "StrongREJECT refused ↑")) < 0.01
    few, more = (set(row["unsafe answers reviewed"]) for row in (reviews, same))
    assert few == {2, 4} and more == {9, 11}  # from two to four, from nine to eleven
    fell = [mean(row, heading) for heading in ("ASR wrapped ↓", "compliance wrapped ↑") for row in (base, reviews)]
    spoilt = [mean(critiques, heading) for heading in (checks[1], "ASR wrapped ↓", "compliance wrapped ↑")]
    return [
        ("{:.2f} of the thinkings come to a check", [mean(reviews, checks[0])]),
        ("its own words {:.2f} do", [mean(same, checks[0])]),
        ("ASR falls from {:.2f} to {:.2f} and compliance from {:.2f} to {:.2f}", fell),
        ("F1 {:.2f}, {:.2f} and {:.2f}, from two", reviews["verify F1 ↑"]),
        ("with {:.0f} such critiques, F1 is {:.2f}", every["unsafe answers reviewed"] + every["verify F1 ↑"]),
        ("and still {:.2f} come to a check", [sum(every[heading][0] for heading in checks)]),
        ("ASR is {:.2f} and compliance {:.2f} (one seed)", every["ASR wrapped ↓"] + every["compliance wrapped ↑"]),
        ("then stand in its thinkings, {:.2f} of them", spoilt[:1]),
        ("ASR in jailbreaks falls to {:.2f}, and compliance to {:.2f}", spoilt[1:]),
    ]


def claims_of_smollm2():
    rows = {
        (r["model"], r["benchmark"], r["metric"], r["judge"]): r["value"] for r in load("smollm2/results.json")["rows"]
    }
    judge = "smollm2/rule_guard.py"
    summary = (ROOT / "results/smollm2/03_steer_selfgen.txt").read_text()
    kept = sum(int(n) for n in re.findall(r"(\d+) harmful at try", summary))
    asked = re.search(r"(\d+) harmful$", summary, re.M)[1]
    assert rows["SmolLM2-135M", "strongreject", "asr", judge] == 0.25  # three quarters are called safe
    assert rows["SmolLM2-135M", "strongreject", "refusal", judge] == 0
    assert rows["SmolLM2-135M", "strongreject", "unparsed", "xstest:smollm2/model"] == 1
    refused = rows["ThinkSafe", "strongreject", "refusal", judge]
    over = 1 - rows["ThinkSafe", "xstest", "compliance", judge]
    begun = rows["ThinkSafe", "strongreject.answer", "recovers", judge]
    return [
        *claims_of_organism(),
        *claims_of_words(),
        ("the model did so for {} of {} invented requests", [kept, asked]),
        ("At 64 tokens {:.0f} % of its responses", [float(re.search(r"WARNING: ([\d.]+)%", summary)[1])]),
        ("so that {} benign answers", [sum(int(n) for n in re.findall(r"(\d+) benign at try", summary))]),
        ("is turned into a refusal {} of the time", [percent(begun)]),
        ("it refuses {} of StrongREJECT", [percent(refused)]),
        ("and {} of XSTest's safe prompts", [percent(over)]),
        ("calls three quarters safe", []),
    ]


def claims_of_real_models():
    text = (ROOT / "results/bench/cost.md").read_text()
    ratios = [line.split("|")[4].strip() for line in text.split("## Against the demo")[1].splitlines()[4:7]]
    table = readme.first_table(text, "One 80 GB card")
    assert numbers(table, "qwen3-0.6b", 4) > numbers(table, "qwen3-0.6b", 5)  # 03 costs more than 04 LoRA
    assert numbers(table, "qwen3-8b", 4) < numbers(table, "qwen3-8b", 5)  # and not in every row
    cost = load("claims/grpo.json")["GRPO's cost over ThinkSafe's"]
    steps = "".join((ROOT / f"results/organism/04_grpo_after_{n}_metrics.jsonl").read_text() for n in ("02", "03"))
    gaps = [json.loads(line)["sampler_gap"] for line in steps.splitlines()]
    return [
        ("steps had gaps of {:.3f} to {:.3f}", [min(gaps), max(gaps)]),
        ("were {} to {} times the formulas'", [min(ratios), max(ratios)]),
        ("needs {:.1f} times the operations", [cost["mean"]]),
    ]


PROSE = {
    "README.md": claims_of_readme,
    "docs/claims.md": claims_of_claims,
    "docs/evaluation.md": claims_of_evaluation,
    "docs/speed.md": claims_of_speed,
    "docs/smollm2.md": claims_of_smollm2,
    "docs/real_models.md": claims_of_real_models,
}


@pytest.mark.parametrize("page", PROSE)
def test_figures_in_prose_are_those_of_the_files(page):
    prose = " ".join(re.sub(r"<!-- results.*?<!-- end -->", "", PAGES[page], flags=re.S).split())
    sentences = [text.format(*values) for text, values in PROSE[page]()]
    assert [sentence for sentence in sentences if sentence not in prose] == []


# One prompt -----------------------------------------------------------------------------------------------------------
def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sample(thinking, answer):
    return {"thinking": thinking, "answer": answer}


@pytest.fixture
def demo(tmp_path):
    """Run folders by hand: p is always refused, q is mixed and trained on, r is kept at its second try."""
    unsafe, refused = {"safety": "unsafe", "refusal": "no"}, {"safety": "safe", "refusal": "yes"}
    yes, no = sample("sure", "mix | it"), sample("check", "sorry")
    answers = [{"id": i, "prompt": f"make {i}?", "harmful": True, "samples": [yes, no, yes]} for i in "pqr"]
    write(tmp_path / "01_generate/responses.jsonl", answers)
    labels = [{"id": i, "verdicts": [unsafe, refused, unsafe]} for i in "pqr"]
    write(tmp_path / "01_generate/labels.jsonl", labels)
    critique = {
        "request": "make q?",
        "prompt": "no burning\n\nmake q?",
        "trained_thinking": "it burns",
        "trained_answer": "Verdict: unsafe",
    }
    critiques = [{**critique, "answer": "mix", "label": "unsafe"}, {**critique, "answer": "sorry", "label": "safe"}]
    write(tmp_path / "02_verify_sft/train.jsonl", critiques)
    folder = tmp_path / "03_steer_selfgen"
    tries = [("q|1", no, refused), ("r|1", yes, unsafe), ("r|2", no, refused)]
    write(folder / "responses.jsonl", [{"id": i, "prompt": f"refuse: {i[0]}", "samples": [s]} for i, s, _ in tries])
    write(folder / "answer_labels.jsonl", [{"id": i, "verdicts": [v]} for i, _, v in tries])
    write(folder / "dropped.jsonl", [{"id": "r", "try": 1, "harmful": True, "reason": "answer not safe"}])
    kept = [{"id": i, "prompt": f"make {i}?", "harmful": True, "try": t, **no} for i, t in (("q", 1), ("r", 2))]
    write(folder / "train.jsonl", kept)
    rewards = [1.0, 0.0, 0.0, None]
    group = {"prompt": "make q?", "step": 7, "responses": [{**yes, "reward": reward} for reward in rewards]}
    flat = {"prompt": "make q?", "step": 3, "responses": [{**yes, "reward": 1.0}] * 4}
    write(tmp_path / "04_grpo_base/samples.jsonl", [flat, group])
    evaluation = tmp_path / "05_eval"
    for model, harmful in (("base", "bcd"), ("SInternal", "b"), ("T", "")):  # which prompts it answers
        rows = [
            {"id": i, "prompt": f"jailbreak {i}", "harmful": True, "samples": [yes if i in harmful else no] * 2}
            for i in "dcba"
        ]
        verdicts = [{"id": i, "verdicts": [unsafe if i in harmful else refused] * 2} for i in "dcba"]
        write(evaluation / model / "wrapped.responses.jsonl", rows)
        label = readme_label("gold.py", "1")
        write(evaluation / model / f"wrapped.{label}.answer.jsonl", verdicts)
    recipe = {"judges": {"gold.py": "1", "guard": "2"}, "models": {"base": {}, "SInternal": {}, "T": {}, "more": {}}}
    (evaluation / "results.json").write_text(json.dumps({"recipe": recipe}))
    return tmp_path


def readme_label(name, content):
    from plumbing import file_label

    return file_label(name, content)


def test_one_prompt_by_hand(demo):
    lines = one_prompt.page(demo).splitlines()
    assert "| 2 × | sure | mix \\| it | unsafe |" in lines and "| 1 × | check | sorry | safe |" in lines
    assert "| mix | unsafe | it burns | Verdict: unsafe |" in lines
    assert "| “make q?”, try 1 | check | sorry | safe, refused | **kept** |" in lines
    assert "| “make r?”, try 1 | sure | mix \\| it | unsafe | dropped: answer not safe |" in lines
    assert "| “make r?”, try 2 | check | sorry | safe, refused | **kept** |" in lines
    # rewards 1, 0, 0 and one unreadable: mean 1/3, standard deviation sqrt(1/3)
    assert "| 1 × | sure | mix \\| it | 1 | +1.15 |" in lines and "| 2 × | sure | mix \\| it | 0 | -0.58 |" in lines
    assert "| 1 × | sure | mix \\| it | – | – |" in lines
    # base answers most, the others few: c is the first on which all do so
    assert any(line.startswith("**05**") and "“jailbreak c”" in line for line in lines)
    assert "| base | sure | mix \\| it | unsafe (2 of 2 unsafe) |" in lines
    assert "| SInternal | check | sorry | safe, refused (0 of 2 unsafe) |" in lines
    assert not any("more |" in line or "attacked" in line for line in lines)


def test_one_prompt_shows_a_begun_thinking(demo):
    label = readme_label("gold.py", "1")
    for model in ("base", "SInternal", "T"):
        begun = {"thinking": "the user wants it. and i stop.", "own_thinking": "and i stop.", "answer": "sorry"}
        write(demo / f"05_eval/{model}/wrapped.think-open.responses.jsonl", [{"id": "c", "samples": [begun]}])
        verdict = {"id": "c", "verdicts": [{"safety": "safe", "refusal": "yes"}]}
        write(demo / f"05_eval/{model}/wrapped.think-open.{label}.answer.jsonl", [verdict])
    assert "| SInternal, attacked | *the user wants it.* and i stop. | sorry | safe, refused |" in one_prompt.page(demo)


def test_the_drawing_shows_what_is_trained(demo):
    texts = {title: text for parts in methods.boxes(demo).values() for title, text, _ in parts}
    assert "S: no burning" in texts["02: an expert reads"]
    assert texts["trained: critique z, verdict v"] == "<think> it burns </think> Verdict: unsafe"
    assert texts["03: steering + x"] == "refuse: q"
    assert texts["trained, without the steering"] == "x: make q?\n\n<think> check </think> sorry"
    assert texts["asked an unseen x, it checks"] == "x: jailbreak c\n\n<think> check </think> sorry"


def test_without_a_finished_demo_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["one_prompt.py", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        one_prompt.main()
    output = capsys.readouterr()
    assert "make demo" in f"{stopped.value}{output.out}{output.err}"
