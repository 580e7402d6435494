"""How fast Temper trains and answers, beside TRL, a plain Trainer, and what the products alone would take.

    make bench                 # about half an hour on 2 cores; writes docs/speed.json, and the tables of docs/speed.md
    python -m tests.benchmarks.training --only temper trl_tuned --rows 320                       # prints only
    python -m tests.benchmarks.training --only temper trl_tuned trl_liger                        # on a GPU

Every contender is a process of its own, on all cores, one after the other: the same rows in the same order, the same
optimizer steps and LoRA. Figures of one table come from one run; between runs and machines compare ratios.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from temper.planning import planner
from tests.conftest import ROOT
from tests.support.workflow_tools import environment, snakemake

BATCH, RATE, WARMUP, LORA = 16, 1e-4, 10, {"r": 16, "lora_alpha": 32}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIRST = 5  # steps that are start-up: compilation, memory that is asked for the first time
PAIRS, PROMPTS = 320, 100  # TRL's DPO and a pipeline's single prompts take their time
SFT = ("temper", "temper_float32", "trainer", "trl", "trl_tuned")
NAMES = {
    "temper": "Temper",
    "temper_float32": "Temper, float32",
    "two_at_once": "Temper, two runs at once, one core each",
    "trainer": "transformers.Trainer",
    "trl": "TRL SFTTrainer, as it comes",
    "trl_tuned": "TRL SFTTrainer, tuned",
    "trl_compiled": "TRL SFTTrainer, tuned, compiled",
    "trl_liger": "TRL SFTTrainer, tuned, Liger kernels",
    "temper_dpo": "Temper",
    "trl_dpo": "TRL DPOTrainer, tuned, precomputed reference",
    "pipeline": 'pipeline("text-generation"), a loop',
    "answers": "Temper",
}
PLACE = ROOT / "results" / "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--only", nargs="*", help="some of the contenders; nothing is written to docs/")
    arguments = parser.parse_args()
    wanted = arguments.only or [*SFT, "two_at_once", "ceiling", "temper_dpo", "trl_dpo", "pipeline", "answers"]
    PLACE.mkdir(parents=True, exist_ok=True)
    results = {"machine": _machine(), "rows": arguments.rows, "batch_size": BATCH}
    results |= _fine_tuning(wanted, arguments.rows)
    results |= _preferences(wanted)
    results |= _answering(wanted)
    text = "\n\n".join(table for table in _tables(results) if table)
    print(text)
    if not arguments.only:
        (ROOT / "docs" / "speed.json").write_text(json.dumps(results, indent=2) + "\n")
        _into_page(ROOT / "docs" / "speed.md", text)


# --- the three comparisons -----------------------------------------------------------------------


def _fine_tuning(wanted: list[str], rows: int) -> dict:
    made = _prepared("demo", f"data.limit={{train:{rows},validation:200,test:500}}", "tokenize_splits")
    job, figures = _job(made), {}
    for name in [name for name in (*SFT, "trl_compiled", "trl_liger") if name in wanted]:
        figures[name] = _temper(name, job) if name.startswith("temper") else _peer(name, job)
        _run("score", name, job)
        figures[name] |= _read(name, "score.json")
        _say(name, figures[name])
    if "two_at_once" in wanted:
        figures["two_at_once"] = _two_at_once(job)
        _say("two_at_once", figures["two_at_once"])
    found = {"fine_tuning": figures}
    if "ceiling" in wanted:
        computed = _computed_tokens(job["splits"], job["order"])
        sizes = {"tokens_per_step": sum(job["tokens"]) / len(job["tokens"]), "computed_tokens_per_step": computed}
        _run("ceiling", "ceiling", job | sizes)
        found["ceiling"] = _ceiling(sizes, _read("ceiling", "ceiling.json"))
    return found


def _preferences(wanted: list[str]) -> dict:
    names = [name for name in ("temper_dpo", "trl_dpo") if name in wanted]
    if not names:
        return {}
    overrides = f"data.limit={{train:{PAIRS},validation:16,test:16}}"
    made = _prepared("dpo", overrides, "reference_logprobs")
    job, figures = _job(made) | {"references": made["reference_logprobs"]}, {}
    for name in names:
        figures[name] = _temper(name, job) if name == "temper_dpo" else _peer(name, job)
        _say(name, figures[name])
    return {"preferences": figures}


def _answering(wanted: list[str]) -> dict:
    names = [name for name in ("pipeline", "answers") if name in wanted]
    if not names:
        return {}
    made = _prepared("demo", "", "tokenize_splits")
    job = _job(made) | {"merged": made["fetch_model"], "prompts": PROMPTS, "max_new_tokens": 16}
    figures = {}
    for name in names:
        figures[name] = _run(name, name, job) | _read(name, "seconds.json")
        _say(name, figures[name])
    return {"answers": figures}


# --- jobs ----------------------------------------------------------------------------------------


def _prepared(experiment: str, overrides: str, rule: str) -> dict[str, str]:
    """Stage -> the folder that the workflow made, up to a rule."""
    overrides = f"sweep=none {overrides}"
    snakemake(PLACE, "--until", rule, "--config", f"experiment={experiment}", f"overrides={overrides}")
    with contextlib.chdir(PLACE):
        jobs = planner.build(experiment, None, overrides).jobs.values()
    return {job.stage: str(PLACE / job.path) for job in jobs}


def _job(made: dict[str, str]) -> dict:
    from datasets import load_from_disk

    from temper.data.batches import epoch_order

    rows = load_from_disk(made["tokenize_splits"])["train"]
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = epoch_order(lengths, BATCH, seed=42, epoch=0)
    tokens = [sum(lengths[row] for row in order[at : at + BATCH]) for at in range(0, len(order), BATCH)]
    lora = {**LORA, "target_modules": TARGETS}
    fixed = {"batch_size": BATCH, "learning_rate": RATE, "warmup_steps": WARMUP, "lora": lora}
    folders = {"model": made["fetch_model"], "splits": made["tokenize_splits"]}
    return {**folders, "order": order, "tokens": tokens, **fixed}


def _computed_tokens(splits: str, order: list[int]) -> float:
    """Tokens per step that are left when what a batch's rows have in common is computed once."""
    from datasets import load_from_disk

    from temper.data.batches import Batch
    from temper.model.flat_batch import flatten

    rows = load_from_disk(splits)["train"]
    batches = [Batch([rows[row] for row in order[at : at + BATCH]], 0) for at in range(0, len(order), BATCH)]
    return sum(flatten(batch, batch.learned(ahead=1)).input_ids.shape[1] for batch in batches) / len(batches)


def _temper(name: str, job: dict, cores: int | None = None) -> dict:
    """Temper's own command, as a job of the workflow runs it."""
    folder = _fresh(name)
    experiment = "dpo" if name == "temper_dpo" else "demo"
    options = [
        *(f"experiment={experiment}", "sweep=none", "train.num_train_epochs=1", f"train.learning_rate={RATE}"),
        f"num_threads={cores or os.cpu_count()}",
        *(f"train.per_device_train_batch_size={BATCH}", f"train.warmup_steps={WARMUP}", "train.logging_steps=5"),
        *("train.eval_strategy=no", *(f"adapter.{key}={value}" for key, value in LORA.items())),
        *(["model.load.dtype=float32"] if name == "temper_float32" else []),
    ]
    inputs = ["--splits", job["splits"], "--model", job["model"], "--output", str(folder / "adapter")]
    inputs += ["--references", job["references"]] if "references" in job else []
    used = _measured(["steps.train_adapter", *inputs, *options], folder, cores)
    lines = [json.loads(line) for line in (folder / "adapter/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    seconds = last["seconds"] - first["seconds"]
    rates = {"tokens_per_second": (last["tokens"] - first["tokens"]) / seconds}
    return used | rates | {"rows_per_second": (last["step"] - first["step"]) * BATCH / seconds}


def _peer(name: str, job: dict) -> dict:
    used = _run(name, name, job)
    times = _read(name, "steps.json")
    seconds = times[-1] - times[FIRST - 1]
    rows = BATCH * (len(times) - FIRST)
    return used | {"tokens_per_second": sum(job["tokens"][FIRST:]) / seconds, "rows_per_second": rows / seconds}


def _two_at_once(job: dict) -> dict:
    """As a sweep runs them; the sum of both."""
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda name: _temper(name, job, cores=1), ("temper_one", "temper_two")))
    sums = {
        name: sum(one[name] for one in both) for name in ("tokens_per_second", "rows_per_second", "peak_memory_mib")
    }
    rows = len(job["order"])
    return {"seconds": max(one["seconds"] for one in both) - rows / sums["rows_per_second"], **sums}


def _run(contender: str, name: str, job: dict) -> dict:
    folder = PLACE / name if contender == "score" else _fresh(name)
    (folder / "job.json").write_text(json.dumps(job))
    return _measured(["tests.benchmarks.peers", contender, str(folder)], folder)


def _measured(module: list[str], folder: Path, cores: int | None = None) -> dict:
    """Run a module; wall seconds and the peak of resident memory."""
    threads = {"OMP_NUM_THREADS": str(cores or os.cpu_count()), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=folder, env=environment() | threads, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(module[:2])} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return {"seconds": time.monotonic() - started, "peak_memory_mib": usage.ru_maxrss / 1024}


def _fresh(name: str) -> Path:
    shutil.rmtree(PLACE / name, ignore_errors=True)
    (PLACE / name).mkdir(parents=True)
    return PLACE / name


def _read(name: str, file: str):
    return json.loads((PLACE / name / file).read_text())


def _ceiling(sizes: dict, seconds: dict) -> dict:
    rate = sizes["tokens_per_step"] / seconds["tokens_per_step"]
    shared = sizes["tokens_per_step"] / seconds["computed_tokens_per_step"]
    return {**sizes, "tokens_per_second": rate, "tokens_per_second_when_shared": shared}


# --- tables --------------------------------------------------------------------------------------


def _machine() -> str:
    import torch

    capabilities = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True and "bf16" in name)
    kind = ", ".join([platform.machine(), *(capabilities or ["no bf16"])])
    if torch.cuda.is_available():
        kind += f"; {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({kind}), torch {torch.__version__}"


def _say(name: str, figures: dict) -> None:
    print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}", file=sys.stderr, flush=True)


def _tables(results: dict) -> list[str]:
    return [_training_table(results), _ceiling_text(results), _pairs_table(results), _answers_table(results)]


def _training_table(results: dict) -> str:
    figures = results["fine_tuning"]
    if not figures:
        return ""
    ours = figures.get("temper") or next(iter(figures.values()))
    lines = [
        f"{results['machine']}; {results['rows']} rows, batches of {BATCH}",
        "",
        "| | tokens/s | Temper is faster by | s per 1,000 rows with start-up | Temper is faster by | peak MiB | "
        "validation loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        ratio = ours["tokens_per_second"] / row["tokens_per_second"]
        whole, of_ours = (_for_1000_rows(one, results["rows"]) for one in (row, ours))
        loss = f"{row['validation_loss']:.4f}" if "validation_loss" in row else ""
        lines.append(
            f"| {NAMES[name]} | {row['tokens_per_second']:,.0f} | {ratio:.1f}x | {whole:.0f} | "
            f"{whole / of_ours:.1f}x | {row['peak_memory_mib']:,.0f} | {loss} |"
        )
    return "\n".join(lines)


def _for_1000_rows(row: dict, rows: int) -> float:
    """Seconds, start-up included, where another number of rows was measured."""
    return row["seconds"] + (1000 - rows) / row["rows_per_second"]


def _ceiling_text(results: dict) -> str:
    if "ceiling" not in results:
        return ""
    found = results["ceiling"]
    text = (
        f"The products of {found['tokens_per_step']:.0f} tokens a step alone: {found['tokens_per_second']:,.0f} "
        f"tokens/s; of the {found['computed_tokens_per_step']:.0f} left when common beginnings are computed once: "
        f"{found['tokens_per_second_when_shared']:,.0f}."
    )
    if "temper" in results["fine_tuning"]:
        rate = results["fine_tuning"]["temper"]["tokens_per_second"]
        shares = rate / found["tokens_per_second"], rate / found["tokens_per_second_when_shared"]
        text += f" Temper reaches {shares[0]:.0%} and {shares[1]:.0%} of them."
    return text


def _pairs_table(results: dict) -> str:
    figures = results.get("preferences", {})
    lines = ["| DPO | pairs/s | Temper is faster by | peak memory, MiB |", "|---|---|---|---|"]
    for name, row in figures.items():
        ratio = figures["temper_dpo"]["rows_per_second"] / row["rows_per_second"] if "temper_dpo" in figures else 1
        lines.append(f"| {NAMES[name]} | {row['rows_per_second']:.2f} | {ratio:.1f}x | {row['peak_memory_mib']:,.0f} |")
    return "\n".join(lines) if figures else ""


def _answers_table(results: dict) -> str:
    figures = results.get("answers", {})
    lines = ["| up to 16 tokens, greedy | ms per answer | Temper is faster by |", "|---|---|---|"]
    for name, row in figures.items():
        ratio = row["seconds_per_answer"] / figures["answers"]["seconds_per_answer"] if "answers" in figures else 1
        lines.append(f"| {NAMES[name]} | {1000 * row['seconds_per_answer']:.0f} | {ratio:.1f}x |")
    return "\n".join(lines) if figures else ""


def _into_page(page: Path, text: str) -> None:
    """Between the page's two marks."""
    before, _, rest = page.read_text().partition("<!-- make bench -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    page.write_text(f"{before}<!-- make bench -->\n{text}\n<!-- end -->\n{after}")


if __name__ == "__main__":
    main()
