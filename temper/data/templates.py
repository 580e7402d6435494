"""Untrusted Jinja templates: those of the data, of the prompt, of the model.

They run in a sandbox without clock or random numbers, because keys cover only what depends on config and row. They are
bounded in computing time (SECONDS), MEMORY, and the length of the text in proportion to its input. Any fault is one
UserError that begins with the caller's words for the template.
"""

import contextlib
import datetime
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

from temper.errors import UserError

DATE = "2024-07-26"  # the date that Llama 3's templates write if they have no clock
SECONDS = 1.0  # computing time, so that a busy machine does not matter
MEMORY = 2**29  # bytes
CHARACTERS = 2**20  # most characters of a text, or GROWTH times as many as went in
GROWTH = 16
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # Python's representation of a function, a generator or a namespace


class _TooSlow(BaseException):
    """SECONDS are over. Not an Exception, which Jinja would swallow while it evaluates constants at compile time."""


# --- what a template may use -----------------------------------------------------------------------


def environment(finalize: Callable | None = None, **options):
    """A sandbox for templates of the config, where an unknown variable is an error.

    Args:
        finalize: called with each value that is put into the text; it returns what to put there.
        options: of `jinja2.Environment`.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    options = {"keep_trailing_newline": True, "undefined": StrictUndefined, **options}
    return without_dice(ImmutableSandboxedEnvironment(finalize=finalize, **options))


def without_dice(environment):
    """Make everything that gives a different text each time raise an error; returns `environment`."""
    environment.filters = {**environment.filters, "random": _refused("random")}
    environment.globals = {**environment.globals, "lipsum": _refused("lipsum")}
    return environment


def _refused(name: str) -> Callable:
    def refuse(*_arguments, **_named):
        from jinja2 import TemplateRuntimeError

        raise TemplateRuntimeError(f"'{name}' gives another text each time, so nothing made with it can be repeated")

    return refuse


def chat_environment(source: str, date: str):
    """The sandbox in which transformers runs the chat template `source`, with its clock fixed at `date` (ISO).

    Raises:
        jinja2.TemplateSyntaxError: or any other error in the template's text; call it within `bounded`.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    made = without_dice(_compile_jinja_template(source).environment.overlay())
    made.globals["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
    return made


def reads_clock(source: str, environment) -> bool:
    """Whether a chat template asks for the date."""
    from jinja2 import nodes

    return any(name.name == "strftime_now" for name in environment.parse(source).find_all(nodes.Name))


def variables(source: str, environment) -> frozenset[str]:
    """The variables of a template, also those that it sets itself."""
    from jinja2 import nodes

    return frozenset(node.name for node in environment.parse(source).find_all(nodes.Name))


def fields(source: str, environment) -> frozenset[str]:
    """The fields that a template reads, and its texts (``m["thinking"]``, a role) with the tags in them."""
    from jinja2 import nodes

    tree = environment.parse(source)
    found = {node.attr for node in tree.find_all(nodes.Getattr)}
    for text in (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)):
        found |= {text, *re.findall(r"</?\w+>", text)}
    return frozenset(found)


def to_ship(source: str, date: str, opening: str, chat_template_kwargs: dict | None = None) -> str:
    """The chat template with all that other programs need to render conversations as Temper does.

    Args:
        date: its date (ISO); replaces all calls of the clock.
        opening: what comes after each prompt (see `temper.data.chat_template`).
        chat_template_kwargs: values of its variables, where a program gives no others.

    Raises:
        UserError: it asks for the date in a format that it computes.
    """
    environment = chat_environment(source, date)
    if reads_clock(source, environment):
        answers = {text: environment.globals["strftime_now"](text) for text in _asked(source, environment)}
        # The empty text at the end keeps blanks at the start of the template, where a block would remove a line end.
        clock = "{%- macro strftime_now(format) %}{{ " + json.dumps(answers) + "[format] }}{% endmacro %}{{ '' }}"
        source = clock + source
    for name, value in (chat_template_kwargs or {}).items():
        given = f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}{{{{ '' }}}}"
        source = given + source
    if opening:
        source = (
            source.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + json.dumps(opening) + " }}{% endif %}"
        )
    return source


def _literal(value) -> str:
    """A value of the config as Jinja writes it, which differs from JSON in null."""
    return "none" if value is None else json.dumps(value)


def _asked(source: str, environment) -> list[str]:
    """The date formats that the template asks for, as for strftime."""
    from jinja2 import nodes

    tree = environment.parse(source)
    calls = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", None) == "strftime_now"]
    formats = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], nodes.Const)]
    if len(formats) < len(calls):
        raise UserError("the chat template asks for the date in words that it puts together: write the day into it")
    return formats


# --- that it ends ------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Limit templates in this block, including their compilation, to SECONDS and MEMORY, else one UserError.

    A block costs as much as a small render, so put many into one, and go one by one only if that fails. Outside the
    main thread there is no time limit, because Python cannot interrupt it there.

    Args:
        what: the error's first words: the template and the row.
    """
    try:
        with _time_limit(), _memory_limit():
            yield
    except UserError:
        raise
    except (Exception, _TooSlow) as error:  # a template is a program: any error in it is for the user
        raise UserError(f"{what}: {reason(error)}") from None


def render(template, variables: Mapping, what: str) -> str:
    """The text of `template` with `variables`, within all limits."""
    with bounded(what):
        text = template.render(variables)
    return checked(text, variables, what)


def checked(text: str, variables: object, what: str) -> str:
    """`text`, unless it is too long for its input or contains an object's memory address."""
    if len(text) > CHARACTERS and len(text) > GROWTH * len(str(variables)):
        raise UserError(
            f"{what}: makes a text of {len(text):,} characters, far more than it was given: does a loop repeat it?"
        )
    found = _ADDRESS.search(text) if " at 0x" in text else None
    if found and found[0] not in str(variables):
        raise UserError(
            f"{what}: puts {found[0]} into the text, which is another one each time: "
            "a filter without |list or |join, or a function without ()?"
        )
    return text


def reason(error: BaseException) -> str:
    """Why a template failed, in one line."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, _TooSlow):
        return f"takes more than {SECONDS:.0f} s of computing: does a loop or a power never end?"
    if isinstance(error, MemoryError):
        return f"takes more than {MEMORY >> 20} MiB of memory: does a loop or a product grow without end?"
    if isinstance(error, RecursionError):
        return "is nested too deeply, or calls itself without end"
    said = " ".join(str(error).split())[:200]
    if isinstance(error, TemplateSyntaxError):
        return f"{said} (line {error.lineno})"
    return said if said and not isinstance(error, LookupError) else f"{type(error).__name__} {said}".rstrip()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _too_slow:
        signal.signal(signal.SIGVTALRM, _too_slow)  # stays set: nothing else uses this timer
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # fires once, so never after this block
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _too_slow(*_):
    raise _TooSlow


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """MEMORY more than the process has now. Only Linux reports that; elsewhere the time limit must suffice."""
    used = _address_space()
    if used is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (used + MEMORY, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int | None:
    """Bytes of this process's address space."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 32).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
