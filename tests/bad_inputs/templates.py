"""Chat templates and prompts that loop, blow up, see the clock or dice, or hide what is learned."""

import json
import shutil

from tests.bad_inputs import Bad, World
from tests.support.tiny import CHAT_TEMPLATE

MARKS = CHAT_TEMPLATE  # a good one, to put a fault in front of
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
ANSWER = "{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}%s{% endif %}"
EXCHANGE = [("user", "How is it?"), ("assistant", "good")]


def _tokenize(
    name: str,
    says: str,
    template: str | None,
    *overrides: str,
    turns: list[tuple[str, str]] = EXCHANGE,
    rejected: str | None = None,
) -> Bad:
    """tokenize_splits on one row a split; `template` is the model's chat template, None leaves it as it is."""

    def arguments(world: World) -> list[str]:
        shutil.copytree(world.model, world.folder / "model")
        if template is not None:
            world.write("model/chat_template.jinja", template)
        record = {"id": 7, "messages": [{"role": role, "content": content} for role, content in turns]}
        if rejected is not None:
            record["rejected"] = rejected
        for split in ("train", "validation", "test"):
            world.write(f"prompts/{split}.jsonl", json.dumps(record) + "\n")
        return ["--prompts", "prompts", "--model", "model", "--output", "splits", "sweep=none", *overrides]

    return Bad(name, says, "tokenize_splits", arguments)


def _chat(name: str, says: str, fault: str) -> Bad:
    return _tokenize(name, rf"prompts/train\.jsonl: row 7: model: its chat template .*{says}", fault + MARKS)


def _free(name: str, says: str, template: str) -> Bad:
    where = r"config: 'prompt\.template'.*"
    return _tokenize(name, where + says, None, "prompt=plain", f"prompt.template={json.dumps(template)}")


def _answer(name: str, says: str, said: str) -> Bad:
    return _tokenize(name, says, MARKS.replace("{{ message['content'] }}", ANSWER.replace("%s", said)))


TURNS = [*EXCHANGE, ("user", "Really?"), ("assistant", "yes")]
NO_PROMPT_END = (
    "{% for m in messages %}{{ m.content }}<|im_end|>{% if add_generation_prompt %}A:{% endif %}{% endfor %}"
)

CASES = [
    _chat("chat template that loops", r"takes more than 1 s of computing", LOOP),
    _chat("chat template with a power", r"takes more than 1 s of computing", "{% set n = 9 %}{{ n ** (n ** n) }}"),
    _chat("chat template that grows", r"takes more than 512 MiB", "{{ 'a' * 10 ** (messages | length + 9) }}"),
    _chat(
        "chat template of megabytes",
        r"makes a text of 3,000,030 char",
        "{% for i in range(99999) %}" + "abc" * 10 + "{% endfor %}",
    ),
    _chat(
        "chat template that divides by zero", r"division by zero", "{{ 1 / (messages | length - messages | length) }}"
    ),
    _chat("chat template that overflows", r"out of range", "{{ 10.0 ** (messages | length + 400) }}"),
    _chat("chat template without end", r"calls itself without end", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    _chat("chat template with random", r"'random' gives another text", "{{ ['a', 'b'] | random }}"),
    _chat("chat template with lipsum", r"'lipsum' gives another text", "{{ lipsum() }}"),
    _chat("chat template that shows an address", r"puts <generator object", "{{ messages | map(attribute='role') }}"),
    _chat("chat template that leaves the sandbox", r"is unsafe", "{{ messages.__class__.__mro__ }}"),
    _chat("chat template with an unknown attribute", r"has no attribute", "{{ messages[0].no.way }}"),
    _chat("chat template that refuses", r"user: not me", "{{ raise_exception('not me') }}"),
    _chat("chat template that reads beyond", r"refuses messages of the roles", "{{ messages[5].content.upper() }}"),
    _chat("chat template that includes a file", r"no loader", "{% include '/etc/hostname' %}"),
    _tokenize("chat template without syntax", r"its chat template: unexpected.*line 1", "{% for m in messages %}{{ m"),
    _tokenize(
        "chat template nested too deeply",
        r"its chat template: is nested too deeply",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ),
    _tokenize(
        "chat template with an unknown filter",
        r"its chat template: No filter named 'nothing'",
        "{{ messages | nothing }}" + MARKS,
    ),
    _tokenize(
        "chat template with a power of constants", r"takes more than 1 s of computing", "{{ 9 ** (9 ** 9) }}" + MARKS
    ),
    _answer("answer dropped by the template", r"row 7: model: its chat template changes an answer: 'good' becomes", ""),
    _answer("answer changed by the template", r"'good' becomes 'GOOD<\|im_end\|>", "{{ message['content'] | upper }}"),
    _answer("answer cut by the template", r"changes an answer: 'good' becomes 'goo", "{{ message['content'][:3] }}"),
    _tokenize(
        "prompt that ends otherwise",
        r"row 7.*ends a prompt with .*A:', which it does not.*prompt=plain, or leave such rows out",
        NO_PROMPT_END,
    ),
    _tokenize(
        "answer that holds its end",
        r"no row is left of 1: the answers of 1 hold a token that ends",
        None,
        "prompt.allow_special_text=true",
        turns=[EXCHANGE[0], ("assistant", "a <|im_end|> b")],
    ),
    _tokenize(
        "pair of the same tokens",
        r"no row is left of 1: in 1 the chosen and the rejected answer are the same",
        MARKS.replace("message['content']", "message['content'] | trim"),
        rejected="good\n",
    ),
    _tokenize(
        "last answer cut off",
        r"no row is left of 1: 1 are longer than tokenize\.max_length=20; raise",
        None,
        "tokenize.max_length=20",
        "tokenize.max_length_policy=truncate",
    ),
    _tokenize(
        "conversation that begins with the answer",
        r"row 7: model: a row begins with the assistant",
        None,
        turns=[EXCHANGE[1], *EXCHANGE],
    ),
    _tokenize(
        "free template and several turns",
        r"row 7: prompt\.template is for one prompt.*apply_chat_template=true",
        None,
        "prompt=plain",
        turns=TURNS,
    ),
    _tokenize("no chat template", r"no chat template; choose prompt=plain", ""),
    _tokenize("date that is none", r"prompt\.date.*YYYY-MM-DD", None, "prompt.date=yesterday"),
    _tokenize(
        "date without a chat template",
        r"'date' is for apply_chat_template",
        None,
        "prompt=plain",
        "prompt.date=2031-01-02",
    ),
    _tokenize(
        "prompt template without the system message",
        r"row 7: prompt\.template does not say the system message: write \{\{ system \}\}",
        None,
        "prompt=plain",
        "prompt.template='{{ prompt }}'",
        turns=[("system", "Be kind."), *EXCHANGE],
    ),
    _free("free template that loops", r"takes more than 1 s of computing", "{{ prompt }}" + LOOP),
    _free("free template with a power", r"takes more than 1 s of computing", "{{ prompt }}{{ 9 ** (9 ** 9) }}"),
    _free("free template that divides by zero", r"division by zero", "{{ prompt }}{{ 1 / 0 }}"),
    _free("free template with random", r"'random' gives another text", "{{ prompt | random }}"),
    _free("free template that shows an address", r"puts <built-in method strip", "{{ prompt.strip }}"),
    _free("free template without syntax", r"unexpected.*line 1", "{{ prompt"),
    _free(
        "free template with another variable", r"must use 'prompt', and may use 'system'", "{{ prompt }} {{ answer }}"
    ),
    _free("free template without the prompt", r"must use 'prompt'", "always the same"),
    _free("free template of megabytes", r"makes a text of", "{% for i in range(99999) %}{{ prompt }}, {% endfor %}"),
]
