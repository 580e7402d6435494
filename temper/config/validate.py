"""Check a composed config: it becomes values of the schema's types, or one clear error line."""

from temper.config import best
from temper.config.libraries import check_library_sections, check_processes, refuse_without_validation
from temper.config.schema import (
    METHODS,
    SOURCE_KINDS,
    Config,
    Data,
    Eval,
    Mixture,
    OfficialSplits,
    OfPairs,
    SplitSources,
    Tokenize,
)
from temper.data.layouts import TEXT
from temper.errors import UserError, suggest
from temper.errors import found as _found
from temper.evaluation.metrics import DOCUMENTS, refuse_without_pairs
from temper.keys import flat
from temper.secrets import has_login, secret_variables

# Keys whose value has one of several classes, by a tag, and parts of such values.
UNIONS: dict = {
    "data": {"alone": Data, "mixed": Mixture},
    "source": {"one": None, "per_split": SplitSources, **SOURCE_KINDS},
    "one": SOURCE_KINDS,
    **dict.fromkeys(SplitSources.model_fields, SOURCE_KINDS),
    "split": {"one": None, "each": OfficialSplits},
    "method": METHODS,
}


# --- validating ----------------------------------------------------------------------------------


def validated(config: dict) -> dict:
    """Check a whole config and fill in defaults. Raises UserError for the first fault found."""
    config = _normalised(config)
    filled = checked(Config, config, "").model_dump()
    check_library_sections(filled["train"], filled["adapter"], filled["method"]["name"])
    check_processes(filled["num_processes"], filled["train"], filled["adapter"], filled["quantization"])
    best.check(filled["train"], filled["eval"])
    _check_together(filled)
    _check_method(filled)
    _check_secrets(filled)
    return filled


def data_sets(data: dict) -> list[dict]:
    """The config sections of the data sets that a run learns from: its own, or those of a mixture."""
    return [part["data"] for part in data["mix"]] if "mix" in data else [data]


def all_data_sets(config: dict) -> list[dict]:
    """The same of a whole config, and what `method.first` learns from before."""
    first = config["method"].get("first")
    return [*data_sets(config["data"]), *([first["data"]] if first else [])]


def has_pairs(data: dict) -> bool:
    """Whether each row has a rejected answer beside the chosen one. `data`: a section that was checked."""
    return all(Data.model_construct(**one).has_pairs for one in data_sets(data))


def _check_secrets(config: dict) -> None:
    """Refuse a login in a config, which is stored and shown. The message must not show it either."""
    uri = config["tracking"]["tracking_uri"]
    if uri is not None and has_login(uri):
        raise UserError(
            "config: 'tracking.tracking_uri' holds a login or a query (not shown here), and a config is stored and "
            "shown: write the bare address, and give the login by MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; or put the whole address into the environment "
            "variable MLFLOW_TRACKING_URI and set tracking.tracking_uri=env"
        )
    secrets = secret_variables()
    for key, value in flat(config).items() if secrets else ():
        found = [name for name, secret in secrets.items() if secret in value]
        if found:
            raise UserError(
                f"config: '{key}' holds the value of the environment variable {found[0]} (not shown here), and a "
                "config is stored and shown: leave it out; what needs the variable reads it from the environment"
            )


def _check_method(config: dict) -> None:
    """Check what the method requires of the other sections."""
    method, name = config["method"], config["method"]["name"]
    refuse_without_pairs(config["eval"], has_pairs(config["data"]))
    for data in data_sets(config["data"]):
        _check_rows_of_method(method, Data.model_construct(**data))
    if name == "sft":
        if method["first"]:
            _check_first("first", documents_config(config))
        return
    if config["prompt"]["loss_on"] == "all" and name != "orpo" and not method["sft"]:
        raise UserError(
            f"config: 'prompt.loss_on': all is for method=sft and orpo; method={name} compares answers: leave it out"
        )
    if config["train"].get("label_smoothing_factor"):
        instead = "; see method.label_smoothing" if name == "dpo" else ": leave it out"
        raise UserError(f"config: 'train.label_smoothing_factor' is for method=sft{instead}")
    if method["sft"]:
        _check_first("sft", sft_config(config))


def _check_first(key: str, first: dict) -> None:
    """Check the config of a training that comes before."""
    try:
        check_library_sections(first["train"], first["adapter"], "sft")
        best.check(first["train"], first["eval"])
        _check_validation(first)
        _check_documents(first)
    except UserError as error:
        raise UserError(f"config: 'method.{key}': {str(error).removeprefix('config: ')}") from None


def _check_rows_of_method(method: dict, data: Data) -> None:
    """Refuse rows that the method cannot learn from, or would learn the wrong thing from."""
    name = method["name"]
    if issubclass(METHODS[name], OfPairs) and not data.has_pairs and not method["own_answers"]:
        instead = "; single answers with a label are for method=kto" if data.has_labels else ""
        raise UserError(
            f"config: method={name} needs preference pairs: choose data.layout=preference, or say what the rejected "
            "answer is with data.rejected (layout template), data.rejected_from (a list of labels) or "
            f"method.own_answers{instead}"
        )
    if name == "kto" and not data.has_pairs and not data.has_labels:
        raise UserError(
            "config: method=kto needs to know which answers are desirable: choose data.layout=unpaired_preference, or "
            "set data.label (layout template); or give pairs (data.layout=preference, data.rejected or "
            "data.rejected_from), of which it takes both answers"
        )
    if data.has_labels and (name == "sft" or method.get("sft") or method.get("own_answers")):
        what = f"method={name}" if name == "sft" else "'method.sft'" if method.get("sft") else "'method.own_answers'"
        raise UserError(
            f"config: {what} would learn the undesirable answers as well: give it the desirable ones alone, with "
            "data.where and a layout without labels (prompt_completion; or no data.label), or choose method=kto"
        )


def sft_config(config: dict) -> dict:
    """The config of the fine-tuning in `method.sft`: this config with its changes."""
    return {**config, "method": {"name": "sft"}, **_trained_first(config, config["method"]["sft"])}


def _trained_first(config: dict, first: dict) -> dict:
    """The sections `train` and `adapter` of a training that comes before."""
    adapter = first["adapter"] if "peft_type" in first["adapter"] else {**config["adapter"], **first["adapter"]}
    return {"train": {**config["train"], **first["train"]}, "adapter": adapter}


def documents_config(config: dict) -> dict:
    """The config of the training on documents in `method.first`: this config with its changes."""
    first = config["method"]["first"]
    tokenize = checked(Tokenize, {**config["tokenize"], **first["tokenize"]}, "method.first.tokenize").model_dump()
    return {
        **config,
        "method": {"name": "sft"},
        "data": first["data"],
        "prompt": {**config["prompt"], "system": None},
        "tokenize": tokenize,
        "eval": Eval(task="documents", split=config["eval"]["split"], batch_size=8).model_dump(),
        **_trained_first(config, first),
    }


def _has_no_validation(data: dict) -> bool:
    return all(one["splits"]["validation"] == 0 for one in data_sets(data))


def _check_validation(config: dict) -> None:
    if _has_no_validation(config["data"]):
        refuse_without_validation(config["train"])


def _check_documents(config: dict) -> None:
    """Refuse what is not for raw text, or is for raw text alone."""
    layouts = {data["layout"] for data in data_sets(config["data"])}
    if TEXT not in layouts:
        if config["eval"]["task"] == DOCUMENTS:
            raise UserError(
                "config: 'eval.task': documents is for raw text (data.layout=text), and these rows have answers: "
                "choose another, such as eval=text"
            )
        return
    if len(layouts) > 1:
        raise UserError(
            "config: 'data.mix': documents (layout text) and rows with answers do not mix: to learn from both, train "
            "on the documents first (method.first={data: ...})"
        )
    if config["eval"]["task"] != DOCUMENTS:
        raise UserError(
            f"config: 'eval.task': {config['eval']['task']} judges answers, and documents (data.layout=text) have "
            "none: set eval=documents"
        )
    if config["method"]["name"] != "sft":
        raise UserError(
            f"config: method={config['method']['name']} compares answers, and documents (data.layout=text) have none: "
            "set method=sft"
        )
    for name, wanted in (("system", None), ("loss_on", "assistant")):
        if config["prompt"][name] != wanted:
            raise UserError(
                f"config: 'prompt.{name}' is for messages, and documents (data.layout=text) have none: set it to "
                f"{'null' if wanted is None else wanted}"
            )


def _check_together(config: dict) -> None:
    """Refuse sections that do not go together."""
    _check_validation(config)
    _check_documents(config)
    if _has_no_validation(config["data"]) and config["eval"]["split"] == "validation":
        raise UserError(
            "config: 'data.splits.validation': 0 leaves no rows to choose a run by: raise it, or rank the runs by the "
            "test split itself (eval.split=test), which flatters the best one"
        )
    quantized = config["quantization"]["load_in_4bit"] or config["quantization"]["load_in_8bit"]
    if quantized and config["adapter"]["peft_type"] is None:
        raise UserError("config: a quantized base cannot be trained itself: set adapter=qlora, or quantization=none")
    gate = config["eval"]["gate"]
    if gate and gate["forgetting"] is not None and config["probe"]["source"] is None:
        raise UserError(
            "config: 'eval.gate.forgetting': is a bound on what is not measured: choose a text (probe=editorials, or "
            "one of your own with probe.source), or leave the bound out"
        )
    if config["merge"]["dequantized_base"] and not quantized:
        raise UserError(
            "config: 'merge.dequantized_base' is for a quantized base: set quantization=4bit, or leave it out"
        )


def _normalised(config: dict) -> dict:
    """The config in the form that its sections' classes accept."""
    train = config.get("train")
    if isinstance(train, dict) and "warmup_ratio" in train:  # in transformers 5 it is warmup_steps below 1
        ratio = train.pop("warmup_ratio")
        if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UserError(f"config: 'train.warmup_ratio' must be from 0 to below 1 (found {ratio!r})")
        train["warmup_steps"] = ratio
    return _without_other_kinds(config)


def _without_other_kinds(config: dict) -> dict:
    """Keep only the keys of a source that its kind has.

    ``data.source.kind=files data.source.path=x`` over a hub source leaves ``repository`` behind, which is not the
    user's fault. A key that no kind has stays, and is refused.
    """
    for name in ("data", "model", "probe"):
        section = config.get(name)
        source = section.get("source") if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(source, dict):
            section["source"] = _of_its_kind(source, name)
    return config


def _of_its_kind(source: dict, section: str) -> dict:
    per_split = {*source} & {*SplitSources.model_fields}
    if section == "data" and per_split and "kind" in source:
        raise UserError(
            f"config: 'data.source' has both 'kind', as one source has, and '{sorted(per_split)[0]}', as a source for "
            "each split has: leave one out (~data.source.kind)"
        )
    if section == "data" and per_split:
        return {key: _of_its_kind(value, "") if isinstance(value, dict) else value for key, value in source.items()}
    if source.get("kind") not in SOURCE_KINDS:
        return source
    known_anywhere = set().union(*(set(kind.model_fields) for kind in SOURCE_KINDS.values()))
    mine = SOURCE_KINDS[source["kind"]].model_fields
    return {key: value for key, value in source.items() if key in mine or key not in known_anywhere}


def checked(model, values: dict, prefix: str):
    """The values as an object of this class.

    Raises:
        UserError: they do not fit it; the message is the first error.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, model, prefix)) from None


def explain(error, model, prefix: str = "") -> str:
    """Pydantic's first error in one line: key, value found, what is allowed."""
    faults = error.errors(include_url=False)
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown or faults)[0]  # a misspelt key explains why another is missing
    path = [str(part) for part in _without_tags(fault["loc"])]
    key = ".".join([prefix, *path] if prefix else path)
    if alone := [fault["loc"][-1] for fault in unknown if _of_one_data_set(fault["loc"])]:
        return _not_of_mixtures(alone)
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        return f"config: unknown key '{key}'; {suggest(path[-1], known)}"
    if fault["type"] == "missing":
        return f"config: '{key}' is missing; add it to the YAML file or as an override {key}=..."
    if fault["type"] == "union_tag_not_found":
        each = ", or a source for each split: {train: ..., test: ...}" if key == "data.source" else ""
        return f"config: '{key}' has no 'kind': it is one of {', '.join(SOURCE_KINDS)}{each}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:2] != message[:2].upper() else message
    found = fault["input"]
    of_another_type = fault["type"].endswith("_type")  # otherwise it is a whole section, and the message names the part
    if isinstance(found, dict) and not of_another_type:
        return f"config: '{key}': {message}"
    return f"config: '{key}': {message} (found {_found(found, text_wanted=fault['type'] == 'string_type')})"


def _of_one_data_set(location) -> bool:
    """Whether a pydantic location is a key of a mixture that only a data set has."""
    return location[-2:-1] == ("mixed",) and location[-1] in Data.model_fields


def _not_of_mixtures(keys: list[str]) -> str:
    them, are = ("it", "is") if len(keys) == 1 else ("them", "are")
    limit = " (of limit, its part in data.mix may: {data: ..., limit: 500})" if "limit" in keys else ""
    named = " and ".join(f"'data.{key}'" for key in keys)
    return (
        f"config: {named} {are} of one data set, and this is a mixture: the file of each data set says {them}{limit}; "
        f"leave {them} out here ({' '.join(f'~data.{key}' for key in keys)})"
    )


def _without_tags(location) -> list:
    """A pydantic location without the tags of unions (``source.hub``, ``method.dpo``), which are not config keys."""
    before = [None, *location]
    return [part for last, part in zip(before, location, strict=False) if part not in UNIONS.get(last, ())]


def _fields_at(model, location) -> list[str]:
    """Field names of the section at a pydantic error location."""
    for last, part in zip([None, *location], location, strict=False):
        if part in UNIONS.get(last, ()):
            model = UNIONS[last][part] or model
        elif not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            if hasattr(annotation, "model_fields"):
                model = annotation
            elif part in ("published", "metrics", "sft", "first", "own_answers", "gate", "mix", "limit"):
                model = annotation.__args__[0]  # list[Published], SftFirst | None, ...
    return list(model.model_fields)
