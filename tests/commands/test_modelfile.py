"""The Modelfile beside a GGUF file: its template makes of conversations what the model's own makes of them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trl

from temper.runs import forms, ollama
from temper.runs.prompting import Generation
from tests.support import tiny
from tests.support.asking import command, complaint
from tests.support.chat_templates import OPENINGS
from tests.support.finished import RUN, SYSTEM

FAMILIES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CHATS = [
    forms._said("The plot falls flat."),
    forms._said("Why?", "So.", 'Why so?\n\n{{ .System }} {braces} \\n """', "Because.", "<b>où</b> 🦙"),
    forms._told("Say 'yes'\nor \"no\".", "Is it?"),
    forms._told("Be kind.", "Is it?", "No, <not> at all.", "And {{ if }} now?"),
]


def tokenizer_with(template: str):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def texts_of(tokenizer, chats: list) -> list[str]:
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_form_is_found_of_published_templates_and_gives_their_text(path):
    tokenizer = tokenizer_with(path.read_text(encoding="utf-8"))
    form = forms.of_chat(tokenizer)
    if form is None:
        assert path.stem.split("_")[0] in ("idefics3", "llava", "smolvlm"), "they want content in parts"
        return
    chats = CHATS if form.system else CHATS[:2]
    assert [form.text(chat) for chat in chats] == texts_of(tokenizer, chats)
    blanks = [forms._said("\ta \n")]
    assert form.more or [form.text(*blanks)] == texts_of(tokenizer, blanks)


def test_a_template_that_does_more_has_no_form():
    counts = (
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    shouts = "{% for m in messages %}<{{ m.content | upper }}>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert forms.of_chat(tokenizer_with(counts)) is None
    assert forms.of_chat(tokenizer_with(shouts)) is None
    assert forms.of_free("{{ prompt | upper }}", None) is None
    assert forms.of_free("{{ prompt }} {{ prompt }}", None) is None
    assert forms.of_free("{{ system }}: {{ prompt }}\n", "Be brief.").text(forms._said(" x ")) == "Be brief.:  x \n"
    text = ollama.modelfile("m.gguf", None, "Be brief.", ["<|end|>"], Generation(), 2048)
    assert "TEMPLATE" not in text.replace("# no TEMPLATE", "") and "SYSTEM" not in text


# --- in Go ---------------------------------------------------------------------------------------

RENDERER = """
package main

import ("encoding/json"; "os"; "text/template")

type message struct { Role, Content string }
type task struct { Template string; Chats []struct { System, Prompt string; Messages []message } }

func main() {
    var tasks []task
    var made [][]string
    if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil { panic(err) }
    for _, one := range tasks {
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
        var texts []string
        for _, chat := range one.Chats {
            var text bytesBuffer
            given := map[string]any{"System": chat.System, "Prompt": chat.Prompt, "Messages": chat.Messages}
            given["Response"] = ""
            if err := parsed.Execute(&text, given); err != nil { panic(err) }
            texts = append(texts, string(text))
        }
        made = append(made, texts)
    }
    json.NewEncoder(os.Stdout).Encode(made)
}

type bytesBuffer []byte

func (b *bytesBuffer) Write(more []byte) (int, error) { *b = append(*b, more...); return len(more), nil }
"""


def rendered_by_go(folder: Path, tasks: list[tuple[str, list]]) -> list[list[str]]:
    """What Go makes of (template, conversations), given as Ollama gives them."""
    if not shutil.which("go"):
        pytest.skip("Go is not installed (apt-get install golang-go)")
    (folder / "main.go").write_text(RENDERER)
    asked = [{"Template": template, "Chats": [_for_ollama(chat) for chat in chats]} for template, chats in tasks]
    done = subprocess.run(["go", "run", "main.go"], input=json.dumps(asked), text=True, capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _for_ollama(chat: list[dict]) -> dict:
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    messages = [{"Role": message["role"], "Content": message["content"]} for message in chat]
    return {"System": system, "Messages": messages, "Prompt": chat[-1]["content"]}


def template_in(modelfile: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', modelfile, flags=re.DOTALL)[1]


def test_go_makes_of_the_template_what_the_models_own_makes(tmp_path):
    odd = (
        '{% for m in messages %}{<\u00a0{{ m.role }}>"""{{ m.content }}{{ \'{{\' }}{% endfor %}'
        "{% if add_generation_prompt %}\x0b{ {% endif %}"
    )
    sources = [path.read_text(encoding="utf-8") for path in FAMILIES] + [odd]
    sources += [source for source, _ in OPENINGS.values()]
    tokenizers = [tokenizer for source in sources if forms.of_chat(tokenizer := tokenizer_with(source))]
    assert len(tokenizers) > 50
    tasks = []
    for tokenizer in tokenizers:
        form = forms.of_chat(tokenizer)
        text = ollama.modelfile("m.gguf", form, None, [], Generation(), 64)
        tasks.append((template_in(text), CHATS if form.system else CHATS[:2]))
    found = rendered_by_go(tmp_path, tasks)
    assert found == [texts_of(tokenizer, chats) for tokenizer, (_, chats) in zip(tokenizers, tasks, strict=True)]


def test_go_makes_of_a_free_template_the_runs_prompt(tmp_path):
    form = forms.of_free("{{ system }}\nQ: {{ prompt }}\nA:", "Be brief.")
    template = template_in(ollama.modelfile("m.gguf", form, "Be brief.", [], Generation(), 64))
    assert rendered_by_go(tmp_path, [(template, CHATS[:1])]) == [["Be brief.\nQ: The plot falls flat.\nA:"]]


# --- the file ------------------------------------------------------------------------------------


def test_the_modelfile_of_a_run(project, tmp_path, capsys):
    file = tmp_path / "run.gguf"
    command("export")(["--run", RUN, "--output", str(file)])
    text = (tmp_path / "run.Modelfile").read_text()
    turn = "<|im_start|>user\n"
    assert template_in(text).startswith(
        f"{{{{ if .System }}}}<|im_start|>system\n{{{{ .System }}}}<|im_end|>\n{turn}{{{{ else }}}}{turn}{{{{ end }}}}"
    )
    lines = text.split("\n")
    assert lines[0] == "FROM ./run.gguf"
    assert f'SYSTEM """{SYSTEM}"""' in lines
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_predict 8",
        "PARAMETER num_ctx 256",
    ]
    assert f"ollama create NAME -f {tmp_path / 'run.Modelfile'}" in capsys.readouterr().out
    assert complaint(capsys, command("export"), "--run", RUN, "--output", tmp_path / "run.gguf").startswith("--output")
    file.unlink()
    message = complaint(capsys, command("export"), "--run", RUN, "--output", file)
    assert message.startswith(f"--output {tmp_path / 'run.Modelfile'}: is there already")


def test_what_a_modelfile_cannot_hold_is_said():
    form = forms.of_chat(tiny.tiny_tokenizer())
    system = 'Three """ quotes.'
    assert ollama.remarks(form, "Be brief.") == []
    assert ollama.remarks(form, system) == [ollama.NO_SYSTEM]
    text = ollama.modelfile("m.gguf", form, system, [], Generation(do_sample=True, temperature=0.5), 10**6)
    assert f"# {ollama.NO_SYSTEM}" in text and system not in text
    assert "PARAMETER temperature 0.5\nPARAMETER top_p 1.0\nPARAMETER top_k 0\n" in text
    assert "PARAMETER num_ctx 8192\n" in text
