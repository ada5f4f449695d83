"""A finished run of stage 05 as logs of Inspect, for `inspect view` and whatever else reads them: one for each model and
benchmark, <out>/<model>/<benchmark>.eval. Needs the package inspect-ai.

    python bench/to_inspect.py runs/demo/05_eval --out logs
    inspect view --log-dir logs

A prompt is a sample, each of its responses an epoch: the thinking as reasoning, the answer as text. A judge's scores are
its verdict on the answer, with the one on thinking and answer in the metadata; "right" says of maths and verifications
whether the answer is. What results.json says of a metric stands in the log's results."""

import argparse
import importlib.util
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import judges  # noqa: E402
from plumbing import fail  # noqa: E402
from plumbing.transcripts import transcripts  # noqa: E402


def write_logs(run: Path, out: Path) -> list[Path]:
    """Writes the logs; returns their paths."""
    from inspect_ai.log import write_eval_log

    data = json.dumps(transcripts(run), ensure_ascii=False)
    data = json.loads(data.encode("utf-8", "replace"))  # halves of surrogates stand in no log
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    moment = (run / "results.json").stat().st_mtime
    created = datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
    paths = []
    for m, model in enumerate(data["models"]):
        for benchmark in data["benchmarks"]:
            rows = [
                row for row in data["rows"] if row["benchmark"] == benchmark and row["responses"][m]
            ]
            if not rows:
                continue
            samples = []
            for row in rows:
                for k, response in enumerate(row["responses"][m]):
                    samples.append(sample_of(row, k, response, model, data["judges"]))
            path = out / model / f"{benchmark}.eval"
            path.parent.mkdir(parents=True, exist_ok=True)
            log = log_of(run, results, model, benchmark, created, samples)
            write_eval_log(log, str(path), format="eval")
            paths.append(path)
    return paths


def sample_of(row: dict, k: int, response: dict, model: str, judge_names: list[str]):
    """Response k to a prompt, an EvalSample."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ChatMessageSystem
    from inspect_ai.model import (
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        ModelOutput,
        ModelUsage,
    )

    roles = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    turns = [roles[turn["role"]](content=turn["content"]) for turn in row["turns"]]
    content = [ContentText(text=response["answer"])]
    if response["thinking"]:
        content.insert(0, ContentReasoning(reasoning=response["thinking"]))
    message = ChatMessageAssistant(content=content, source="generate", model=model)
    reason = "max_tokens" if response["finish"] == "length" else "stop"
    choice = ChatCompletionChoice(message=message, stop_reason=reason)
    usage = ModelUsage(output_tokens=response["tokens"], total_tokens=response["tokens"])
    metadata = {"kind": row["kind"], "category": row["category"], "state": response["state"]}
    if row["start"]:
        metadata["begun by the attacker"] = row["start"]
    return EvalSample(
        id=row["id"],
        epoch=k + 1,
        input=row["turns"][0]["content"]
        if [t["role"] for t in row["turns"]] == ["user"]
        else turns,
        target=row["gold"] or row["verdict"],
        messages=[*turns, message],
        output=ModelOutput(model=model, choices=[choice], usage=usage),
        model_usage={model: usage},
        scores=scores_of(row, response, judge_names),
        metadata=metadata,
    )


def scores_of(row: dict, response: dict, judge_names: list[str]) -> dict:
    """{judge: Score of the safety, "judge refusal" and whatever else its verdict has}, and "right"
    where a right answer is set."""
    from inspect_ai.scorer import CORRECT, INCORRECT, Score

    scores = {}
    for name, texts in zip(judge_names, response["verdicts"]):
        for field, value in texts.get("answer", {}).items():
            together = texts.get("response", {}).get(field)
            more = {"on thinking and answer": together}
            if value is not None:
                key = name if field == "safety" else f"{name} {field}"
                scores[key] = Score(value=value, answer=response["answer"], metadata=more)
    if "check" in response:
        scores["self-checker"] = Score(value=response["check"]["self_check"])
    if row["kind"] in ("maths", "verify"):
        field = "gold" if row["kind"] == "maths" else "verdict"
        right = judges.is_right({field: row[field]}, response["answer"])
        scores["right"] = Score(value=CORRECT if right else INCORRECT, answer=response["answer"])
    return scores


def log_of(run: Path, results: dict, model: str, benchmark: str, created: str, samples: list):
    """The EvalLog of one model on one benchmark."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalMetric, EvalResults, EvalScore
    from inspect_ai.log import EvalSpec, EvalStats
    from inspect_ai.model import GenerateConfig

    recipe, metrics = results["recipe"], {}
    for row in results["rows"]:
        if (row["model"], row["benchmark"]) == (model, benchmark):
            interval = {name: row[name] for name in ("low", "high", "n")}
            metric = EvalMetric(name=row["metric"], value=row["value"], metadata=interval)
            metrics.setdefault(row["judge"] or "states", {})[row["metric"]] = metric
    scores = [EvalScore(name=name, scorer=name, metrics=own) for name, own in metrics.items()]
    decoding = dict(recipe["decoding"])
    ids = list(dict.fromkeys(sample.id for sample in samples))
    spec = EvalSpec(
        eval_id=f"{model}/{benchmark}",
        run_id=run.resolve().name,
        created=created,
        task=benchmark,
        task_id=f"{model}/{benchmark}",
        model=model,
        model_generate_config=GenerateConfig(max_tokens=decoding.pop("max_new_tokens"), **decoding),
        model_args={name: str(value) for name, value in recipe["models"][model].items()},
        dataset=EvalDataset(name=benchmark, samples=len(ids), sample_ids=ids),
        config=EvalConfig(epochs=recipe["responses per prompt"]),
        packages=recipe["versions"],
        metadata={"code": recipe["code"], "judges": recipe["judges"]},
    )
    totals = {"total_samples": len(samples), "completed_samples": len(samples)}
    stats = EvalStats(started_at=created, completed_at=created)
    outcome = EvalResults(**totals, scores=scores)
    return EvalLog(status="success", eval=spec, results=outcome, stats=stats, samples=samples)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the options)")
    parser.add_argument("run", type=Path, help="folder of a finished run of stage 05")
    parser.add_argument("--out", type=Path, default=Path("logs"), help="folder of the logs")
    options = parser.parse_args()
    if importlib.util.find_spec("inspect_ai") is None:
        fail("logs of Inspect need the package inspect-ai: pip install inspect-ai")
    paths = write_logs(options.run, options.out)
    print(f"{len(paths)} logs in {options.out}: inspect view --log-dir {options.out}")


if __name__ == "__main__":
    main()
