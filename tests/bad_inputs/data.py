"""Raw data that cannot be read, or not without guessing."""

import gzip
import io
import json
import os

from tests.bad_inputs import Bad, World

QA = ["experiment=smoke", "sweep=none", "tracking=none", "data.layout=question_answer", "data.prompt=null"]
QA += ["data.completion=null", "~data.csv", "data.format=null"]
LINE = '{"question": "a", "answer": "b"}\n'
DEEP = "[" * 100_000


def _rows(name: str, says: str, content: str | bytes, *overrides: str, file: str = "rows.jsonl") -> Bad:
    def arguments(world: World) -> list[str]:
        world.write(file, content)
        return ["--raw", file, "--output", "prompts", *QA, *overrides]

    return Bad(name, says, "format_prompts", arguments)


def _csv(name: str, says: str, content: str | bytes, *overrides: str) -> Bad:
    return _rows(f"csv: {name}", says, content, *overrides, file="rows.csv")


def _json(name: str, says: str, content: str | bytes, *overrides: str) -> Bad:
    return _rows(f"json: {name}", says, content, *overrides, file="rows.json")


def _gzip(name: str, says: str, content: bytes) -> Bad:
    return _rows(f"gzip: {name}", says, content, file="rows.jsonl.gz")


def _parquet(name: str, says: str, table, damage=lambda content: content, *overrides: str) -> Bad:
    """`table` makes a pyarrow table; `damage` changes the bytes of its file."""

    def arguments(world: World) -> list[str]:
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(table(), buffer)
        world.write("rows.parquet", damage(buffer.getvalue()))
        return ["--raw", "rows.parquet", "--output", "prompts", *QA, *overrides]

    return Bad(f"parquet: {name}", says, "format_prompts", arguments)


def _answer(name: str, says: str, answer, *overrides: str) -> Bad:
    row = {"question": "a", "answer": answer}
    return _rows(name, rf"rows\.jsonl:2: .*{says}", LINE + json.dumps(row) + "\n", *overrides)


def _template(name: str, says: str, completion: str, answer="b", where: str | None = None) -> Bad:
    free = ["data.layout=template", "data.prompt=q", f'data.completion="{completion}"']
    free += [f'data.where="{where}"'] if where else []
    return _rows(f"template: {name}", says, json.dumps({"answer": answer}) + "\n", *free)


def _messages(name: str, says: str, messages, *overrides: str) -> Bad:
    row = {"messages": messages} if not isinstance(messages, dict) else messages
    return _rows(f"messages: {name}", says, json.dumps(row) + "\n", "data.layout=messages", *overrides)


def _special(name: str, says: str, make) -> Bad:
    """`make(path)` makes something that is not a file."""

    def arguments(world: World) -> list[str]:
        make(world.folder / "rows.jsonl")
        return ["--raw", "rows.jsonl", "--output", "prompts", *QA]

    return Bad(name, says, "format_prompts", arguments)


def _plain():
    import pyarrow

    return pyarrow.table({"question": ["a"] * 50, "answer": ["b"] * 50})


def _bytes_as_text():
    import pyarrow

    texts = pyarrow.array([b"\xff\xfe"] * 3, pyarrow.binary()).view(pyarrow.string())
    return pyarrow.table({"question": texts, "answer": texts})


def _twice():
    import pyarrow

    return pyarrow.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])


def _far_day():
    import pyarrow

    days = pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    return pyarrow.table({"question": ["a"], "answer": ["b"], "day": days})


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

CASES = [
    _rows("no JSON", r"rows\.jsonl:1: ", "{"),
    _rows("not UTF-8", r"rows\.jsonl:1: byte 0xff at column 15 is not UTF-8", b'{"question": "\xff", "answer": "a"}\n'),
    _rows("empty file", r"rows\.jsonl: no rows", ""),
    _rows("blank lines alone", r"rows\.jsonl: no rows", "\n\n \n"),
    _rows("a row that is a list", r"rows\.jsonl:2: expected an object with columns, found a list", LINE + "[1]\n"),
    _rows("a row that is null", r"rows\.jsonl:1: expected an object with columns, found null", "null\n"),
    _rows("two objects in a line", r"rows\.jsonl:1: no valid JSON: extra data", LINE.strip() + LINE),
    _rows("nesting", r"rows\.jsonl:2: nested too deeply", LINE + '{"a": ' + DEEP + "\n"),
    _rows("a number of 10,000 digits", r"rows\.jsonl:2: .*digits", LINE + '{"a": ' + "9" * 10_000 + "}\n"),
    _rows("a key twice", r"rows\.jsonl:2: has 'answer' twice", LINE + '{"answer": "a", "answer": "b"}\n'),
    _rows("a key twice within", r"rows\.jsonl:1: has 'k' twice", '{"question": {"k": 1, "k": 2}, "answer": "b"}\n'),
    _rows("half a character", r"rows\.jsonl:1: .*half a character \(\\ud83d\)", LINE.replace('"b"', r'"\ud83d"')),
    _rows("no such column", r"rows\.jsonl:1: no column 'question'; there are text", '{"text": "a", "answer": "b"}\n'),
    _rows("a column that steers the terminal", r"there are \\x1b\[31m, answer", '{"\\u001b[31m": 1, "answer": "b"}\n'),
    _rows("an ending that tells nothing", r"rows\.dat: cannot tell the format", LINE, file="rows.dat"),
    _rows("data.field of lines", r"rows\.jsonl: data\.field=data is for json files", LINE, "data.field=data"),
    _json("of lines", r"one object a line is data\.format=jsonl", LINE + LINE),
    _json("cut off", r"rows\.json:1: no valid JSON: expecting ',' or ']'", "[" + LINE.strip()),
    _json("two arrays", r"rows\.json:1: no valid JSON: extra data after the array", "[][]"),
    _json("a comma at the end", r"rows\.json:1: no valid JSON", f"[{LINE.strip()},]"),
    _json("one object", r"rows\.json: expecting an array .*found one object: put brackets around it", LINE),
    _json("a text", r"rows\.json: expecting an array of objects.*, found text", '"a"'),
    _json("a number", r"rows\.json: expecting an array of objects.*, found a number", "7"),
    _json("a page", r"is it json at all", "<html></html>"),
    _json("rows in a field", r"one object; if its rows are in 'data': data\.field='data'", '{"data": [' + LINE + "]}"),
    _json("a field that is none", r"has no list 'other', which data\.field names", "{}", "data.field=other"),
    _json("a bad row in a field", r"rows\.json, row 2: no column", '{"d": [' + LINE + ',{"a": 1}]}', "data.field=d"),
    _json("nesting", r"rows\.json:1: nested too deeply", DEEP),
    _csv("semicolons", r"rows\.csv:1: the header is one column.*delimiter=';'", "question;answer\na;b\n"),
    _csv("too few fields", r"rows\.csv:3: 1 fields, expected 2", "question,answer\na,b\na\n"),
    _csv("too many fields", r"rows\.csv:2: 3 fields, expected 2", "question,answer\na,b,c\n"),
    _csv("a column twice", r"rows\.csv:1: the header has column 'answer' twice", "question,answer,answer\na,b,c\n"),
    _csv("a quote left open", r"rows\.csv:2: no valid csv", 'question,answer\na,"b\n'),
    _csv("a header in between", r"rows\.csv:3: is a header", "question,answer\na,b\nquestion,answer\n"),
    _csv("a header alone", r"rows\.csv: no rows", "question,answer\n"),
    _csv("UTF-16 that is cut off", r"rows\.csv: is no utf-16-le after", "question,answer\na,b".encode("utf-16")[:-1]),
    _csv("UTF-16 without mark", r"data\.encoding=utf-16-le", "question,answer\na,b\n".encode("utf-16-le")),
    _csv("Windows", r"rows\.csv:2: byte 0x93 .*data\.encoding=cp1252", b"question,answer\na,\x93b\x94\n"),
    _csv("old Mac", r"rows\.csv:1: no valid csv", "question,answer\ra,b\r"),
    _csv(
        "False in where", r"asks whether the text 'False' is true", "question,answer,ok\na,b,False\n", "data.where=ok"
    ),
    _csv("0.0 in where", r"asks whether the text '0\.0' is true", "question,answer,ok\na,b,0.0\n", "data.where=ok"),
    _gzip("none", r"rows\.jsonl\.gz:1: no valid gzip file", LINE.encode()),
    _gzip("cut off", r"no valid gzip file: Compressed file ended", gzip.compress(LINE.encode() * 9)[:-10]),
    _gzip("damaged", r"no valid gzip file", gzip.compress(LINE.encode() * 9)[:20] + b"\xff" * 30),
    _parquet("none", r"rows\.parquet: cannot be read", _plain, lambda _content: b"PAR1 and more"),
    _parquet("cut off", r"rows\.parquet: cannot be read", _plain, lambda content: content[: len(content) // 2]),
    _parquet(
        "damaged",
        r"rows\.parquet: cannot be read",
        _plain,
        lambda content: content[:-60] + b"\xff" * 50 + content[-10:],
    ),
    _parquet("no UTF-8", r"rows\.parquet: cannot be read.*utf-8", _bytes_as_text),
    _parquet("a column twice", r"rows\.parquet: has column 'answer' twice", _twice),
    _parquet("a day out of range", r"rows\.parquet: cannot be read", _far_day),
    _special("a pipe", r"rows\.jsonl: is neither a file nor a folder \(a pipe", os.mkfifo),
    _special("a device", r"rows\.jsonl: is neither a file nor a folder", lambda path: path.symlink_to("/dev/zero")),
    _special("a link to nothing", r"rows\.jsonl: ", lambda path: path.symlink_to("nothing")),
    _special("a link to itself", r"rows\.jsonl: ", lambda path: path.symlink_to("rows.jsonl")),
    _special("an empty folder", r"rows\.jsonl: no data files in it", lambda path: path.mkdir()),
    _answer("null", r"column \"answer\" is empty.*data\.where", None),
    _answer("blank", r"column \"answer\" is blank.*data\.where", "  "),
    _answer("a number", r"holds 1\.0, a number, not text", 1.0),
    _answer("true", r"holds True, true or false, not text", True),
    _answer("a list", r"holds \['b'\], a list, not text", ["b"]),
    _answer(
        "nan", r"column \"answer\" is nan; leave such rows out: set data\.where to \"answer == answer\"", float("nan")
    ),
    _template("null", r"rows\.jsonl:1: .*column 'answer': null is a missing value", "{{ answer }}", None),
    _template("null by %", r"null is a missing value, not text", "{{ '%s' % answer }}", None),
    _template("null by format", r"null is a missing value, not text", "{{ '{}'.format(answer) }}", None),
    _rows(
        "csv options of json lines",
        r"rows\.jsonl: data\.csv\.delimiter=';' .*this is jsonl",
        LINE,
        "data.csv.delimiter=';'",
    ),
    _rows(
        "a column that no template uses",
        r"'data\.columns\.q': no template uses it; .*answer",
        LINE,
        "data.layout=template",
        "data.prompt=a",
        "data.completion='{{ answer }}'",
        "data.columns={q: question}",
    ),
    _template("chance", r"'random' gives another text each time", "{{ [1, 2] | random }}"),
    _template("lorem ipsum", r"'lipsum' gives another text each time", "{{ lipsum() }}"),
    _template("a column that is not there", r"'other' is undefined \(columns: answer\)", "{{ other }}"),
    _template("a power", r"takes more than 1 s of computing", "{{ answer ** (answer ** answer) }}", 9),
    _template("where with a power", r"takes more than 1 s of computing", "a", 9, "answer ** (answer ** answer) > 1"),
    _template("where nested deeply", r"nested too deeply", "a", where="not " * 3000 + "1"),
    _template("an attribute of Python's", r"rows\.jsonl:1: .*unsafe", "{{ answer.__class__.__mro__ }}"),
    _template("nothing", r"gives an empty text", "{{ answer | default('', true) }}", None),
    _messages("weight 0 alone", r"no turn of the assistant's is to be learned", [ASK, {**ANSWER, "weight": 0}]),
    _messages("weight 0.5", r"'weight' is 0\.5; a turn is learned", [ASK, {**ANSWER, "weight": 0.5}]),
    _messages("a refusal", r"'refusal' .*data\.ignore_fields=\[refusal\]", [ASK, {**ANSWER, "refusal": "No."}]),
    _messages("tool calls", r"needs a function with name and arg", [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]),
    _messages("thoughts of a user", r"only the assistant's may have it", [{**ASK, "reasoning_content": "Hm."}, ANSWER]),
    _messages("tools beside", r"'tools' holds", {"messages": [ASK, ANSWER], "tools": ["f"]}),
    _messages("a system column beside", r"'system' ", {"messages": [ASK, ANSWER], "system": "Be kind."}),
    _messages(
        "a role that is a list", r"messages\[0\]: role \['user'\] is not known", [{**ASK, "role": ["user"]}, ANSWER]
    ),
    _messages("two contents", r"'content' and 'value', which differ", [{**ASK, "value": "c"}, ANSWER]),
    _messages("no answer", r"ends with the user's message", [ASK]),
    _messages("none", r"holds \[\], not a list of messages", []),
]
