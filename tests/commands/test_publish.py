"""Publishing: what arrives at the hub, and whether it works from there. The hub is tests/support/hub.py."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from temper.hashing import file_sha256
from temper.keys import PACKAGE_ROOT
from temper.runs import find as runs
from temper.runs import receipt
from tests.support import hub, tiny
from tests.support.asking import command, complaint, lines_of
from tests.support.finished import ADAPTER, MERGED, RUN, SYSTEM

REPORT = f"results/reports/{RUN}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub without repositories, and the variables and the token with which this process uses it: (url, created)."""
    (tmp_path / "hub").mkdir()
    with hub.serve(tmp_path / "hub") as (url, server):
        hub.use(monkeypatch, url)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield tmp_path / "hub", server.created


def push(*flags: str) -> None:
    command("publish")(["--run", RUN, "--repository", "acme/tuned", *flags])


def test_the_merged_model_arrives_as_it_is_private_and_with_its_card(project, server, capsys):
    folder, created = server
    push("--merged", "--license", "mit")
    assert created == [{"name": "tuned", "organization": "acme", "visibility": "private"}]
    arrived = {path.name: path.read_bytes() for path in (folder / "tuned").iterdir()}
    merged = Path("results/merged") / MERGED
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert arrived[name] == (merged / name).read_bytes(), name
    assert not {"config.yaml", "provenance.json"} & set(arrived)
    card = arrived["README.md"].decode()
    assert "license: mit" in card
    assert re.search(r"pushed \d files to http://127\S+/acme/tuned \(private\)", capsys.readouterr().out)
    message = complaint(capsys, command("publish"), "--run", RUN, "--repository", "acme/tuned", "--merged")
    assert message.startswith("--repository acme/tuned: is there already; --exist-ok pushes a new commit")
    push("--merged", "--exist-ok")
    assert "license: mit" not in (folder / "tuned/README.md").read_text()
    assert len(created) == 1


def test_public_is_public(project, server):
    _, created = server
    push("--merged", "--public")
    assert created[0]["visibility"] == "public"


def test_the_adapter_names_a_base_that_others_can_load(project, server, capsys):
    folder, _ = server
    message = complaint(capsys, command("publish"), "--run", RUN, "--repository", "acme/tuned")
    assert "which is not on the hub, so nobody could load the adapter: publish with --merged, or say where" in message
    assert not any(folder.iterdir()), "refused before anything was sent"
    push("--base-model", "acme/base")
    adapter = Path("results/adapters") / ADAPTER
    assert not (adapter / "README.md").exists(), "PEFT's empty card"
    weights = "adapter_model.safetensors"
    assert (folder / "tuned" / weights).read_bytes() == (adapter / weights).read_bytes()
    config = json.loads((folder / "tuned/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("acme/base", 4)
    card = (folder / "tuned/README.md").read_text()
    assert "The author states that acme/base is the same model" in card


def test_the_card_says_what_the_run_measured(project, tmp_path, capsys):
    from huggingface_hub import ModelCard

    push("--merged", "--dry-run", str(tmp_path / "look"))
    card = ModelCard.load(tmp_path / "look/README.md")
    facts = json.loads(Path(REPORT, "metrics.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == pytest.approx(facts["values"]["accuracy"], abs=1e-6)
    assert results["accuracy"].metric_args == {"interval_95": facts["interval"]}
    low, high = facts["base_intervals"]["accuracy"]
    row = f"| accuracy | {facts['values']['accuracy']:.3f} | {facts['interval'][0]:.3f} to {facts['interval'][1]:.3f} |"
    assert f"{row} {facts['base']['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in card.text
    for text in ("| adapter.r | 4 |", "| train.learning_rate | 0.001 |", "Key `00000000a6`", "transformers ", SYSTEM):
        assert text in card.text
    assert str(project) not in card.content, "no path of this machine"
    assert "reviews.jsonl" not in card.content
    assert all(row["prompt"] not in card.content for row in lines_of(f"{REPORT}/predictions.jsonl")), (
        "no row of the data"
    )
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "nothing was pushed" in out


def test_the_card_says_how_it_is_served_what_it_is_for_and_under_which_licences(project, tmp_path, monkeypatch):
    intended = "For *reviews* of films.\n\nNot for people.\n"
    (tmp_path / "use.md").write_text(intended)
    (tmp_path / "conf/model").mkdir(parents=True)
    source = json.dumps(runs.read_config(Path("results/models/tiny-00000000a0"))["model"]["source"])
    (tmp_path / "conf/model/tiny.yaml").write_text(f"name: tiny\nlicense: apache-2.0\nsource: {source}\n")
    monkeypatch.setenv("TEMPER_CONF", str(tmp_path / "conf"))
    push("--base-model", "acme/base", "--intended-use", str(tmp_path / "use.md"), "--dry-run", str(tmp_path / "look"))
    card = (tmp_path / "look/README.md").read_text()
    assert f"## Intended use\n\n{intended}\n## Licences\n" in card
    assert "| this model | not stated |\n| base model | apache-2.0 |\n| data | not stated |\n" in card
    assert (
        "```\nvllm serve acme/base --tokenizer acme/tuned \\\n"
        "    --enable-lora --max-lora-rank 8 --lora-modules tuned=acme/tuned\n```\n"
    ) in card
    push("--merged", "--license", "mit", "--dry-run", str(tmp_path / "merged"))
    card = (tmp_path / "merged/README.md").read_text()
    assert "```\nvllm serve acme/tuned\n```\n" in card and "--lora-modules" not in card
    assert "| this model | mit |" in card
    assert "The author has not said what it is for" in card


def test_the_receipt_goes_along_with_nothing_private(project, tmp_path):
    push("--merged", "--dry-run", str(tmp_path / "look"))
    file = tmp_path / "look/receipt.json"
    found = receipt.read_receipt(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (tmp_path / "look/README.md").read_text()
    assert str(project) not in file.read_text() and "reviews.jsonl" not in file.read_text()
    folders = {part.folder: part.files for part in found.parts}
    merged = f"merged/{MERGED}"
    assert folders[merged]["model.safetensors"] == file_sha256(Path("results", merged, "model.safetensors"))
    assert (found.run, found.metric) == (RUN, "accuracy")


def test_a_text_that_is_not_there_is_refused_before_anything_is_made(project, tmp_path, capsys):
    (tmp_path / "empty.md").write_text(" \n")
    words = ["--run", RUN, "--repository", "acme/tuned", "--merged", "--dry-run", tmp_path / "look", "--intended-use"]
    for name, said in (("none.md", "cannot be read"), ("empty.md", "there is no text in it")):
        message = complaint(capsys, command("publish"), *words, tmp_path / name)
        assert message.startswith(f"--intended-use {tmp_path / name}: {said}")
    assert not (tmp_path / "look").exists()


@pytest.mark.parametrize("flags", [("--merged",), ("--base-model", "acme/base")])
def test_the_code_of_the_card_answers_as_the_evaluation_did(project, tmp_path, monkeypatch, capsys, flags):
    """With folders of the repositories' names: transformers takes those before it asks the hub."""
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/base").symlink_to(project / "results/models/tiny-00000000a0")
    push(*flags, "--dry-run", str(tmp_path / "acme/tuned"))
    evaluated = lines_of(f"{REPORT}/predictions.jsonl")
    monkeypatch.chdir(tmp_path)
    for row in evaluated[:3]:
        capsys.readouterr()
        exec(code_of((tmp_path / "acme/tuned/README.md").read_text()).replace("Your prompt here.", row["prompt"]), {})
        assert capsys.readouterr().out.strip() == row["prediction"]


def code_of(markdown: str) -> str:
    """The one block of Python in a page."""
    [code] = re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)
    return code


def test_an_untouched_hub_model_goes_round(tmp_path):
    """From the hub by steps.api, trained, pushed by the command, loaded from the hub by the card's code."""
    tiny.make_tiny_model(tmp_path / "hub/base")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in tiny.tiny_rows(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = (
        "from temper import __main__, api; "
        "tuned = api.train(api.load_rows('rows.jsonl'), 'acme/base', output='out', r=2, max_steps=2, warmup_steps=0);"
        "__main__.main(['publish', '--run', str(tuned.folder), '--repository', 'acme/tuned'])"
    )
    with hub.serve(tmp_path / "hub") as (url, server):
        variables = {**os.environ, **hub.environment(url, tmp_path / "cache"), "HF_TOKEN": hub.TOKEN}
        variables["PYTHONPATH"] = str(PACKAGE_ROOT)

        def python(code: str) -> str:
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "pushed" in python(train)
        assert server.created[0]["visibility"] == "private"
        config = json.loads((tmp_path / "hub/tuned/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", hub.COMMIT)
        card = (tmp_path / "hub/tuned/README.md").read_text()
        assert "base_model: acme/base" in card
        assert "This model was not evaluated." in card
        assert python(code_of(card)).strip(), "an answer"


# --- what can go wrong ---------------------------------------------------------------------------


def test_no_token_and_no_hub(project, monkeypatch, capsys, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.use(monkeypatch, "http://127.0.0.1:9")
    arguments = ["--run", RUN, "--repository", "acme/tuned", "--merged"]
    assert complaint(capsys, command("publish"), *arguments) == (
        "no token for the hub: make one at https://huggingface.co/settings/tokens (write access), "
        "then `hf auth login`, or set HF_TOKEN; --dry-run FOLDER needs none"
    )
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    message = complaint(capsys, command("publish"), *arguments)
    assert message.startswith("--repository acme/tuned: the hub cannot be reached (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert complaint(capsys, command("publish"), *arguments).startswith(
        "HF_HUB_OFFLINE is set, so nothing can be pushed"
    )


def test_what_the_hub_refuses(project, server, monkeypatch, capsys):
    arguments = ["--run", RUN, "--merged", "--repository"]
    message = complaint(capsys, command("publish"), *arguments, "other/tuned")
    assert message.startswith("--repository other/tuned: the token may not write there: use your own user name")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    message = complaint(capsys, command("publish"), *arguments, "acme/tuned")
    assert message.startswith("--repository acme/tuned: the hub does not accept the token: make one at")
    named = complaint(capsys, command("publish"), *arguments, "acme/tuned", "--base-model", "x](javascript:alert(1))")
    assert named.startswith("--base-model x](javascript:alert(1)): Repo id must")
    assert complaint(capsys, command("publish"), *arguments, "tuned") == "--repository tuned: write user/name"
    assert complaint(capsys, command("publish"), *arguments, "a/b/c").startswith(
        "--repository a/b/c: Repo id must be in the"
    )


def test_a_dry_run_replaces_nothing_and_needs_no_merged_model_that_is_gone(finished_run, workspace, capsys):
    import shutil

    shutil.copytree(finished_run / "results", workspace / "results")
    (workspace / "mine").mkdir()
    (workspace / "mine/notes.txt").touch()
    arguments = ["--run", RUN, "--repository", "acme/tuned", "--merged", "--dry-run"]
    assert (
        complaint(capsys, command("publish"), *arguments, "mine")
        == "--dry-run mine: is there already; name a new folder"
    )
    shutil.rmtree(workspace / "results/merged")
    command("publish")([*arguments, "new"])
    assert f"into results/merged/{MERGED}\n" in capsys.readouterr().err, "it is merged where it is needed"
    made = Path("results/merged", MERGED)
    assert Path("new/model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    shutil.rmtree(made)
    shutil.rmtree(workspace / "results/adapters")
    assert complaint(capsys, command("publish"), *arguments, "newer").startswith(f"results/reports/{RUN}: ")
