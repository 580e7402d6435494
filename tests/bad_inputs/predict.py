"""Files of prompts that cannot be answered, or whose answers could not be written: known before the model is loaded."""

import datetime
import io
import json

from tests.bad_inputs import Bad, World
from tests.bad_inputs.results import RUN


def _prompts(name: str, says: str, content, file: str = "in.jsonl", output: str = "out.jsonl") -> Bad:
    """`content`: text or bytes, or a function that makes them."""

    def arguments(world: World) -> list[str]:
        (world.folder / "results").symlink_to(world.project / "results")
        if file != "in":
            world.write(file, content() if callable(content) else content)
        return ["--run", RUN, "--input", file, "--output", output]

    return Bad(name, says, "predict", arguments)


def _row(name: str, says: str, **row) -> Bad:
    return _prompts(name, rf"in\.jsonl:2: .*{says}", '{"prompt": "a"}\n' + json.dumps(row) + "\n")


def _parquet(name: str, says: str, **columns: list) -> Bad:
    def content() -> bytes:
        import pyarrow
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({"prompt": ["a"], **columns}), buffer)
        return buffer.getvalue()

    return _prompts(name, says, content, "in.parquet")


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

CASES = [
    _row("half a character in another column", r"half a character \(\\ud83d\)", prompt="a", note="\ud83d"),
    _row("half a character in the prompt", r"half a character \(\\ud83d\)", prompt="\ud83d"),
    _row("half a character in a column's name", r"half a character", **{"prompt": "a", "\ud83d": 1}),
    _row("NaN in another column", r"column 'score' holds nan", prompt="a", score=float("nan")),
    _row(
        "an infinity in another column",
        r"column 'score' holds \{'all': \[-inf\]\}",
        prompt="a",
        score={"all": [-1e999]},
    ),
    _prompts("a number beyond all", r"in\.jsonl:1: column 'score' holds inf", '{"prompt": "a", "score": 1e999}\n'),
    _parquet("bytes in another column", r"in\.parquet, row 1: column 'image' holds b'\\xff'", image=[b"\xff"]),
    _parquet("a span of time", r"in\.parquet, row 1: column 'took' holds ", took=[datetime.timedelta(1)]),
    _row("a column prediction", r"a column 'prediction' already", prompt="a", prediction="mine"),
    _row("a column finished", r"a column 'finished' already", prompt="a", finished=True),
    _row("no column", r"no column 'prompt' or 'messages'; there are text", text="a"),
    _row("a number", r"column 'prompt' holds 7", prompt=7),
    _row("null", r"column 'prompt' holds None", prompt=None),
    _row("an empty message", r"messages\[0\]: the user's message is empty", messages=[{**ASK, "content": " "}]),
    _row("no question", r"ends with the assistant's message", messages=[ASK, ANSWER]),
    _row("an unknown role", r"role 'bot'", messages=[{**ASK, "role": "bot"}]),
    _row("a role that is a list", r"role \['user'\]", messages=[{**ASK, "role": ["user"]}]),
    _row("tools", r"does not show tools: leave out the column 'tools'", messages=[ASK], tools=[{"name": "f"}]),
    _row(
        "tool calls",
        r"'tool_calls' in the user's message; only the assistant's may have it",
        messages=[{**ASK, "tool_calls": [1]}],
    ),
    _prompts("a key twice", r"in\.jsonl:1: has 'prompt' twice", '{"prompt": "a", "prompt": "b"}\n'),
    _prompts("no JSON", r"in\.jsonl:2: no valid JSON", '{"prompt": "a"}\n{\n'),
    _prompts("no UTF-8", r"in\.txt:2: no UTF-8", b"a\n\xff\n", "in.txt"),
    _prompts("UTF-16", r"in\.txt:1: .*iconv -f utf-16le", "How is it?\n".encode("utf-16-le"), "in.txt"),
    _prompts("nothing", r"--input in\.txt: there is no prompt in it", "\n\n", "in.txt"),
    _prompts("no file", r"--input in: no such file", "", "in"),
    _prompts("an ending that tells nothing", r"in\.xml", "<a>", "in.xml"),
    _prompts("no parquet", r"in\.parquet: cannot be read", b"PAR1", "in.parquet"),
    _prompts("semicolons", r"in\.csv:1: the header is one column", "prompt;id\na;1\n", "in.csv"),
    _prompts("output that is there", r"--output in\.jsonl: is there already", '{"prompt": "a"}\n', output="in.jsonl"),
    _prompts("output nowhere", r"there is no folder nowhere", '{"prompt": "a"}\n', output="nowhere/out.jsonl"),
    _prompts("output of another kind", r"JSON lines", '{"prompt": "a"}\n', output="out.csv"),
]
