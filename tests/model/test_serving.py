"""An adapter or merged model is asked as it was trained, or it is said; a merged model is what was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from steps import merge_adapter
from temper.model import agreement, loading, serving
from tests.support import tiny
from tests.support.asking import command, complaint
from tests.support.finished import ADAPTER, CONFIG, MERGED, RUN

MODEL, SPLITS = "results/models/tiny-00000000a0", "results/splits/reviews-tiny-00000000a2"
ADAPTED, MERGED_MODEL = f"results/adapters/{ADAPTER}", f"results/merged/{MERGED}"
TEMPLATE = "chat_template.jinja"


@pytest.fixture
def own(finished_run, workspace) -> Path:
    """A copy of the finished run, to spoil."""
    shutil.copytree(finished_run / "results", "results")
    (workspace / "prompts.txt").write_text("The plot works.\n")
    return workspace


def sums(folder: str) -> dict:
    return json.loads(Path(folder, serving.FILE).read_text())


def edit_template(folder: str) -> None:
    path = Path(folder, TEMPLATE)
    path.write_text(path.read_text() + "{# edited #}")


def edit_weights(folder: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def predict(run: str = RUN) -> list[str]:
    return ["--run", run, "--input", "prompts.txt", "--output", "-", "--max-new-tokens", "4"]


def test_one_set_of_sums_from_the_splits_to_the_merged_model(project):
    adapter, merged, splits = sums(ADAPTED), sums(MERGED_MODEL), sums(SPLITS)
    assert adapter == merged == {**splits, serving.BASE: adapter[serving.BASE]} == serving.of_base(Path(MODEL))


def test_saved_again_in_shards_or_as_a_pickle_the_weights_are_the_same(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM

    expected = serving.of_base(tiny_model)
    tokenizer = loading.load_tokenizer(tiny_model)
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    network.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(tmp_path / "shards")
    assert serving.of_base(tmp_path / "shards")[serving.BASE] == expected[serving.BASE]
    other = tiny.make_tiny_model(tmp_path / "other", seed=1)
    found = serving.of_base(other)
    assert serving.differences(expected, found) == [serving.BASE]


def test_a_template_edited_since_is_said_and_not_shipped(own, capsys, caplog):
    edit_template(MERGED_MODEL)
    command("predict")(predict())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        f"warning: {MERGED_MODEL}: its chat template is not the one of training (edited since?), "
        "so its answers are not those that were evaluated"
    ]
    for name, flags in (
        ("export", ["--output", "a.gguf"]),
        ("publish", ["--repository", "a/b", "--merged", "--dry-run", "look"]),
    ):
        message = complaint(capsys, command(name), "--run", RUN, *flags)
        assert message.startswith(f"{MERGED_MODEL}: its chat template is not the one of training (edited since?); put")


def test_an_adapter_answers_on_its_own_base_only(own, capsys, caplog):
    command("predict")(predict(ADAPTED))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    edit_weights(MODEL)
    means = f"{MODEL}: its weights are not those with which {ADAPTED} was trained; use the model it was trained on"
    merge = ["--model", MODEL, "--adapter", ADAPTED, "--output", "new", *CONFIG]
    publish = ["--run", ADAPTED, "--repository", "a/b", "--base-model", "a/c", "--dry-run", "look"]
    for main, arguments in (
        (command("predict"), predict(ADAPTED)),
        (command("publish"), publish),
        (merge_adapter.main, merge),
    ):
        assert complaint(capsys, main, *arguments).startswith(means)


def test_another_tokenizer_is_refused(own, capsys):
    path = Path(MERGED_MODEL, "tokenizer.json")
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(whole))
    message = complaint(capsys, command("predict"), *predict())
    assert message.startswith(f"{MERGED_MODEL}: its tokenizer is not the one of training (edited since?); put")


def test_training_starts_only_from_a_model_that_reads_as_its_splits_do(own, capsys):
    from steps import train_adapter

    edit_template(MODEL)
    Path(MODEL, "provenance.json").unlink()  # or its size would tell
    message = complaint(capsys, train_adapter.main, "--splits", SPLITS, "--model", MODEL, "--output", "new", *CONFIG)
    assert message.startswith(f"{MODEL}: its chat template is not the one with which {SPLITS} was tokenized")


def test_a_merge_is_checked_on_validation_rows_and_refused_beyond_its_tolerance(own, capsys, monkeypatch):
    arguments = ["--model", MODEL, "--adapter", ADAPTED, "--splits", SPLITS, *CONFIG]
    merge_adapter.main([*arguments, "--output", "fine"])
    facts = json.loads(Path("fine/provenance.json").read_text())
    assert facts["answers"] == facts["answers_alike"] == agreement.ROWS
    assert 0 <= facts["logit_difference"] < facts["tolerance"] == agreement.TOLERANCE["float32"]
    monkeypatch.setitem(agreement.TOLERANCE, "float32", 1e-12)
    message = complaint(capsys, merge_adapter.main, *arguments, "--output", "refused")
    assert message.startswith(f"{ADAPTED}: the merged model is not what was trained: logits differ by")
    assert not Path("refused").exists()


def test_answers_that_turn_are_counted_up_to_where_they_do():
    first = torch.tensor([[0.0, 1.0, 3.0], [4.0, 1.0, 0.0]])
    same, turned = first + 0.01, torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.5, 0.0]])
    found = agreement.compare([first, first], [same, turned])
    spread = torch.cat([first, first]).std().item()
    assert (found.answers, found.answers_alike) == (2, 1)
    assert found.turn == pytest.approx(3.0 / spread)
    assert found.logit_difference == pytest.approx((0.06 + 3.5) / 12 / spread)
    assert found.within(10.0) == (found.turn <= agreement.TIE * found.logit_difference)
    assert not agreement.compare([first], [torch.full_like(first, torch.nan)]).within(0.1)


def test_what_is_compared_is_what_generation_gives(tiny_model, tiny_splits):
    """Along its own answers a network agrees with itself; along another's, the first turn is where generation turns."""
    from datasets import load_from_disk

    load = {"dtype": "float32", "attn_implementation": "eager"}
    network = loading.load_model(tiny_model, load).eval()
    prompts = agreement.prompts_of(load_from_disk(str(tiny_splits))["validation"])
    stop = loading.stop_token_ids(tiny_model, loading.load_tokenizer(tiny_model))
    spoken = agreement.speak(network, prompts, stop)
    again = agreement.compare(spoken.logits, agreement.logits_along(network, spoken))
    assert again.answers_alike == again.answers == len(prompts)
    assert again.within(agreement.TOLERANCE["float32"])
    with torch.no_grad():
        network.lm_head.weight += 0.05 * torch.randn(
            network.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    moved = agreement.compare(spoken.logits, agreement.logits_along(network, spoken))
    others = agreement.speak(network, prompts, stop)
    assert moved.answers_alike == sum(one == two for one, two in zip(spoken.answers, others.answers, strict=True))
