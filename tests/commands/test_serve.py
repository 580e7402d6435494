"""`temper serve`: transformers' own server, which answers as `temper predict` does."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from temper.errors import UserError
from temper.runs import find as runs
from temper.runs import forms, offered
from temper.runs.prompting import Generation, Prompter
from tests.support.asking import command, complaint, lines_of
from tests.support.finished import ADAPTER, BASE, RUN, SYSTEM

PROMPTS = ["The plot falls flat.", "A joy from the first minute to the last.", "où? 🦙"]
NAMES = {"merged": RUN, "adapter": f"results/adapters/{ADAPTER}", "base": BASE}
needs_server = pytest.mark.skipif(not is_serve_available(), reason='needs openai: pip install -e ".[serve]"')


@contextlib.contextmanager
def serving(*arguments: str):
    """`temper serve` in a process of its own; its address. It must end well when it is asked to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "temper", "serve", "--run", RUN, "--port", str(port), *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=10)
                    break
                time.sleep(0.5)
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            said = server.communicate()[0]
    assert server.returncode == 128 + signal.SIGTERM, said


def asked(address: str, path: str, body: dict | None = None) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def answer(address: str, model: str, messages: list[dict], **given) -> tuple[str, bool]:
    """(text, whether it ended by itself) of a model's greedy answer. `temper predict` strips blanks around it, too."""
    body = {"model": model, "messages": messages, "max_tokens": 12, **given}
    [choice] = asked(address, "/v1/chat/completions", body)["choices"]
    return choice["message"]["content"].strip(), choice["finish_reason"] == "stop"


@needs_server
def test_each_model_answers_as_predict_does(project, tmp_path):
    Path(tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    before = sorted(Path("results").rglob("*"))
    with serving() as address:
        assert {model["id"] for model in asked(address, "/v1/models")["data"]} == set(NAMES)
        for model, run in NAMES.items():
            file = tmp_path / f"{model}.jsonl"
            words = ["--run", run, "--input", str(tmp_path / "prompts.txt"), "--output", str(file)]
            command("predict")([*words, "--max-new-tokens", "12"])
            expected = [(row["prediction"], row["finished"]) for row in lines_of(file)]
            found = [answer(address, model, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
            assert found == expected
            told = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPTS[0]}]
            other = [{"role": "system", "content": "Another."}, {"role": "user", "content": PROMPTS[0]}]
            assert answer(address, model, told, temperature=0) == expected[0]
            assert answer(address, model, other) != expected[0]
        chat = [*told[1:], {"role": "assistant", "content": "positive"}, {"role": "user", "content": PROMPTS[1]}]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
        words = ["--run", RUN, "--input", str(tmp_path / "chat.jsonl"), "--output", str(tmp_path / "chat.out.jsonl")]
        command("predict")([*words, "--max-new-tokens", "12"])
        assert answer(address, "merged", chat)[0] == lines_of(tmp_path / "chat.out.jsonl")[0]["prediction"]
    assert sorted(Path("results").rglob("*")) == before


# --- the prompts, without the server -------------------------------------------------------------


def served_ids(run: runs.FinishedRun, messages: list[dict]) -> list[int]:
    """The tokens that the server makes of a conversation for the merged model."""
    folder = runs.model_folder(run)
    tokenizer = offered.tokenizer_to_serve(folder, run, Prompter(folder, run.prompt))
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.fixture
def prompted(project, monkeypatch):
    """The finished run with other prompts."""

    def run_with(**prompt) -> runs.FinishedRun:
        run = runs.find(RUN)
        monkeypatch.setattr(runs.FinishedRun, "prompt", {**type(run).prompt.fget(run), **prompt})
        return run

    return run_with


@pytest.mark.parametrize(
    "prompt",
    [
        {"system": 'A "system"\nmessage, {{ braces }} {% end %} \\ 🦙'},
        {"system": None},
        {"apply_chat_template": False, "template": "{{ system }}\n{% if system %}Q{% endif %}: {{ prompt }}\nA:\n"},
        {"apply_chat_template": False, "template": "{{ prompt }}\n\n", "system": None},
    ],
)
def test_a_served_prompt_has_the_tokens_of_training(prompted, prompt):
    run = prompted(**prompt)
    prompter = Prompter(runs.model_folder(run), run.prompt)
    for text in (*PROMPTS, " blanks \n"):
        asks = [{"role": "user", "content": text}]
        assert served_ids(run, asks) == prompter.ids(asks, 8)


def test_single_prompts_refuse_a_conversation(prompted):
    from jinja2 import TemplateError

    run = prompted(apply_chat_template=False, template="{{ system }} {{ prompt }}", system="Be brief.")
    assert served_ids(run, forms._told("Be brief.", "Why?")) == served_ids(run, forms._said("Why?"))
    for messages in (forms._said("Why?", "So.", "Why?"), forms._told("Be long.", "Why?")):
        with pytest.raises(TemplateError, match="trained on single prompts with its own system message"):
            served_ids(run, messages)


def test_prompts_that_no_chat_template_makes_are_refused(prompted):
    with pytest.raises(UserError, match=f"--run {RUN}: its prompt.template does more than put text around a prompt"):
        served_ids(
            prompted(apply_chat_template=False, template="{{ system }}{{ prompt | upper }}"), forms._said("Why?")
        )


# --- what is offered -----------------------------------------------------------------------------


def test_what_is_offered_has_the_runs_settings(project, tmp_path):
    found = offered.offer(runs.find(RUN), tmp_path, Generation(do_sample=True, temperature=0.5))
    assert set(found) == set(NAMES)
    for name in NAMES:
        folder = tmp_path / f"models--{name}" / "snapshots" / offered.COMMIT
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings == {
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "eos_token_id": [2],
            "pad_token_id": 2,
        }
        [weights] = folder.glob("*model.safetensors")
        assert weights.is_symlink() and weights.is_file()


def test_the_untouched_model_alone_can_be_offered(project, tmp_path):
    assert set(offered.offer(runs.find(BASE), tmp_path, Generation())) == {"base"}


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"peft_type": "IA3"}],
)
def test_an_adapter_that_is_more_than_lora_is_not_offered_as_one(project, tmp_path, change):
    config = json.loads((Path(NAMES["adapter"]) / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert offered.is_plain_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    assert not offered.is_plain_lora(tmp_path)


@needs_server
def test_a_taken_port_is_said_before_anything_is_loaded(project, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert complaint(capsys, command("serve"), "--run", RUN, "--port", port).startswith(f"--port {port}: cannot be")


def test_without_the_servers_packages_it_says_what_to_install(project, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install -e '.[serve]'" in complaint(capsys, command("serve"), "--run", RUN)


def test_an_encoder_decoder_is_refused(project, tmp_path, monkeypatch):
    monkeypatch.setattr("temper.model.loading.is_encoder_decoder", lambda folder: True)
    with pytest.raises(UserError, match="is an encoder-decoder"):
        offered.offer(runs.find(RUN), tmp_path, Generation())
