"""A run's models under the names base, adapter and merged, for the OpenAI-compatible server of transformers.

That server loads what a request names, from a hub's cache. So the models are laid out as such a cache, of links to
results/, each with the tokenizer, the chat template and the generation settings with which the run is asked. The
template has the run's system message, which a conversation that begins with one of its own replaces.
"""

import json
from pathlib import Path

from temper.data.conversations import SYSTEM
from temper.errors import UserError
from temper.files import json_text, read_json
from temper.model import serving
from temper.model.adapters import is_adapter
from temper.model.layout import model_files
from temper.runs import find as runs
from temper.runs import forms
from temper.runs.merged import merged_folder
from temper.runs.prompting import Generation, Prompter, tokenizer_to_ship

BASE, START, ADAPTER, MERGED = "base", "start", "adapter", "merged"
COMMIT = "0" * 40  # of each model in the cache


def offer(run: runs.FinishedRun, cache: Path, settings: Generation) -> dict[str, str]:
    """Fill the empty folder `cache` with what a run's models are served from.

    Returns:
        name of a model -> what it is. `start` is what the training began with, where that is not the base model.

    Raises:
        UserError: a part of the run is missing, or its prompts cannot be asked for in a chat.
    """
    from temper.model.loading import is_encoder_decoder

    if is_encoder_decoder(runs.base_folder(run)):
        raise UserError(
            f"--run {run.name}: is an encoder-decoder, which transformers' server does not serve; see predict"
        )
    untouched, trained_on = runs.untouched_folder(run), runs.base_folder(run)
    offered = {BASE: untouched}
    if trained_on != untouched:
        offered[START] = trained_on
    if "train_adapter" in run.parts:
        offered[MERGED] = merged_folder(run, "and it is what is served")
        runs.refuse_bundled(offered[MERGED], "ask it with temper chat, or serve it with mlflow models serve")
    for name, folder in offered.items():
        _add(cache, name, _model(folder), folder, run, settings)
    found = {name: str(folder) for name, folder in offered.items()}
    adapter = run.parts.get("train_adapter")
    if adapter and is_plain_lora(adapter) and not _trained_quantized(run):
        base = START if START in offered else BASE
        serving.refuse_other_weights(run.part("train_adapter", "and it is served"), trained_on)
        _add(cache, ADAPTER, _adapter(adapter, trained_on, base), trained_on, run, settings)
        found[ADAPTER] = f"{adapter}, on {base}"
    return found


def is_plain_lora(adapter: Path) -> bool:
    """Whether a folder holds nothing but LoRA's two matrices for linear layers, which all servers of adapters load."""
    if not is_adapter(adapter):
        return False
    config = read_json(adapter / "adapter_config.json")
    more = (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
    )
    return config["peft_type"] == "LORA" and config.get("bias") == "none" and not any(map(config.get, more))


def _trained_quantized(run: runs.FinishedRun) -> bool:
    """Whether the adapter belongs on a base in 4 or 8 bits, which is not what is served."""
    from temper.model.loading import is_quantized

    return is_quantized(run.config("train_adapter", "and only it knows how the base was loaded")["quantization"])


# --- the cache -----------------------------------------------------------------------------------

Files = dict[str, Path | str]  # name of a file -> where it is, or its text


def _model(folder: Path) -> Files:
    own = ("provenance.json", "README.md", "config.yaml", serving.FILE)
    names = model_files([path.name for path in folder.iterdir()], str(folder))
    return {name: (folder / name).absolute() for name in names if name not in own}


def _adapter(adapter: Path, trained_on: Path, base: str) -> Files:
    config = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": base, "revision": None}
    weights: Files = {path.name: path.absolute() for path in adapter.glob("adapter_model*")}
    return {
        **weights,
        "adapter_config.json": json.dumps(config, indent=2),
        "config.json": (trained_on / "config.json").absolute(),
    }


def _add(cache: Path, name: str, files: Files, tokenized_by: Path, run: runs.FinishedRun, settings: Generation) -> None:
    """Add a model, with the tokenizer of a folder as the run asks it. Links, for weights are large."""
    repository = cache / f"models--{name}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    prompter = Prompter(tokenized_by, run.prompt)
    tokenizer_to_serve(tokenized_by, run, prompter).save_pretrained(snapshot)
    files["generation_config.json"] = json_text(_generation(settings, prompter))
    for file, content in files.items():
        place = snapshot / file
        if isinstance(content, str):
            place.write_text(content, encoding="utf-8")
        elif not place.exists():  # the tokenizer's are the run's own, and stay
            place.symlink_to(content.resolve())


def _generation(settings: Generation, prompter: Prompter) -> dict:
    chosen: dict = {"do_sample": settings.do_sample}
    if settings.do_sample:
        chosen |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return {**chosen, "eos_token_id": prompter.stop_ids, "pad_token_id": prompter.tokenizer.pad_token_id}


# --- the prompts ---------------------------------------------------------------------------------


def tokenizer_to_serve(folder: Path, run: runs.FinishedRun, prompter: Prompter):
    """The tokenizer in a model's folder, with a chat template that asks as `prompter` does.

    Raises:
        UserError: no chat template would.
    """
    prompt = run.prompt
    tokenizer = tokenizer_to_ship(folder, prompt)
    if prompt["apply_chat_template"]:
        tokenizer.chat_template = _with_system(tokenizer.get_chat_template(), prompt["system"])
    else:
        form = forms.of_run(tokenizer, prompt)
        if form is None:
            raise UserError(
                f"--run {run.name}: its prompt.template does more than put text around a prompt; see predict"
            )
        tokenizer.chat_template = _single(form, tokenizer.decode(prompter.encoder.first_ids), prompt["system"])
    for messages in forms.SAMPLES[:2] if prompter.keeps_history else forms.SAMPLES[:1]:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if found != prompter.encoder.prompt_ids(prompter.told(messages)):
            raise UserError(
                f"--run {run.name}: a chat template gives its prompts other tokens than in training; see predict"
            )
    return tokenizer


def _with_system(source: str, system: str | None) -> str:
    """A chat template that begins with a system message where a conversation does not."""
    if not system:
        return source
    message = _literal([{"role": "system", "content": system}])
    asked = f"messages[0]['role'] not in {list(SYSTEM)}"
    given = f"{{%- if {asked} %}}{{%- set messages = {message} + messages %}}{{%- endif %}}"
    return given + "{{ '' }}" + source  # the empty text keeps blanks at the start of the template


def _single(form: forms.Form, first: str, system: str | None) -> str:
    """A chat template for single prompts, as `prompt.template` has them, with the run's system message in it."""
    start, end = _literal(first + form.start), _literal(form.end)
    own = _literal(system) if system else "none"
    return (
        f"{{%- if messages[0]['role'] in {list(SYSTEM)} and messages[0]['content'] == {own} %}}"
        "{%- set messages = messages[1:] %}{%- endif %}"
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
        "{{ raise_exception('this model was trained on single prompts with its own system message') }}{%- endif %}"
        f"{{{{ {start} + messages[0]['content'] + {end} }}}}"
    )


def _literal(value) -> str:
    """A value as Jinja writes it. It knows no pairs of surrogates, with which JSON spells an emoji in ASCII."""
    return json.dumps(value, ensure_ascii=False)
