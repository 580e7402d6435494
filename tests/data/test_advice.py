"""What messages about data propose works: each is followed to the letter, as in a shell, and gives the right rows."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from steps import format_prompts
from temper.config.compose import hydra_text, parse_overrides, split_overrides
from temper.data import splitting

COUNT = 12
ROWS = [(f"How is „{index}“?", f"Fine – {index}") for index in range(COUNT)]
QA = ["experiment=smoke", "sweep=none", "tracking=none", "data.layout=question_answer", "data.prompt=null"]
QA += ["data.completion=null", "data.format=null", "data.csv.delimiter=','", "data.csv.quotechar='\"'"]
QA += ["data.csv.fieldnames=null", "data.splits={validation: 0, test: 0.5}", "eval.split=test"]
FREE = ["data.layout=template", "data.prompt='{{ question }}'", "data.completion='{{ answer }}'"]


def _table(delimiter: str = ",", rows=ROWS, quote: str = '""') -> str:
    lines = [delimiter.join(("question", "answer"))]
    lines += [delimiter.join('"' + text.replace('"', quote) + '"' for text in row) for row in rows]
    return "\r\n".join(lines) + "\r\n"


def _objects(*more, **columns) -> list[dict]:
    """All rows as objects, in which `columns` are other, and one more for each of `more`."""
    objects = [{"question": question, "answer": answer, **columns} for question, answer in ROWS]
    return objects + [{"question": "Else?", "answer": "No", **other} for other in more]


def _lines(objects: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects)


# --- ways to follow a message ----------------------------------------------------------------------


def override(message: str, _file: Path) -> list[str]:
    """The override that it writes out, as a shell reads it: alone, and within the quotes of ``overrides="..."``."""
    written = re.search(r"\"?(data\.[a-z_.]+=(?:'.*?'|\".*?\"|\[.*?\]|[^ ,;)\"]+))\"?", message)
    alone, within = shlex.split(written[0]), shlex.split(f'"{written[1]}"')
    assert _value(split_overrides(*within)) == _value(alone)
    return alone


def _value(overrides: list[str]):
    [made] = parse_overrides(overrides).values
    return made.key_or_group, str(made.value())


def without(message: str, _file: Path) -> list[str]:
    """The option without which it works."""
    return [re.search(r"leave (data\.\S+) out", message)[1] + "=null"]


def where(message: str, _file: Path) -> list[str]:
    """The condition that it writes out, as it stands in a YAML file."""
    return ["data.where=" + hydra_text(re.search(r'set data\.where to "(.*?)"', message)[1])]


def completion(message: str, _file: Path) -> list[str]:
    """The template that it writes out, for the answer."""
    assert "data.layout=template" in message
    return [*FREE[:2], f'data.completion="{re.findall(r"{{.*?}}", message)[-1]}"']


def completion_first(message: str, _file: Path) -> list[str]:
    """The first of the templates that it writes out."""
    return [*FREE[:2], f'data.completion="{re.findall(r"{{.*?}}", message)[0]}"']


def skip(message: str, file: Path) -> list[str]:
    """Its second proposal, and the share of such rows, which is over the default here."""
    return [*override(message, file), "data.max_bad_share=0.5"]


def deepest(message: str, _file: Path) -> list[str]:
    """The innermost field but one that it names: the questions, not their answers."""
    return ["data.field=" + re.findall(r"'(data[a-z.]*)'", message)[-2]]


def brackets(message: str, file: Path) -> list[str]:
    assert "put a comma between them, and brackets around all" in message
    file.write_text("[" + file.read_text(encoding="utf-8").replace("}\n{", "},\n{") + "]", encoding="utf-8")
    return []


def pandas(message: str, file: Path) -> list[str]:
    import pandas

    assert "pandas: to_json(path, orient='records')" in message
    pandas.read_json(file).to_json(file, orient="records")
    return []


def without_line(message: str, file: Path) -> list[str]:
    number = int(re.search(r"rows\.csv:(\d+): .*remove it", message)[1])
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(lines[: number - 1] + lines[number:]), encoding="utf-8")
    return []


def names(message: str, _file: Path) -> list[str]:
    return [re.search(r"data\.csv\.fieldnames=", message)[0] + "[question,answer]"]


def jsonl(message: str, _file: Path) -> list[str]:
    return ["data.format=" + re.search(r"set data\.format to json, (jsonl)", message)[1]]


MESSAGES = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ROWS]
REFUSED = {"messages": [*MESSAGES[0]["messages"][:1], {"role": "assistant", "content": "?", "refusal": "No."}]}
QUOTED = [(f'Say "{index}", please', "Fine") for index in range(COUNT)]
YES = [(f'"Yes" {index}', "Fine") for index in range(COUNT)]
NUMBERS = [{"question": q, "answer": index} for index, (q, _) in enumerate(ROWS)]
COLUMNS = {"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]}
INDEXED = {name: dict(enumerate(column)) for name, column in COLUMNS.items()}
ALONE = "\n".join(json.dumps(row, indent=1) for row in _objects())
WINDOWS = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _objects()).encode("cp1252")
UTF8_BUT_ONE = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _objects()).encode() + b'{"a": "\xe9"}\n'
ESCAPED = "question,answer\n" + "".join(f"{q},{a}\\, {a}\n" for q, a in ROWS)
SQUAD_ROWS = [{**row, "answers": [{"text": row["answer"]}]} for row in _objects()]
SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": SQUAD_ROWS}]}]}
# name -> file, content, way to follow, right rows, overrides
CASES: dict[str, tuple[str, str | bytes, Callable, list[tuple[str, str]], list[str]]] = {
    "semicolons": ("rows.csv", _table(";"), override, ROWS, []),
    "tabs": ("rows.csv", _table("\t"), override, ROWS, []),
    "pipes": ("rows.csv", _table("|"), override, ROWS, []),
    "Windows": ("rows.csv", _table().encode("cp1252"), override, ROWS, []),
    "Windows, jsonl": ("rows.jsonl", WINDOWS, override, ROWS, []),
    "UTF-16 without mark": ("rows.csv", _table().encode("utf-16-le"), override, ROWS, []),
    "UTF-16 without mark, big endian": ("rows.csv", _table().encode("utf-16-be"), override, ROWS, []),
    "UTF-16 by name, without mark": (
        "rows.csv",
        _table().encode("utf-16-le"),
        override,
        ROWS,
        ["data.encoding=utf-16"],
    ),
    "nan in a layout": ("rows.jsonl", _lines(_objects({"answer": float("nan")})), where, ROWS, []),
    "escaped delimiters": ("rows.csv", ESCAPED, override, [(q, f"{a}, {a}") for q, a in ROWS], []),
    "one line that is not UTF-8": ("rows.jsonl", UTF8_BUT_ONE, skip, ROWS, []),
    "SQuAD": (
        "rows.json",
        json.dumps(SQUAD),
        deepest,
        [(f"{q} in c", a) for q, a in ROWS],
        ["data.layout=template", "data.prompt='{{ question }} in {{ context }}'", *FREE[2:]],
    ),
    "SQuAD's answers": (
        "rows.jsonl",
        _lines(_objects(answer={"text": ["a", "b"], "answer_start": [1, 2]})),
        completion_first,
        [(q, "a") for q, _ in ROWS],
        [],
    ),
    "a list of objects": (
        "rows.jsonl",
        _lines(_objects(answer=[{"a": 1}])),
        completion,
        [(q, '[{"a": 1}]') for q, _ in ROWS],
        [],
    ),
    "backslashes before quotes": ("rows.csv", _table(rows=QUOTED, quote='\\"'), override, QUOTED, []),
    "quotes that are text": (
        "rows.csv",
        "question,answer\n" + "".join(f"{q},{a}\n" for q, a in YES),
        override,
        YES,
        [],
    ),
    "fieldnames and a header": ("rows.csv", _table(), without, ROWS, ["data.csv.fieldnames=[question,answer]"]),
    "a header in between": ("rows.csv", _table() + _table(rows=[]), without_line, ROWS, []),
    "no header, two columns alike": (
        "rows.csv",
        "a,a\n" + "".join(f"q{index},a\n" for index in range(COUNT)),
        names,
        [("a", "a"), *((f"q{index}", "a") for index in range(COUNT))],
        [],
    ),
    "no header": ("rows.csv", _table().split("\r\n", 1)[1], names, ROWS, []),
    "no header, in a template": ("rows.csv", _table().split("\r\n", 1)[1], names, ROWS, FREE),
    "rows in a field": ("rows.json", json.dumps({"n": 1, "data": _objects()}), override, ROWS, []),
    "rows in a field with a blank": ("rows.json", json.dumps({"n": [1], "my data": _objects()}), override, ROWS, []),
    "lines called json": ("rows.json", _lines(_objects()), override, ROWS, []),
    "objects one after another": ("rows.json", ALONE, brackets, ROWS, []),
    "lists of columns": ("rows.json", json.dumps(COLUMNS), pandas, ROWS, []),
    "columns, as pandas writes them": ("rows.json", json.dumps(INDEXED), pandas, ROWS, []),
    "a format that the ending does not tell": ("rows.dat", _lines(_objects()), jsonl, ROWS, []),
    "an answer that is null": ("rows.jsonl", _lines(_objects({"answer": None})), where, ROWS, []),
    "an answer that is blank": ("rows.jsonl", _lines(_objects({"answer": " "})), where, ROWS, []),
    "null in a template": ("rows.jsonl", _lines(_objects({"answer": None})), where, ROWS, FREE),
    "nan in a template": ("rows.jsonl", _lines(_objects({"answer": float("nan")})), where, ROWS, FREE),
    "infinity in a template": (
        "rows.jsonl",
        _lines(NUMBERS) + '{"question": "Else?", "answer": 1e999}\n',
        where,
        [(row["question"], str(row["answer"])) for row in NUMBERS],
        FREE,
    ),
    "a number": ("rows.jsonl", _lines(_objects(answer=7)), completion, [(q, "7") for q, _ in ROWS], []),
    "true": ("rows.jsonl", _lines(_objects(answer=True)), completion, [(q, "true") for q, _ in ROWS], []),
    "a list": ("rows.jsonl", _lines(_objects(answer=["a", "b"])), completion, [(q, "a, b") for q, _ in ROWS], []),
    "an object": ("rows.jsonl", _lines(_objects(answer={"a": 1})), completion, [(q, '{"a": 1}') for q, _ in ROWS], []),
    "a field of OpenAI's": (
        "rows.jsonl",
        _lines([*MESSAGES, REFUSED]),
        override,
        [*ROWS, (ROWS[0][0], "?")],
        ["data.layout=messages"],
    ),
    "no answer at the end": (
        "rows.jsonl",
        _lines([*MESSAGES, {"messages": MESSAGES[0]["messages"][:1]}]),
        where,
        ROWS,
        ["data.layout=messages"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_advice(name, tmp_path, monkeypatch, capsys):
    file, content, follow, expected, given = CASES[name]
    monkeypatch.chdir(tmp_path)
    path = Path(file)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--raw", file, *QA, *given]
    with pytest.raises(SystemExit) as ended:
        format_prompts.main([*arguments, "--output", "refused"])
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    format_prompts.main([*arguments, *follow(message, path), "--output", "prompts"])
    texts = [Path(f"prompts/{split}.jsonl").read_text(encoding="utf-8") for split in splitting.SPLITS]
    lines = [line for text in texts for line in text.split("\n") if line]
    turns = [[turn for turn in json.loads(line)["messages"] if turn["role"] != "system"] for line in lines]
    assert sorted(tuple(turn["content"] for turn in row) for row in turns) == sorted(expected), message
