"""Training: the command, exact continuation, shared trunks, accumulation, merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steps import merge_adapter, train_adapter
from temper.config.stages import load_stage_config
from temper.files import read_json_lines
from temper.model.loading import load_model, resolve_dtype
from tests.support.trainings import SMALL, assert_equal, forget_after, train


def test_the_command_writes_adapter_curves_and_figures(workspace, tiny_splits, tiny_model):
    train(tiny_splits, tiny_model, "out", "train.num_train_epochs=2")
    facts = json.loads(Path("out/training.json").read_text())
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert facts["global_step"] == 12
    assert facts["train_rows"] == 24
    assert facts["trainable_parameters"] < facts["total_parameters"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0], "it learns"
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    assert json.loads(Path("out/provenance.json").read_text())["packages"]["torch"]
    assert Path("out/config.yaml").is_file()


def test_a_complete_output_is_not_made_again(workspace, tiny_splits, tiny_model, caplog):
    train(tiny_splits, tiny_model, "out")
    before = Path("out/training.json").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="temper"):
        train(tiny_splits, tiny_model, "out")
    assert Path("out/training.json").stat().st_mtime_ns == before
    assert "is complete already" in caplog.text


def test_epochs_of_a_shared_trunk_equal_separate_runs_to_the_bit(workspace, tiny_splits, tiny_model):
    shared = [
        train(tiny_splits, tiny_model, f"shared{epoch}", f"train.num_train_epochs={epoch}", trunk="shared")
        for epoch in (1, 2, 3)
    ]
    alone = [
        train(tiny_splits, tiny_model, f"alone{epoch}", f"train.num_train_epochs={epoch}", trunk=f"alone{epoch}")
        for epoch in (1, 2, 3)
    ]
    for one, other in zip(shared, alone, strict=True):
        assert_equal(one, other)
    facts = json.loads(Path("shared3/training.json").read_text())
    assert facts["resumed_from_step"] == 12, "the third epoch started from the second's end"
    curves = [Path(f"{name}3/metrics.jsonl").read_text().splitlines() for name in ("shared", "alone")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in curve] for curve in curves]
    assert without_time[0] == without_time[1]


DECAYING = ["train=warmup_stable_decay", "train.lr_scheduler_kwargs.num_decay_steps=4"]


def segment(tiny_splits, tiny_model, output, epochs, **settings):
    """One training job of a plan with a decay at the end."""
    overrides = [*SMALL, *DECAYING, f"train.num_train_epochs={epochs}"]
    config = load_stage_config("train_adapter", None, overrides) | settings
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", str(output)]
    train_adapter.main([*arguments, "--config", json.dumps(config)])


def test_decay_branches_off_a_plateau_equal_separate_runs_to_the_bit(workspace, tiny_splits, tiny_model):
    segment(tiny_splits, tiny_model, "plateau1", 1, trunk="shared", part="plateau")
    segment(tiny_splits, tiny_model, "plateau2", 2, trunk="shared", part="plateau", plateau="plateau1")
    for epochs, steps in ((1, 4), (2, 4)):  # 6 steps an epoch: plateaus end at 2 and 8
        segment(tiny_splits, tiny_model, f"branch{epochs}", epochs, trunk=f"b{epochs}", plateau=f"plateau{epochs}")
        alone = train(tiny_splits, tiny_model, f"alone{epochs}", *DECAYING, f"train.num_train_epochs={epochs}")
        assert_equal(alone, load_file(f"branch{epochs}/adapter_model.safetensors"))
        assert json.loads(Path(f"branch{epochs}/provenance.json").read_text())["trained_steps"] == steps
        evaluated = [
            line["step"] for line in read_json_lines(Path(f"branch{epochs}/metrics.jsonl")) if "eval_loss" in line
        ]
        assert evaluated == [6, 12][:epochs], "the plateau's own end is no epoch's end"
    assert json.loads(Path("plateau2/provenance.json").read_text())["trained_steps"] == 6


@pytest.mark.parametrize("lost", ["state", "plateau"])
def test_a_branch_needs_neither_state_nor_plateau(workspace, tiny_splits, tiny_model, lost):
    segment(tiny_splits, tiny_model, "plateau1", 1, trunk="shared", part="plateau")
    shutil.rmtree({"state": "results/.state/shared", "plateau": "plateau1/checkpoint-2"}[lost])
    segment(tiny_splits, tiny_model, "branch", 1, trunk="b", plateau="plateau1")
    alone = train(tiny_splits, tiny_model, "alone", *DECAYING, "train.num_train_epochs=1")
    assert_equal(alone, load_file("branch/adapter_model.safetensors"))


def test_a_decay_longer_than_the_first_epoch(workspace, tiny_splits, tiny_model):
    overrides = [*SMALL, *DECAYING, "train.lr_scheduler_kwargs.num_decay_steps=8", "train.num_train_epochs=1"]
    config = load_stage_config("train_adapter", None, overrides) | {"trunk": "t", "part": "plateau"}
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", "plateau"]
    train_adapter.main([*arguments, "--config", json.dumps(config)])
    assert json.loads(Path("plateau/training.json").read_text())["global_step"] == 0


def test_continuing_in_the_middle_of_an_epoch_is_exact(workspace, tiny_splits, tiny_model):
    options = ["train.num_train_epochs=3", "train.save_strategy=steps", "train.save_steps=4", "train.logging_steps=1"]
    undisturbed = train(tiny_splits, tiny_model, "undisturbed", *options, trunk="undisturbed")
    train(tiny_splits, tiny_model, "first", *options, "train.save_total_limit=9", trunk="killed")
    forget_after(8, Path("results/.state/killed"))
    resumed = train(tiny_splits, tiny_model, "resumed", *options, trunk="killed")
    assert json.loads(Path("resumed/training.json").read_text())["resumed_from_step"] == 8
    assert_equal(undisturbed, resumed)
    steps = [
        json.loads(line)["step"] for line in Path("resumed/metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert steps == list(range(1, 19)), "each step is recorded once"


def test_accumulating_equals_one_large_batch(workspace, tiny_splits, tiny_model):
    options = ["adapter.lora_dropout=0", "train.optim=sgd", "train.learning_rate=0.1", "train.max_grad_norm=0"]
    large = train(tiny_splits, tiny_model, "large", *options, "train.per_device_train_batch_size=24")
    small = train(
        tiny_splits,
        tiny_model,
        "small",
        *options,
        "train.per_device_train_batch_size=6",
        "train.gradient_accumulation_steps=4",
    )
    for name, weight in large.items():
        torch.testing.assert_close(weight, small[name], rtol=1e-4, atol=1e-6)


def test_divergence_is_recorded_not_hidden(workspace, tiny_splits, tiny_model):
    options = ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.logging_steps=1", "train.num_train_epochs=2"]
    train(tiny_splits, tiny_model, "out", *options)
    facts = json.loads(Path("out/training.json").read_text())
    assert facts["diverged_at_step"] is not None
    assert facts["global_step"] < 12


def test_an_adapter_that_does_not_fit_names_the_models_layers(workspace, tiny_splits, tiny_model, capsys):
    with pytest.raises(SystemExit) as exit_code:
        train(tiny_splits, tiny_model, "out", "adapter.target_modules=[query]")
    assert exit_code.value.code == 2
    assert "its linear layers are called down_proj, gate_proj, k_proj" in capsys.readouterr().err
    assert not Path("out").exists()


def test_merged_model_loads_plainly_and_gives_the_adapters_logits(workspace, tiny_splits, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tiny_splits, tiny_model, "adapter")
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged"])
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert AutoTokenizer.from_pretrained("merged").chat_template
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_folder_that_does_not_exist_is_named(workspace, tiny_model, capsys):
    with pytest.raises(SystemExit) as exit_code:
        train_adapter.main(["--splits", "nowhere", "--model", str(tiny_model), "--output", "out"])
    assert exit_code.value.code == 2
    assert "--splits nowhere: no such file or folder; run the stage that makes it first" in capsys.readouterr().err


def test_training_without_a_validation_split(workspace, tiny_model):
    from tests.support.tiny import make_tiny_splits

    splits = make_tiny_splits(workspace / "splits", tiny_model, rows={"validation": 0})
    train(splits, tiny_model, "out")
    assert json.loads(Path("out/training.json").read_text())["eval_loss"] is None


@pytest.mark.parametrize("damage", ["cut off", "not sealed", "missing file"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(workspace, tiny_splits, tiny_model, damage, caplog):
    options = ["train.num_train_epochs=2", "train.save_strategy=steps", "train.save_steps=4"]
    undisturbed = train(tiny_splits, tiny_model, "undisturbed", *options, trunk="undisturbed")
    train(tiny_splits, tiny_model, "first", *options, trunk="damaged")
    last = Path("results/.state/damaged/checkpoint-12")
    if damage == "cut off":
        weights = last / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "not sealed":
        (last / "complete.json").unlink()
    else:
        (last / "optimizer.pt").unlink()
    with caplog.at_level("INFO", logger="temper"):
        again = train(tiny_splits, tiny_model, "again", *options, trunk="damaged")
    assert "checkpoint-12" in caplog.text
    assert "the one before it is used" in caplog.text
    assert json.loads(Path("again/training.json").read_text())["resumed_from_step"] == 8
    assert_equal(undisturbed, again)


def test_an_output_that_is_not_ours_is_never_touched(workspace, tiny_splits, tiny_model, capsys):
    (workspace / "thesis").mkdir()
    (workspace / "thesis" / "chapter.tex").write_text("x")
    (workspace / "file").write_text("x")
    for output in ("thesis", "file", ".", ""):
        with pytest.raises(SystemExit) as exit_code:
            train(tiny_splits, tiny_model, output)
        assert exit_code.value.code == 2
        assert "--output" in capsys.readouterr().err
    assert (workspace / "thesis" / "chapter.tex").read_text() == "x"
    assert (workspace / "file").read_text() == "x"


def test_swapped_folders_are_named(workspace, tiny_splits, tiny_model, capsys):
    with pytest.raises(SystemExit) as exit_code:
        train(tiny_model, tiny_splits, "out")
    assert exit_code.value.code == 2
    assert "not a folder of tokenize_splits or sample_answers: it has no dataset_dict.json" in capsys.readouterr().err


def in_bfloat16(tiny_model: Path) -> Path:
    """The tiny model as most bases are stored."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, "base")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained("base")
    return Path("base")


def test_full_parameter_training_passes_through_the_merge(workspace, tiny_splits, tiny_model):
    """To the bit, although the base is stored in bfloat16, which would round most of what was learned away."""
    from transformers import AutoModelForCausalLM

    stored = in_bfloat16(tiny_model)
    arguments = ["--splits", str(tiny_splits), "--model", str(stored), "--output", "full"]
    small = ["train.per_device_train_batch_size=4", "train.learning_rate=1e-5"]
    train_adapter.main([*arguments, "experiment=smoke", "adapter=full", *small])
    merge_adapter.main(["--model", str(stored), "--adapter", "full", "--output", "merged"])
    merge_adapter.main(["--model", str(stored), "--adapter", "full", "--output", "small", "merge.dtype=bfloat16"])
    trained = AutoModelForCausalLM.from_pretrained("full", dtype=torch.float32, attn_implementation="eager")
    fastest = {"dtype": "fastest", "attn_implementation": "eager"}
    merged, rounded = (load_model(Path(folder), fastest) for folder in ("merged", "small"))
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    assert merged.dtype == torch.float32
    assert rounded.dtype == resolve_dtype("fastest")
    ids = torch.arange(20)[None]
    assert torch.equal(merged(ids).logits, trained(ids).logits)
    assert not torch.equal(merged(ids).logits, base(ids).logits)


def test_merging_in_float32_is_not_rounded_on_the_way(workspace, tiny_splits, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stored = in_bfloat16(tiny_model)
    train(tiny_splits, stored, "out")
    merge_adapter.main(["--model", str(stored), "--adapter", "out", "--output", "merged", "merge.dtype=float32"])
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, "out").eval()
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    assert torch.allclose(merged(ids).logits, expected(ids).logits, atol=1e-5)


def test_a_complete_output_of_another_config_is_not_passed_off(workspace, tiny_splits, tiny_model, capsys):
    train(tiny_splits, tiny_model, "out")
    with pytest.raises(SystemExit) as exit_code:
        train(tiny_splits, tiny_model, "out", "train.learning_rate=7e-4")
    assert exit_code.value.code == 2
    assert "was made with another config (train.learning_rate: 0.001, now 0.0007)" in capsys.readouterr().err
