"""The Modelfile with which Ollama asks a GGUF file as the run was asked.

Ollama does not run the Jinja template in the file: it takes one of its own if that is nearly the same, else none. So
the Modelfile has the template in Go's language, as far as it is no more than text around messages
(`temper.runs.forms`).
"""

import re

from temper.runs.forms import Form
from temper.runs.prompting import Generation

ENDING = ".Modelfile"
CONTEXT = 8192  # tokens at most: Ollama takes the memory for all of them at once


def modelfile(
    file: str, form: Form | None, system: str | None, stops: list[str], settings: Generation, context: int
) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        form: that of the prompts, without what llama.cpp writes before them by itself; None: there is none.
        system: the run's system message.
        stops: texts of the tokens that end an answer.
        context: tokens that the model reads.
    """
    lines = [f"FROM ./{file}", *_template(form)]
    if form and form.system and system:
        lines += [f'SYSTEM """{system}"""'] if _is_plain(system) else [f"# {NO_SYSTEM}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(settings, context).items()]
    return "\n".join(lines) + "\n"


NO_TEMPLATE = "no TEMPLATE: the model's is more than text around messages, so ask with raw prompts (/api/generate, raw)"
NO_SYSTEM = "no SYSTEM: a Modelfile cannot hold the run's system message, so give it with each request"
ONE_PROMPT = "for single prompts: this template has no place for earlier messages"


def remarks(form: Form | None, system: str | None) -> list[str]:
    """What of the run's prompts the Modelfile does not say."""
    if form is None:
        return [NO_TEMPLATE]
    found = [f"the model's own template also {what}; this one does not" for what in form.more]
    if form.answer is None:
        found.append(ONE_PROMPT)
    elif form.system is None:
        found.append("the model's own template has no place for a system message")
    if form.system and system and not _is_plain(system):
        found.append(NO_SYSTEM)
    return found


def _template(form: Form | None) -> list[str]:
    """TEMPLATE, behind what it does not do."""
    if form is None:
        return [f"# {NO_TEMPLATE}"]
    return [*(f"# {remark}" for remark in remarks(form, None)), f'TEMPLATE """{go_template(form)}"""']


def go_template(form: Form) -> str:
    """The form in the language of Go's text/template, over Ollama's variables."""
    start, end = _literal(form.start), _literal(form.end)
    if form.answer is None or form.user is None:
        return f"{start}{{{{ .Prompt }}}}{end}{{{{ .Response }}}}"
    if form.system:
        before, behind = map(_literal, form.system)
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{start}{{{{ end }}}}"
    answer, user = _literal(form.answer), _literal(form.user)
    if answer != end:
        answer = f"{{{{ if eq (len (slice $.Messages $at)) 1 }}}}{end}{{{{ else }}}}{answer}{{{{ end }}}}"
    return (
        f"{start}{{{{ range $at, $message := .Messages }}}}"
        f'{{{{ if eq $message.Role "user" }}}}{{{{ $message.Content }}}}{answer}'
        f'{{{{ else if eq $message.Role "assistant" }}}}{{{{ $message.Content }}}}{user}{{{{ end }}}}{{{{ end }}}}'
    )


def _literal(text: str) -> str:
    """Text that stands in a template and in a Modelfile for itself."""

    def piece(found: re.Match) -> str:
        if _is_plain(found[0]) and found[0] != "{":
            return found[0]
        codes = "".join(f"\\U{ord(char):08x}" for char in found[0])
        return f'{{{{ "{codes}" }}}}'

    return re.sub('"""|.', piece, text, flags=re.DOTALL)


def _is_plain(text: str) -> bool:
    """Whether a Modelfile keeps a text: its reader drops what Go does not print, and ends at three quotes."""
    return '"""' not in text and all(char in "\n\t" or char.isprintable() for char in text)


def _parameters(settings: Generation, context: int) -> dict[str, object]:
    """Ollama's names for how answers are generated. Its own defaults sample, and punish repetition."""
    chosen: dict[str, object] = {"temperature": settings.temperature if settings.do_sample else 0}
    if settings.do_sample:
        chosen |= {"top_p": settings.top_p, "top_k": 0, "min_p": 0}
    return chosen | {"repeat_penalty": 1, "num_predict": settings.max_new_tokens, "num_ctx": min(context, CONTEXT)}
