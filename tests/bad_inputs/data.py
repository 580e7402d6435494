"""Raw data that cannot be read, or not without guessing."""

from tests.bad_inputs import Bad, World

QA = ["experiment=smoke", "sweep=none", "tracking=none", "data.layout=question_answer", "data.prompt=null"]
QA += ["data.completion=null", "data.csv={}", "data.format=null"]


def _rows(name: str, says: str, content: str | bytes, *overrides: str, file: str = "rows.jsonl") -> Bad:
    def arguments(world: World) -> list[str]:
        world.write(file, content)
        return ["--raw", file, "--output", "prompts", *QA, *overrides]

    return Bad(name, says, "format_prompts", arguments)


CASES = [
    _rows("no JSON", r"rows\.jsonl:1: ", "{"),
    _rows("not UTF-8", r"rows\.jsonl", b'{"question": "\xff", "answer": "a"}\n'),
    _rows("empty file", r"rows\.jsonl", ""),
]
