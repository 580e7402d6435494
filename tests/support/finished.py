"""A small finished run: every stage by hand on the tiny model, in folders named as the workflow names them."""

import contextlib
import json
import shutil
from pathlib import Path

from steps import (
    compare_runs,
    evaluate_model,
    fetch_model,
    format_prompts,
    merge_adapter,
    tokenize_splits,
    train_adapter,
)
from temper.config.stages import load_stage_config
from tests.support import tiny

SYSTEM = "Positive or negative?"
CONFIG = [
    "experiment=smoke",
    f"prompt.system='{SYSTEM}'",
    "data.layout=question_answer",
    "data.prompt=null",
    "data.completion=null",
    "~data.csv",
    "data.format=null",
    "adapter.r=4",
    "model.load.dtype=float32",
    "merge.dtype=float32",
    "eval.published=[]",
]
RUN = "reviews-tiny-sft-lora-r4-lr0.001-e1-00000000a6"
ADAPTER, MERGED, BASE = RUN.replace("a6", "a4"), RUN.replace("a6", "a5"), "base-reviews-tiny-00000000a3"

PARTS = {
    "fetch_model": "results/models/tiny-00000000a0",
    "format_prompts": "results/prompts/reviews-00000000a1",
    "tokenize_splits": "results/splits/reviews-tiny-00000000a2",
    "base_report": f"results/reports/{BASE}",
    "train_adapter": f"results/adapters/{ADAPTER}",
    "merge_adapter": f"results/merged/{MERGED}",
    "evaluate_model": f"results/reports/{RUN}",
}


def put(project: Path, artefacts: dict[str, str]) -> None:
    """Copy the run of a finished project to the folders of a planned one, as if the workflow had made it there."""
    places = {PARTS[stage]: folder for stage, folder in artefacts.items() if stage in PARTS}
    for made, folder in places.items():
        if Path(folder).exists():
            continue
        shutil.copytree(project / made, folder)
        facts = json.loads((project / made / "provenance.json").read_text())
        facts["inputs"] = {name: places.get(path, path) for name, path in facts["inputs"].items()}
        Path(folder, "provenance.json").write_text(json.dumps(facts))


def make(project: Path, tiny_model: Path, *overrides: str) -> Path:
    """Fill `project`/results with a run and a sweep called ``tiny`` that has nothing but it."""
    rows = [{"question": prompt, "answer": answer} for prompt, answer in tiny.tiny_rows(90)]
    (project / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = [*CONFIG, *overrides]
    with contextlib.chdir(project):
        source = json.dumps({"model": {"source": {"kind": "files", "path": str(tiny_model)}}})
        model, prompts = "results/models/tiny-00000000a0", "results/prompts/reviews-00000000a1"
        splits, adapter, merged = "results/splits/reviews-tiny-00000000a2", f"results/adapters/{ADAPTER}", MERGED
        base, report, merged = f"results/reports/{BASE}", f"results/reports/{RUN}", f"results/merged/{merged}"
        fetch_model.main(["--output", model, "--config", source])
        format_prompts.main(["--raw", "reviews.jsonl", "--output", prompts, *config])
        tokenize_splits.main(["--prompts", prompts, "--model", model, "--output", splits, *config])
        train_adapter.main(["--splits", splits, "--model", model, "--output", adapter, *config])
        merge_adapter.main(["--model", model, "--adapter", adapter, "--output", merged, *config])
        evaluate_model.main(["--model", model, "--splits", splits, "--output", base, *config])
        inputs = ["--model", merged, "--splits", splits, "--adapter", adapter, "--base-report", base]
        evaluate_model.main([*inputs, "--output", report, *config])
        runs = [{"name": RUN, "point": {"adapter.r": 4}, "report": report}]
        evaluated = load_stage_config("evaluate_model", None, config)["eval"]
        sweep = {"eval": evaluated, "sweep": {"name": "tiny", "axes": {"adapter.r": ["4"]}}, "runs": runs}
        compare_runs.compare(sweep, Path("results/sweeps/tiny"))
    return project
