"""Templates of others end, and see neither clock nor dice."""

import threading

import pytest

from temper.data import templates
from temper.errors import UserError

LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
ROW = {"x": "abc", "n": 9}
BAD = {
    "loop without end": (LOOP, "takes more than 1 s of computing"),
    "power of constants": ("{{ 9**(9**9) }}", "takes more than 1 s of computing"),
    "power of a column": ("{{ n**(n**n) }}", "takes more than 1 s of computing"),
    "product": ("{{ x * 10**11 }}", "takes more than 512 MiB of memory"),
    "padding": ("{{ x | center(10**10) }}", "takes more than 512 MiB of memory"),
    "text that doubles": (
        "{% set n = namespace(s=x) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "takes more than",
    ),
    "long text": ("{% for i in range(99999) %}{{ x }}, again and again{% endfor %}", "makes a text of .* characters"),
    "division by zero": ("{{ 1 / 0 }}", "division by zero"),
    "overflow": ("{{ 10.0 ** 400 }}", "Numerical result out of range"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    "nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply"),
    "random": ("{{ [1, 2] | random }}", "'random' gives another text each time"),
    "random by map": ("{{ [[1, 2]] | map('random') | list }}", "'random' gives another text each time"),
    "lipsum": ("{{ lipsum() }}", "'lipsum' gives another text each time"),
    "generator": ("{{ x | map('upper') }}", "puts <generator object .*another one each time"),
    "method": ("{{ x.strip }}", "puts <built-in method strip .*another one each time"),
    "hidden generator": ("{{ (x | map('upper')) ~ '' }}", "puts <generator object"),
    "sandbox": ("{{ x.__class__ }}", "'__class__' of 'str' object is unsafe"),
    "unknown variable": ("{{ y }}", "'y' is undefined"),
    "unknown filter": ("{{ x | nothing }}", r"No filter named 'nothing'\. \(line 1\)"),
    "syntax": ("a\n{{ x", r"unexpected end of template.*\(line 2\)"),
    "other file": ("{% include 'x' %}", "no loader"),
    "sum of texts": ("{{ [1] | sum(start='x') }}", r"sum\(\) can't sum strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_template_does_wrong_is_one_line(name):
    source, says = BAD[name]
    with pytest.raises(UserError, match=f"^data.prompt: .*{says}") as raised:
        with templates.bounded("data.prompt"):
            template = templates.environment().from_string(source)
        templates.render(template, ROW, "data.prompt")
    assert "\n" not in str(raised.value)


def test_limits_are_gone_behind_the_block():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError):
        templates.render(templates.environment().from_string("{{ x * 10**11 }}"), ROW, "here")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert templates.signal.getitimer(templates.signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_text_that_is_long_because_its_row_is_passes():
    row = {"x": "abc " * 2**19}
    template = templates.environment().from_string("{{ x }}{{ x }}")
    assert templates.render(template, row, "here") == row["x"] * 2


def test_a_row_may_speak_of_addresses():
    row = {"x": "<function f at 0x7f54004fdd20>"}
    assert templates.render(templates.environment().from_string("{{ x }}"), row, "here") == row["x"]


def test_another_thread_renders_as_well():
    made = []
    template = templates.environment().from_string("{{ x | upper }}")
    thread = threading.Thread(target=lambda: made.append(templates.render(template, ROW, "here")))
    thread.start()
    thread.join()
    assert made == ["ABC"]


def test_finalize_sees_each_value():
    environment = templates.environment(finalize=lambda value: "nothing" if value is None else value)
    assert templates.render(environment.from_string("{{ x }}, {{ n }}"), {"x": None, "n": 3}, "here") == "nothing, 3"
