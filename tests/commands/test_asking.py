"""Asking a finished model: finding the run, the prompts of training, chat, predict."""

import datetime
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steps import evaluate_model, merge_adapter, reference_logprobs, train_adapter
from temper.config.stages import load_stage_config
from temper.errors import UserError
from temper.keys import PACKAGE_ROOT, stage_key
from temper.model import loading
from temper.runs import find as runs
from temper.runs import prompting
from temper.runs.merged import merged_folder
from tests.support import finished
from tests.support.asking import command, complaint, lines_of
from tests.support.finished import ADAPTER, BASE, CONFIG, MERGED, PARTS, RUN, SYSTEM

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
REPORT = f"results/reports/{RUN}"


# --- finding a run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "sweep", "merged"),
    [
        (RUN, None, True),
        ("00000000a6", None, True),
        (REPORT, None, True),
        ("best", "tiny", True),
        ("best", None, True),
        ("00000000a5", None, True),
        (f"results/merged/{MERGED}", None, True),
        (f"results/adapters/{ADAPTER}/", None, False),
        ("00000000a4", None, False),
    ],
)
def test_a_run_is_found_whole_from_any_of_its_names(project, word, sweep, merged):
    run = runs.find(word, sweep)
    assert run.uses_merged == merged
    folders = {stage: run.parts[stage].name for stage in runs.STAGES}
    assert folders == {"evaluate_model": RUN, "merge_adapter": MERGED, "train_adapter": ADAPTER}
    assert run.prompt["system"] == SYSTEM
    assert runs.base_folder(run).name == "tiny-00000000a0"


def test_a_run_is_found_from_another_folder(finished_run, workspace):
    run = runs.find(str(finished_run / REPORT))
    assert all(folder.exists() for folder in run.parts.values()), run.parts


def test_the_untouched_model_can_be_asked_as_well(project):
    run = runs.find(BASE)
    assert runs.model_folder(run).name == "tiny-00000000a0"
    assert not run.uses_merged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--run", "00000000b6"],
            "--run 00000000b6: no run of this name or key in results; did you mean '00000000a6'?",
        ),
        (["--run", "zzz"], f"--run zzz: no run of this name or key in results; allowed: {BASE}, best, {RUN}"),
        (["--run", "best", "--sweep", "tony"], "--sweep tony: no such sweep in results/sweeps; did you mean 'tiny'?"),
        (["--run", RUN, "--sweep", "tiny"], f"--sweep tiny: goes with --run best, not with --run {RUN}; leave it out"),
        (
            ["--run", "results/models/tiny-00000000a0"],
            "--run results/models/tiny-00000000a0: is a folder of fetch_model",
        ),
        (["--run", "."], "--run .: is not a folder that a step wrote; name one of reports, merged, adapters"),
    ],
)
def test_a_run_that_is_not_there(project, capsys, arguments, message):
    assert complaint(capsys, command("chat"), *arguments).startswith(message)


def test_no_results_at_all(workspace, capsys):
    assert complaint(capsys, command("chat"), "--run", "x") == (
        "--run x: no such folder, and no run in results; run snakemake first"
    )
    assert complaint(capsys, command("chat"), "--run", "best").startswith("--run best: there is no leaderboard")


def test_without_the_merged_model_the_adapter_answers(finished_run, workspace, capsys):
    shutil.copytree(finished_run / "results", workspace / "results")
    shutil.rmtree(workspace / "results/merged")
    run = runs.find(RUN)
    assert not run.uses_merged
    assert predictions(run, 3) == [row["prediction"] for row in lines_of(f"{REPORT}/predictions.jsonl")[:3]]
    shutil.rmtree(workspace / "results/models")
    assert complaint(capsys, command("chat"), "--run", RUN) == (
        f"{REPORT}: results/models/tiny-00000000a0 is not there, and it holds the base model; make it again with "
        "snakemake --cores all results/models/tiny-00000000a0 --config ... (as for its sweep)"
    )


def test_a_run_that_was_evaluated_in_memory_answers_as_its_merged_model(finished_run, workspace):
    """To the bit, without a folder of it and from one that is made later, in the place that a plan gives it."""
    shutil.copytree(finished_run / "results", workspace / "results")
    merged = loading.load_model(Path(PARTS["merge_adapter"]), LOAD).state_dict()
    shutil.rmtree("results/merged")
    folders = {name: PARTS[stage] for name, stage in (("--model", "fetch_model"), ("--adapter", "train_adapter"))}
    folders |= {"--splits": PARTS["tokenize_splits"], "--base-report": PARTS["base_report"]}
    folders["--output"] = "results/reports/again-00000000d6"
    evaluate_model.main([*(word for pair in folders.items() for word in pair), *CONFIG])
    run = runs.find("again-00000000d6")
    assert "merge_adapter" not in run.parts
    assert run.parts["model"] == Path(PARTS["fetch_model"])
    weights = runs.load_network(run).state_dict()
    assert all(torch.equal(weight, merged[name]) for name, weight in weights.items())
    folder = merged_folder(run, "")
    config = load_stage_config("merge_adapter", None, CONFIG)
    upstream = {"model": "00000000a0", "adapter": "00000000a4", "splits": "00000000a2"}
    assert folder.name == f"{ADAPTER.removesuffix('00000000a4')}{stage_key('merge_adapter', config, upstream)}"
    assert runs.find("again-00000000d6").parts["merge_adapter"] == folder
    weights = loading.load_model(folder, LOAD).state_dict()
    assert all(torch.equal(weight, merged[name]) for name, weight in weights.items())


def predictions(run, number: int) -> list[str]:
    """Answers to the first test rows, in the words of the run's prompts."""
    prompter = prompting.Prompter(runs.model_folder(run), run.prompt)
    rows = lines_of(f"{REPORT}/predictions.jsonl")[:number]
    ids = [prompter.ids([{"role": "user", "content": row["prompt"]}], 8) for row in rows]
    model = runs.load_network(run)
    return prompting.answer_all(model, prompter, ids, prompting.Generation(max_new_tokens=8), 2, seed=0).texts


# --- prompts -------------------------------------------------------------------------------------


def test_the_tokenizer_for_others_asks_as_the_run_does(tmp_path, tiny_model):
    """Whatever the day, and with what the template writes before an answer only."""
    from tests.support.chat_templates import CLOCK, OPENINGS

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    template, opening = OPENINGS["thoughts"]
    (folder / "chat_template.jinja").write_text(CLOCK + template)
    prompt = {"apply_chat_template": True, "system": None, "loss_on": "assistant", "date": "2031-01-02"}
    prompt["opening"] = opening
    prompting.tokenizer_to_ship(folder, prompt).save_pretrained(tmp_path / "shipped")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "shipped")
    messages = [{"role": "user", "content": "Is it good?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompting.Prompter(folder, prompt).ids(messages, 8)
    assert theirs.decode(ids).startswith("02 Jan 2031, Thursday\n")
    assert theirs.decode(ids).endswith(f"assistant\n{opening}")


@pytest.mark.parametrize("template", [None, "{% if system %}{{ system }}: {% endif %}{{ prompt }}"])
def test_prompts_have_the_tokens_of_training(project, template):
    from datasets import load_from_disk

    run = runs.find(RUN)
    rows = load_from_disk("results/splits/reviews-tiny-00000000a2")["train"]
    assert len(rows) > 10
    prompt = run.prompt
    prompter = prompting.Prompter(runs.model_folder(run), prompt)
    for row in rows:
        ids = prompter.ids([{"role": "user", "content": row["prompt"]}], 8)
        assert ids == row["input_ids"][: row["prompt_length"]]
    if template:
        prompter = prompting.Prompter(
            runs.model_folder(run), {**prompt, "apply_chat_template": False, "template": template}
        )
        conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": rows[0]["prompt"]}]
        encoded = prompter.encoder.encode([*conversation, {"role": "assistant", "content": "positive"}])
        assert prompter.ids(conversation[1:], 8) == encoded.input_ids[: encoded.prompt_length]


def test_the_oldest_exchanges_go_when_the_context_is_full(project):
    run = runs.find(RUN)
    prompter = prompting.Prompter(runs.model_folder(run), run.prompt)
    assert prompter.limits.context == 256
    history = [{"role": ("user", "assistant")[number % 2], "content": "The plot is dull. " * 3} for number in range(21)]
    ids, left_out = prompter.ids_of_chat(history, 20)
    assert len(ids) <= 236
    assert left_out and left_out % 2 == 0
    assert ids == prompter.ids(history[left_out:], 20)
    with pytest.raises(UserError, match="context is 256"):
        prompter.ids(history[left_out - 2 :], 20)
    with pytest.raises(UserError, match="context is 256"):
        prompter.ids_of_chat([{"role": "user", "content": "x" * 300}], 20)


# --- predict -------------------------------------------------------------------------------------


def test_predict_gives_the_answers_of_the_evaluation(project, tmp_path, capsys):
    evaluated = lines_of(f"{REPORT}/predictions.jsonl")
    assert len({row["prediction"] for row in evaluated}) > 1
    rows = [{"n": row["id"], "prompt": row["prompt"]} for row in evaluated]
    rows[1]["messages"] = [{"role": "user", "content": rows[1].pop("prompt")}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in.txt").write_text("\n\n".join(row["prompt"] for row in evaluated))
    command("predict")(["--run", "best", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "a.jsonl")])
    command("predict")(
        ["--run", RUN, "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "b.jsonl"), "--batch-size", "3"]
    )
    answers = lines_of(tmp_path / "a.jsonl")
    assert [row["prediction"] for row in answers] == [row["prediction"] for row in evaluated]
    assert [row["finished"] for row in answers] == [row["finished"] for row in evaluated]
    assert [{name: row[name] for name in given} for row, given in zip(answers, rows, strict=True)] == rows
    assert [row["prediction"] for row in lines_of(tmp_path / "b.jsonl")] == [row["prediction"] for row in answers]
    assert f"{len(rows)} answers in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "in.jsonl", "in.txt"]


def test_predict_through_a_pipe_and_with_sampling(project, monkeypatch, capsys):
    def answers(*flags) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The plot falls flat.\n\nA joy.\n")))
        capsys.readouterr()
        command("predict")(["--run", RUN, "--input", "-", "--output", "-", *flags])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == ["The plot falls flat.", "A joy."]
        return [row["prediction"] for row in rows]

    sampled = answers("--do-sample", "--seed", "1", "--temperature", "2")
    assert sampled == answers("--do_sample", "--seed", "1", "--temperature", "2", "--batch_size", "1")
    assert sampled != answers("--do-sample", "--seed", "2", "--temperature", "2")
    assert answers() == answers("--seed", "2")
    assert answers() != answers("--system", "Say something else.")


def test_days_and_exact_numbers_beside_a_prompt_are_written_as_text(project, tmp_path):
    import pyarrow
    from pyarrow import parquet

    beside = {"day": datetime.date(2024, 2, 29), "at": datetime.datetime(2024, 2, 29, 7), "price": Decimal("1.10")}
    table = pyarrow.table({"prompt": ["A joy."], **{name: [value] for name, value in beside.items()}})
    parquet.write_table(table, tmp_path / "in.parquet")
    command("predict")(["--run", RUN, "--input", f"{tmp_path}/in.parquet", "--output", f"{tmp_path}/out.jsonl"])
    [row] = lines_of(tmp_path / "out.jsonl")
    assert (row["day"], row["at"], row["price"]) == ("2024-02-29", "2024-02-29T07:00:00", "1.10")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"prompt": "a"}\n{"prompt": \n', "in.jsonl:2: no valid JSON"),
        (
            "in.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            "in.jsonl:2: no column 'prompt' or 'messages'; there are text",
        ),
        ("in.jsonl", '{"prompt": ""}\n', "in.jsonl:1: prompt[0]: the user's message is empty"),
        ("in.jsonl", '{"prompt": 3}\n', "in.jsonl:1: column 'prompt' holds 3, not text or a list of messages"),
        (
            "in.jsonl",
            '{"messages": [{"role": "bot", "content": "b"}]}\n',
            "in.jsonl:1: messages[0]: role 'bot' is not known; allowed",
        ),
        (
            "in.jsonl",
            '{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}\n',
            "in.jsonl:1: column 'messages' ends with the assistant's message: the user's (or a tool's) must",
        ),
        ("in.csv", "prompt,n\na,1\nb\n", "in.csv:3: 1 fields, expected 2"),
        ("in.txt", "a\n" + "long " * 300, "in.txt:2: the prompt has"),
        ("in.txt", b"a\n\xff\n", "in.txt:2: no UTF-8"),
        ("in.txt", " \n", "--input in.txt: there is no prompt in it"),
        ("in.pdf", "x", "--input in.pdf: name a file that ends in .txt, .json"),
        ("none.txt", None, "--input none.txt: no such file"),
    ],
)
def test_a_bad_prompt_is_named_before_the_model_is_loaded(
    finished_run, workspace, capsys, monkeypatch, name, content, message
):
    def loaded(run):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runs, "load_network", loaded)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = complaint(
        capsys, command("predict"), "--run", finished_run / REPORT, "--input", name, "--output", "out.jsonl"
    )
    assert found.startswith(message)
    assert not Path("out.jsonl").exists()


def test_outputs_and_options_that_make_no_sense(finished_run, workspace, capsys):
    Path("in.txt").write_text("a\n")
    Path("there.jsonl").write_text("mine")
    common = ["--run", finished_run / REPORT, "--input", "in.txt"]
    for arguments, message in (
        (["--output", "there.jsonl"], "--output there.jsonl: is there already"),
        (["--output", "out.csv"], "--output out.csv: answers are JSON lines"),
        (["--output", "no/out.jsonl"], "--output no/out.jsonl: there is no folder no"),
        (["--output", "-", "--temperature", "2"], "temperature and top_p have no effect without do_sample"),
        (["--output", "-", "--do-sample", "--top-p", "2"], "top_p must be above 0 and at most 1 (found 2.0)"),
        (["--output", "-", "--max-new-tokens", "0"], "max_new_tokens must be at least 1 (found 0)"),
        (["--output", "-", "--batch-size", "0"], "batch_size must be at least 1 (found 0)"),
    ):
        assert complaint(capsys, command("predict"), *common, *arguments).startswith(message)
    assert Path("there.jsonl").read_text() == "mine"


def test_answers_that_cannot_be_written_are_printed(finished_run, workspace, capsys, monkeypatch):
    Path("in.txt").write_text("a\n")
    Path("out").mkdir()
    common = ["--run", finished_run / REPORT, "--input", "in.txt", "--output", "out/a.jsonl", "--max-new-tokens", "2"]
    load = runs.load_network

    def load_and_lose_the_folder(run):
        shutil.rmtree("out")
        return load(run)

    monkeypatch.setattr(runs, "load_network", load_and_lose_the_folder)
    with pytest.raises(SystemExit) as ended:
        command("predict")([str(argument) for argument in common])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a"]
    assert err.splitlines()[-1] == (
        "error: --output out/a.jsonl: cannot be written (No such file or directory); "
        "the answers went to standard output instead"
    )


# --- chat ----------------------------------------------------------------------------------------


def talk(capsys, monkeypatch, text: str, *flags) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    command("chat")(["--run", RUN, "--max-new-tokens", "12", *flags])
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_piped_chat_prints_answers_only_and_keeps_the_conversation(project, capsys, monkeypatch):
    out, err = talk(capsys, monkeypatch, "The plot falls flat.\nAnd the music?\n")
    alone, _ = talk(capsys, monkeypatch, "And the music?\n")
    first, _ = talk(capsys, monkeypatch, "The plot falls flat.\n")
    assert out.startswith(first)
    assert out != first + alone, "the second answer depends on what was said before"
    reset, err = talk(capsys, monkeypatch, "The plot falls flat.\n/reset\nAnd the music?\n")
    assert reset == first + alone
    assert "a new conversation" in err
    ended, _ = talk(capsys, monkeypatch, "The plot falls flat.\n/exit\nAnd the music?\n")
    assert ended == first
    assert "you>" not in out + err


def test_chat_streams_the_answer_that_predict_gives(project, tmp_path, capsys, monkeypatch):
    out, _ = talk(capsys, monkeypatch, "The plot falls flat.\n")
    (tmp_path / "in.txt").write_text("The plot falls flat.")
    command("predict")(
        [
            "--run",
            RUN,
            "--input",
            str(tmp_path / "in.txt"),
            "--output",
            str(tmp_path / "a.jsonl"),
            "--max-new-tokens",
            "12",
        ]
    )
    assert out.strip() == lines_of(tmp_path / "a.jsonl")[0]["prediction"]


def test_what_is_streamed_is_the_answer_with_its_special_tokens(project):
    import torch

    run = runs.find(RUN, None)
    prompter, model = prompting.Prompter(runs.model_folder(run), run.prompt), runs.load_network(run)
    settings, answers = prompting.Generation(max_new_tokens=40, do_sample=True, temperature=5.0), []
    for seed in range(8):
        torch.manual_seed(seed)
        ids, said = prompter.ids([{"role": "user", "content": "A joy."}], 40), []
        answer, _ = prompting.stream_answer(model, prompter, ids, settings, said.append)
        assert "".join(said) == answer and len(said) > 1
        answers.append(answer)
    assert any("<|im_start|>" in answer for answer in answers)


def test_chat_compares_with_the_base_model_and_changes_the_system_message(project, capsys, monkeypatch):
    out, _ = talk(capsys, monkeypatch, "The plot falls flat.\n", "--compare")
    base, _, tuned = out.partition("tuned> ")
    assert base.startswith("base> ")
    assert tuned == talk(capsys, monkeypatch, "The plot falls flat.\n")[0]
    assert base.removeprefix("base> ") != tuned
    other, err = talk(capsys, monkeypatch, "/system Say something else.\nThe plot falls flat.\n")
    assert other == talk(capsys, monkeypatch, "The plot falls flat.\n", "--system", "Say something else.")[0]
    assert other != tuned
    assert "system: Say something else." in err
    assert talk(capsys, monkeypatch, "/system\nA\n")[0] == talk(capsys, monkeypatch, "A\n", "--system", "")[0]


def test_a_sampled_chat_follows_from_its_seed(project, capsys, monkeypatch):
    def sampled(seed: str) -> str:
        return talk(capsys, monkeypatch, "A\nB\n", "--do-sample", "--temperature", "3", "--seed", seed)[0]

    assert sampled("1") == sampled("1")
    assert sampled("1") != sampled("2")


def test_a_chat_in_a_terminal(project):
    """Prompts, commands, a mistake that does not end it, Ctrl-D that does."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "TERM": "dumb"}
    command = [sys.executable, "-m", "temper", "chat", "--run", RUN, "--max-new-tokens", "4"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = ""
        for typed in (b"/sistem x\n", b"A joy.\n", b"\x04"):
            shown += read_until(ours, "you> ")
            os.write(ours, typed)
        shown += read_until(ours, None)
        assert process.wait() == 0, shown
    os.close(ours)
    assert f"system: {SYSTEM}" in shown
    assert "error: /sistem is not a command; did you mean '/system'?" in shown
    assert "Traceback" not in shown


def read_until(terminal: int, text: str | None) -> str:
    """What a program shows until `text` comes, or, with None, until it ends."""
    shown = b""
    while text is None or not shown.decode(errors="replace").endswith(text):
        ready, _, _ = select.select([terminal], [], [], 120)
        assert ready, f"nothing came any more after: {shown.decode(errors='replace')}"
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # Linux's way of saying that the other side is gone
            break
    return shown.decode(errors="replace")


def test_preference_optimization_after_fine_tuning(tmp_path, tiny_model, capsys, monkeypatch):
    """Its adapter belongs on the merged fine-tuned model; the base model is still the untouched one."""
    pairs = "data.rejected_from=[positive,negative]"
    monkeypatch.chdir(finished.make(tmp_path, tiny_model, pairs))
    config = [*finished.CONFIG, pairs, "method=dpo", "train.num_train_epochs=1"]
    splits, start = "results/splits/reviews-tiny-00000000a2", f"results/merged/{MERGED}"
    references, adapter = "results/references/reviews-00000000b3", "results/adapters/x-sft-dpo-00000000b4"
    merged, report = "results/merged/x-sft-dpo-00000000b5", "results/reports/x-sft-dpo-00000000b6"
    reference_logprobs.main(["--splits", splits, "--model", start, "--output", references, *config])
    inputs = ["--splits", splits, "--model", start, "--references", references]
    train_adapter.main([*inputs, "--output", adapter, *config])
    merge_adapter.main(["--model", start, "--adapter", adapter, "--output", merged, *config])
    inputs = ["--model", merged, "--splits", splits, "--adapter", adapter, "--references", references]
    inputs += ["--base-report", f"results/reports/{BASE}", "--start-report", REPORT]
    evaluate_model.main([*inputs, "--output", report, *config])
    for key in ("00000000b4", "00000000b6"):
        run = runs.find(key)
        assert runs.base_folder(run) == Path(start)
        assert runs.untouched_folder(run) == Path("results/models/tiny-00000000a0")
        assert run.parts["merge_adapter"] == Path(merged)
    message = complaint(capsys, command("publish"), "--run", "00000000b6", "--repository", "a/b", "--dry-run", "look")
    assert f"its base model is `{MERGED}`, itself tuned from" in message
    command("publish")(["--run", "00000000b6", "--repository", "a/b", "--merged", "--dry-run", "look"])
    card = Path("look/README.md").read_text()
    assert "fine-tuned (dpo)" in card
    assert "| method.beta | 0.1 |" in card
    assert "For comparison: after fine-tuning, accuracy" in card
    assert "preference accuracy" in card


@pytest.mark.parametrize("adapter", ["prompt_tuning", "qlora"])
def test_other_adapters_answer_as_in_their_evaluation(tmp_path, tiny_model, capsys, monkeypatch, adapter):
    monkeypatch.chdir(finished.make(tmp_path, tiny_model, f"adapter={adapter}", "~adapter.r", "eval.max_new_tokens=6"))
    evaluated = lines_of(f"{REPORT}/predictions.jsonl")
    Path("in.txt").write_text("\n".join(row["prompt"] for row in evaluated))
    command("predict")(["--run", RUN, "--input", "in.txt", "--output", "out.jsonl"])
    assert [row["prediction"] for row in lines_of("out.jsonl")] == [row["prediction"] for row in evaluated]
    line = evaluated[0]["prompt"] + "\n"
    assert talk(capsys, monkeypatch, line, "--max-new-tokens", "6")[0].strip() == evaluated[0]["prediction"]
    if adapter == "prompt_tuning":
        for main, flags in (
            (command("publish"), ["--repository", "a/b", "--merged", "--dry-run", "look"]),
            (command("export"), ["--output", "x.gguf"]),
        ):
            assert "virtual tokens cannot be merged" in complaint(capsys, main, "--run", RUN, *flags)


def with_line_ends(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with a token of two line ends, as GPT-2's and its heirs' tokenizers have; another one goes."""
    shutil.copytree(tiny_model, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    vocabulary["ĊĊ"] = vocabulary.pop("".join(merges.pop()))
    merges.append(["Ċ", "Ċ"])
    file.write_text(json.dumps(content))
    return folder


def test_a_free_template_is_for_single_prompts(tmp_path, tiny_model, capsys, monkeypatch):
    """Its two line ends are one token before nothing, and two before a word: all ask, and learned, with the one."""
    from datasets import load_from_disk

    from temper import api

    options = ["prompt=plain", f"prompt.system='{SYSTEM}'", "data.limit.test=16", "eval.max_new_tokens=4"]
    project = finished.make(tmp_path, with_line_ends(tiny_model, tmp_path / "model"), *options)
    monkeypatch.chdir(project)
    out, _ = talk(capsys, monkeypatch, "The plot falls flat.\nAnd the music?\n")
    assert out == "".join(
        talk(capsys, monkeypatch, f"{line}\n")[0] for line in ("The plot falls flat.", "And the music?")
    )
    evaluated = lines_of(f"{REPORT}/predictions.jsonl")
    (tmp_path / "in.txt").write_text("\n".join(row["prompt"] for row in evaluated))
    command("predict")(["--run", RUN, "--input", "in.txt", "--output", "out.jsonl"])
    assert [row["prediction"] for row in lines_of("out.jsonl")] == [row["prediction"] for row in evaluated]
    tuned = api.load(RUN)
    assert tuned.answers([row["prompt"] for row in evaluated], max_new_tokens=4) == [
        row["prediction"] for row in evaluated
    ]
    splits = load_from_disk("results/splits/reviews-tiny-00000000a2")
    for row in [*splits["train"], *splits["test"]]:
        asked = tuned.prompter.ids([{"role": "user", "content": row["prompt"]}], 4)
        assert asked == row["input_ids"][: row["prompt_length"]]
        assert tuned.prompter.tokenizer.convert_ids_to_tokens(asked[-1]) == "ĊĊ"
    audit = json.loads(Path("results/splits/reviews-tiny-00000000a2/audit.json").read_text())["splits"]["train"]
    assert audit["tokenized_piecewise"] == audit["read"] == len(splits["train"]) > 10
