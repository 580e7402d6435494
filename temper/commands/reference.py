"""Generate reference pages from the code: docs/commands.md from the parsers, docs/config.md and conf/schema.json from
the schema.

python -m temper.commands.reference
"""

import argparse
import importlib
import json
from pathlib import Path

from temper.__main__ import COMMANDS, command_parser
from temper.config.schema import Config
from temper.config.stages import STAGES
from temper.step import step_parser

ROOT = Path(__file__).parents[2]
WRITTEN = "Written by `python -m temper.commands.reference`"
CONFIG_HEAD = f"""# The config

{WRITTEN} from `temper/config/schema.py`.

Set a key in a YAML file of `conf/<section>/`, or as `section.key=value` on the command line. An unknown key is an
error. `adapter.*` are the fields of the PEFT config and `train.*` those of `transformers.TrainingArguments`;
[options.md](options.md) says which of them work. Editors complete keys from `conf/schema.json`.
"""
STAGES_HEAD = """# The stages

Snakemake runs them; each can be run by hand, too. The docstring of a step says what it reads and writes.
"""


def pages() -> dict[Path, str]:
    """File -> its expected text."""
    schema = Config.model_json_schema()
    schema |= {"additionalProperties": True, "required": []}  # a file of conf/ holds only a part, and `defaults`
    return {
        ROOT / "docs/commands.md": commands_page(),
        ROOT / "docs/config.md": config_page(),
        ROOT / "conf/schema.json": json.dumps(schema, indent=1, ensure_ascii=False) + "\n",
    }


# --- commands ------------------------------------------------------------------------------------


def commands_page() -> str:
    """The text of docs/commands.md."""
    head = f"# The commands\n\n{WRITTEN}; `temper <command> --help` says the same.\n"
    commands = [_command(f"temper {name}", text, command_parser(name)) for name, text in COMMANDS.items()]
    steps = [importlib.import_module(f"steps.{name}") for name in STAGES]
    stages = [
        _command(f"python -m steps.{step.STAGE}", (step.__doc__ or "").split("\n")[0], step_parser(step))
        for step in steps
    ]
    return "\n".join([head, *commands, STAGES_HEAD, *stages])


def _command(name: str, text: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [f"| `{_names(action)}` | {_cell(action.help or '')} |" for action in actions]
    return "\n".join([f"## `{name}`\n", f"{text}\n", "| argument | what it is |", "|---|---|", *rows, ""])


def _first_line(module) -> str:
    return (module.__doc__ or "").split("\n")[0]


def _names(action: argparse.Action) -> str:
    return ", ".join(action.option_strings) or str(action.metavar or action.dest)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# --- config --------------------------------------------------------------------------------------


def config_page() -> str:
    """The text of docs/config.md."""
    schema = Config.model_json_schema()
    parts = [CONFIG_HEAD]
    for name, field in schema["properties"].items():
        kinds = _objects(field, schema["$defs"])
        for kind in kinds:
            parts += _sections(name, kind, schema["$defs"], kinds)
    alone = {name: field for name, field in schema["properties"].items() if field.get("type") == "integer"}
    parts.append(_table("Without a section", "", "", alone, schema["$defs"]))
    return "\n".join(dict.fromkeys(parts))  # several methods have the same section in them


def _objects(field: dict, known: dict) -> list[dict]:
    """The section classes that a field may be; none for a plain value, or if its keys are those of a library."""
    if choices := field.get("oneOf") or field.get("anyOf"):
        return [kind for choice in choices for kind in _objects(choice, known)]
    named = known[field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
    return [named] if "properties" in named else []


def _sections(name: str, kind: dict, known: dict, told_of: list[dict]) -> list[str]:
    """`told_of`: classes that have a section beside this one, and need no other inside it."""
    inner = []
    for key, field in kind["properties"].items():
        kinds = [inside for inside in _objects(field, known) if inside not in told_of]
        for inside in kinds:
            inner += _sections(f"{name}.{key}", inside, known, kinds)
    said = kind.get("description", "").split("\n\n")[0]
    title = kind.get("title", "")  # that of a class is its name, unless it says otherwise
    told = kind["properties"].get("kind", kind["properties"].get("name", {})).get("const")
    told = told or (title if title.islower() else None)
    title = f"`{name}`" + (f": {told}" if told else "")
    return [_table(title, said, f"{name}.", kind["properties"], known), *inner]


def _table(title: str, said: str, prefix: str, fields: dict, known: dict) -> str:
    rows = [
        f"| `{prefix}{key}` | {_cell(_type(field, known))} | {_default(field)} | {_cell(_text(field))} |"
        for key, field in fields.items()
    ]
    head = ["| key | type | default | |", "|---|---|---|---|"]
    return "\n".join([f"## {title}\n", *([f"{said}\n"] if said else []), *head, *rows, ""])


def _type(field: dict, known: dict) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(choice, known) for choice in choices))
    if "$ref" in field:
        return _type(known[field["$ref"].rpartition("/")[2]], known)
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), known)}"
    names = {"object": "keys and values", "boolean": "true or false", "number": "number", "integer": "whole number"}
    return names.get(field.get("type", ""), "text" if field.get("type") == "string" else field.get("type", "any"))


def _default(field: dict) -> str:
    if "default" not in field:
        return ""
    return "" if isinstance(field["default"], dict) and field["default"] else f"`{json.dumps(field['default'])}`"


def _text(field: dict) -> str:
    return " ".join(field.get("description", "").split())


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
