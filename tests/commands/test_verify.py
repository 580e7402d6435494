"""temper verify: stages made again are compared with what is there, and a lie is found."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from steps import compare_runs
from temper.commands import verify
from temper.folders import sizes
from tests.support.asking import command
from tests.support.finished import ADAPTER, MERGED, RUN

SPLITS = "results/splits/reviews-tiny-00000000a2"


@pytest.fixture
def copy(project, tmp_path, monkeypatch) -> Path:
    """The finished project, to be spoiled."""
    shutil.copytree(project, tmp_path / "copy", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def seal(folder: Path) -> None:
    """Record the sizes of a folder's files, as whoever tells a lie would."""
    file = folder / "provenance.json"
    facts = json.loads(file.read_text())
    now = {name: size for name, size in sizes(folder).items() if name != file.name}
    file.write_text(json.dumps({**facts, "files": now}))


@pytest.mark.slow
def test_every_stage_of_a_finished_sweep_comes_out_the_same(project, capsys):
    command("verify")(["--sweep", "tiny"])
    out = capsys.readouterr().out
    assert out.count("the same, bit for bit") == 6 and "6 of 6 folder(s) came out the same" in out


def test_a_lie_about_a_figure_and_a_weight_is_found(copy, capsys):
    report, adapter = Path("results/reports", RUN), Path("results/adapters", ADAPTER)
    figures = json.loads((report / "metrics.json").read_text())
    figures["values"]["accuracy"] += 0.25
    (report / "metrics.json").write_text(json.dumps(figures))
    seal(report)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    seal(adapter)
    with pytest.raises(SystemExit) as ended:
        command("verify")(["--run", RUN, "--stages", "tokenize_splits,train_adapter,evaluate_model"])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{SPLITS}: the same, bit for bit" in lines
    assert any(
        line.startswith(f"{adapter}: DIFFERS: adapter_model.safetensors: tensor {name} differs") for line in lines
    )
    assert any(line.startswith(f"{report}: DIFFERS: metrics.json: values.accuracy is") for line in lines)


def test_what_changed_since_is_said_and_allows_last_digits(copy, capsys):
    folder = Path(SPLITS)
    facts = json.loads((folder / "provenance.json").read_text())
    facts["packages"]["tokenizers"] = "0.0.1"
    facts["processor"] = "abacus"
    (folder / "provenance.json").write_text(json.dumps(facts))
    command("verify")(["--run", RUN, "--stages", "tokenize_splits"])
    out = capsys.readouterr().out
    assert "was made with tokenizers 0.0.1, here is" in out and "was made on abacus, this is" in out
    assert "1 of 1 folder(s) came out the same" in out


def test_a_receipt_names_every_file_that_is_not_as_it_was(copy, capsys):
    receipt = Path("results/sweeps/tiny/receipt.json")
    compare_runs.main(["--config", "results/sweeps/tiny/config.yaml", "--output", "results/sweeps/tiny"])
    told = json.loads(receipt.read_text())
    stages = [part["stage"] for part in told["parts"]]
    assert stages[-2:] == ["evaluate_model", "evaluate_model"] and "train_adapter" in stages and told["run"] == RUN
    command("verify")(["--receipt", str(receipt)])
    assert f"{RUN}: all " in capsys.readouterr().out

    Path("results/adapters", ADAPTER, "training.json").write_text("{}")
    Path("results/merged", MERGED, "config.json").unlink()
    Path(SPLITS, "more.txt").touch()
    with pytest.raises(SystemExit) as ended:
        command("verify")(["--receipt", str(receipt)])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{SPLITS}: more.txt is not in the receipt",
        f"results/adapters/{ADAPTER}: training.json has another sha256",
        f"results/merged/{MERGED}: config.json is missing",
        f"{RUN}: 3 fault(s)",
    ]


def test_values_are_compared_but_for_times_and_memory():
    before = {"train_seconds": 1.0, "peak_memory_bytes": 3, "loss": 0.5, "rows": [{"a": 1}, {"a": None}], "x": "b"}
    now = {"train_seconds": 2.0, "peak_memory_bytes": 4, "loss": 0.5005, "rows": [{"a": 2}, {"a": None}]}
    found = {one.what: one.size for one in verify._of_values("f.json", before, now, "")}
    assert found == {
        "loss is 0.500, was 0.500": pytest.approx(0.001),
        "rows 1.a is 2.000, was 1.000": pytest.approx(1.0),
        'x is null, was "b"': float("inf"),
    }
    assert not list(verify._of_values("f.json", before, before, ""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sweep or --run is missing"),
        (["--sweep", "none"], "leaderboard.json: no such file; run the sweep first"),
        (
            ["--run", RUN, "--stages", "train_adaptr"],
            "--stages train_adaptr: cannot be verified; did you mean 'train_ad",
        ),
        (["--receipt", "none.json"], "none.json: no such file; compare the sweep again"),
        (["--receipt", "none.json", "--run", RUN], "--receipt: goes alone"),
        (["--run", RUN, "--sample", "0"], "--sample 0: draw at least 1"),
    ],
)
def test_what_cannot_be_verified_is_one_line(project, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command("verify")(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
