"""The Python API: the lines of the docs, the same bits as the stages, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from steps import reference_logprobs, tokenize_splits, train_adapter
from temper import api
from temper.config.stages import load_stage_config
from temper.errors import UserError
from temper.keys import PACKAGE_ROOT
from tests.support import tiny
from tests.support.trainings import assert_equal

SYSTEM = "Positive or negative?"
ROWS = [{"prompt": prompt, "completion": answer} for prompt, answer in tiny.tiny_rows(24)]
OPTIONS = {"r": 4, "num_train_epochs": 1, "per_device_train_batch_size": 8, "warmup_steps": 0, "max_length": 128}


def test_the_lines_of_the_docs(workspace):
    """As they stand there, in a folder that has what they name."""
    page = (PACKAGE_ROOT / "docs/use.md").read_text(encoding="utf-8")
    [code] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from temper import" in code]
    model, rows = re.search(r'model="(.+?)"', code)[1], re.search(r'load_rows\("(.+?)"\)', code)[1]
    config = tiny.make_tiny_model(workspace / model) / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 1024}  # room for an answer of 256 tokens
    config.write_text(json.dumps(longer))
    Path(rows).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(PACKAGE_ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an answer"
    assert sorted(path.name for path in workspace.iterdir()) == sorted({Path(rows).parts[0], Path(model).parts[0]})


def test_the_same_bits_as_the_stages(workspace, tiny_model):
    tuned = api.train(ROWS, tiny_model, validation=ROWS[:4], system=SYSTEM, output="out", seed=7, **OPTIONS)
    assert [path.name for path in workspace.iterdir()] == ["out"]
    messages = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        for row in ROWS
    ]
    Path("prompts").mkdir()
    for split, rows in {"train": messages, "validation": messages[:4], "test": []}.items():
        lines = [json.dumps({"id": number, "messages": row}) + "\n" for number, row in enumerate(rows, start=1)]
        Path(f"prompts/{split}.jsonl").write_text("".join(lines))
    overrides = [f"prompt.system='{SYSTEM}'", "seed=7"]
    overrides += [
        f"{section}.{name}={OPTIONS[name]}" for section, name in (("adapter", "r"), ("tokenize", "max_length"))
    ]
    overrides += [f"train.{name}={OPTIONS[name]}" for name in OPTIONS if name not in ("r", "max_length")]
    model = str(tiny_model)
    tokenize_splits.main(["--prompts", "prompts", "--model", model, "--output", "splits", *overrides])
    train_adapter.main(["--splits", "splits", "--model", model, "--output", "adapter", *overrides])
    weights = "adapter_model.safetensors"
    assert_equal(load_file(tuned.folder / weights), load_file(Path("adapter") / weights))
    assert load_stage_config("train_adapter", str(tuned.folder / "config.yaml"), []) == load_stage_config(
        "train_adapter", "adapter/config.yaml", []
    )


def test_the_same_call_trains_once_and_another_trains_anew(workspace, tiny_model):
    first = api.train(ROWS, tiny_model, output="out", **OPTIONS)
    made = (first.folder / "training.json").stat().st_mtime_ns
    again = api.train(ROWS, tiny_model, output="out", **OPTIONS)
    assert again.folder == first.folder
    assert (again.folder / "training.json").stat().st_mtime_ns == made
    other = api.train(ROWS[1:], tiny_model, output="out", **OPTIONS)
    assert other.folder != first.folder
    prompts = ["The plot falls flat.", [{"role": "user", "content": "A joy."}]]
    answers = first.answers(prompts, max_new_tokens=6)
    assert answers == [first.answer(prompt, max_new_tokens=6) for prompt in prompts]
    assert api.load(first.folder).answers(prompts, max_new_tokens=6) == answers


def test_preferences(workspace, tiny_model):
    """Against the stages by hand, from the same prompts."""
    other = {"positive": "negative", "negative": "positive"}
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": other[r["completion"]]} for r in ROWS]
    tuned = api.train(pairs, tiny_model, output="out", method="dpo", beta=0.3, **OPTIONS)
    [prompts] = Path("out/prompts").iterdir()
    model = str(tiny_model)
    overrides = ["experiment=dpo", "prompt.system=null", "method.sft=null", "method.beta=0.3"]
    tokenize = ["--prompts", str(prompts), "--model", model, "--output", "splits", "tokenize.max_length=128"]
    tokenize_splits.main([*tokenize, *overrides])
    reference_logprobs.main(["--splits", "splits", "--model", model, "--output", "references", *overrides])
    config = str(tuned.folder / "config.yaml")
    inputs = ["--splits", "splits", "--model", model, "--references", "references"]
    train_adapter.main([*inputs, "--output", "adapter", "--config", config])
    weights = "adapter_model.safetensors"
    assert_equal(load_file(tuned.folder / weights), load_file(Path("adapter") / weights))
    assert tuned.run.prompt["system"] is None
    with pytest.raises(UserError, match=r'rows\[0\]: has a rejected answer, which goes with method="dpo"'):
        api.train(pairs, tiny_model, output="out")
    labelled = [{**row, "label": number % 3 > 0} for number, row in enumerate(ROWS)]
    for method, rows in (("orpo", pairs), ("kto", pairs), ("kto", labelled)):
        tuned = api.train(rows, tiny_model, output="out", method=method, **OPTIONS)
        assert isinstance(tuned.answer("A joy.", max_new_tokens=2), str)
    with pytest.raises(UserError, match=r"rows\[12\]: pairs and single answers with a label do not mix"):
        api.train([*labelled[:12], pairs[0]], tiny_model, output="out", method="kto")
    with pytest.raises(UserError, match=r'rows\[0\]: has no rejected answer, which goes with method="sft"'):
        api.train(ROWS, tiny_model, output="out", method="dpo")


def test_a_temporary_folder_goes_with_the_model(workspace, tiny_model):
    import gc

    tuned = api.train(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        tiny_model,
        adapter="full",
        max_steps=1,
        warmup_steps=0,
    )
    assert isinstance(tuned.answer("a", max_new_tokens=2), str)
    folder = tuned.folder
    assert folder.is_dir()
    del tuned
    gc.collect()
    assert not folder.exists()
    assert not list(workspace.iterdir())


def test_documents_are_learned(workspace, tiny_model):
    tuned = api.train([{"text": row["prompt"]} for row in ROWS], tiny_model, output="out", **OPTIONS)
    audit = json.loads(next(Path("out").glob("**/audit.json")).read_text())["splits"]["train"]
    assert (audit["rows"], audit["learned_tokens"]) == (len(ROWS), audit["tokens"] - len(ROWS))
    assert isinstance(tuned.answer("A film", max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1e-3}, "train: unknown option 'lr'; did you mean 'learning_rate'?"),
        ({"rank": 3}, "train: unknown option 'rank'"),
        ({"learning_rate": -1.0}, "config: 'train.learning_rate' must be above 0"),
        ({"output_dir": "x"}, "config: 'train.output_dir' cannot be set"),
        ({"rows": [{"txt": "a"}]}, r"rows\[0\]: has the columns txt; one of messages, prompt"),
        (
            {"rows": [{"text": "a", "label": 1}]},
            r"rows\[0\]: has the column text, .* and besides label, which would not",
        ),
        ({"rows": [{"text": "a"}, ROWS[0]]}, r"rows\[1\]: documents and rows with answers do not mix"),
        ({"rows": [{"text": "a"}], "system": "Be short."}, "layout 'text' is documents, which have no messages"),
        ({"rows": [ROWS[0], {"prompt": "a"}]}, r"rows\[1\]: no column 'completion'"),
        ({"rows": []}, "train: there are no rows to train on"),
        ({"adapter": "lara"}, "conf/adapter/lara.yaml does not exist; did you mean 'lora'"),
    ],
)
def test_what_train_refuses(workspace, tiny_model, arguments, message):
    with pytest.raises(UserError, match=message):
        api.train(**{"rows": ROWS, "model": tiny_model, "output": "out", **arguments})
    assert not list(Path("out").glob("adapters/*"))


def test_what_answer_and_load_rows_refuse(finished_run, workspace):
    tuned = api.load(finished_run / "results/merged" / "reviews-tiny-sft-lora-r4-lr0.001-e1-00000000a5")
    for options, message in (
        ({"max_tokens": 3}, "answer: unknown option 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"top_p": 0.5}, "no effect without do_sample"),
    ):
        with pytest.raises(UserError, match=message):
            tuned.answer("a", **options)
    with pytest.raises(UserError, match="load_rows: none.csv: no such file"):
        api.load_rows("none.csv")
