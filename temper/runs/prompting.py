"""Prompt a finished model with the same tokens as in training; answers as a stream or in batches."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from temper.data import templates
from temper.data.conversations import Conversation, as_conversation, without_system
from temper.data.encoder import Encoder
from temper.errors import UserError
from temper.model.adapters import is_prompt_learning
from temper.model.limits import limits_of
from temper.runs import find as runs


class Prompter:
    """Turns conversations into the token ids that a model was trained to answer.

    Args:
        folder: a model in Hugging Face layout; its weights are not read.
        prompt: config section `prompt` of the run.
        system: a system message, replacing the run's own; "" leaves it out.
        virtual_tokens: number of those in the adapter.
    """

    def __init__(self, folder: Path, prompt: dict, system: str | None = None, virtual_tokens: int = 0):
        from temper.model.loading import is_encoder_decoder, load_tokenizer, stop_token_ids

        self.tokenizer = load_tokenizer(folder)
        self.stop_ids = stop_token_ids(folder, self.tokenizer)
        self.encoder = Encoder(self.tokenizer, self.stop_ids, prompt, is_encoder_decoder(folder))
        self.system = prompt["system"] if system is None else system or None
        self.limits = limits_of(folder, virtual_tokens)

    @property
    def keeps_history(self) -> bool:
        """Refuse several turns for a free template, which has a place for one prompt only."""
        return self.encoder.renderer.keeps_history

    def ids(self, conversation: Conversation | list[dict], max_new_tokens: int) -> list[int]:
        """Token ids of the prompt for an answer to a conversation (or its messages).

        Raises:
            UserError: they leave less than `max_new_tokens` of the model's context.
        """
        ids = self.encoder.prompt_ids(self.told(conversation))
        self.limits.check_answer(len(ids), max_new_tokens)
        return ids

    def told(self, conversation: Conversation | list[dict]) -> Conversation:
        """A conversation with the system message instead of its own, if there is one."""
        asked = as_conversation(conversation)
        if self.system is None:
            return asked
        messages = [{"role": "system", "content": self.system}, *without_system(asked.messages)]
        return asked._replace(messages=messages)

    def ids_of_chat(self, history: list[dict], max_new_tokens: int) -> tuple[list[int], int]:
        """(token ids for a conversation, messages left out): a full context drops the oldest exchanges."""
        for start in range(0 if self.keeps_history else len(history) - 1, len(history), 2):
            try:
                return self.ids(history[start:], max_new_tokens), start
            except UserError:
                if start == len(history) - 1:
                    raise
        raise AssertionError(f"a conversation of {len(history)} messages does not end with the user's")


def prompter_of(run: runs.FinishedRun, system: str | None = None) -> Prompter:
    """The `Prompter` of a run, whose tokenizer and template are checked to be those of training."""
    runs.check_serving(run)
    return Prompter(runs.model_folder(run), run.prompt, system, runs.virtual_tokens(run))


def tokenizer_to_ship(folder: Path, prompt: dict):
    """The tokenizer in a model's folder, with a chat template that makes other programs prompt as in training.

    Args:
        folder: a model in Hugging Face layout.
        prompt: config section `prompt` of the run, with the template's `opening`.
    """
    from temper.model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if prompt["apply_chat_template"]:
        source = tokenizer.get_chat_template()
        date, opening = prompt.get("date") or templates.DATE, prompt.get("opening", "")
        shipped = templates.to_ship(source, date, opening, prompt.get("chat_template_kwargs"))
        named = tokenizer.chat_template
        tokenizer.chat_template = {**named, "default": shipped} if isinstance(named, dict) else shipped
    return tokenizer


@dataclasses.dataclass
class Generation:
    """Generation settings, under transformers' names."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


def generation_settings(defaults: Generation, given: dict) -> Generation:
    """`defaults`, overridden by values from the command line or a call (None: not given).

    Raises:
        UserError: an unknown name or an invalid value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(defaults, **given)
    if not settings.do_sample and {"temperature", "top_p"} & set(given):
        raise UserError("temperature and top_p have no effect without do_sample: add it, or leave them out")
    for name, fine, allowed in (
        ("max_new_tokens", settings.max_new_tokens >= 1, "at least 1"),
        ("temperature", settings.temperature > 0, "above 0"),
        ("top_p", 0 < settings.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            raise UserError(f"{name} must be {allowed} (found {getattr(settings, name)})")
    return settings


def add_generation_flags(parser, max_new_tokens: str) -> None:
    """The flags of `Generation`, with hyphens or, as in transformers, underscores."""
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help=f"default: {max_new_tokens}")
    parser.add_argument(
        "--do-sample", "--do_sample", action="store_true", default=None, help="sample answers; default: greedy"
    )
    parser.add_argument("--temperature", type=float, help="with --do-sample; default: 1")
    parser.add_argument("--top-p", "--top_p", type=float, help="with --do-sample; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="with --do-sample; default: 0")


class _Streamer:
    """Passes on an answer's text as its tokens come; in total exactly what `Encoder.text` makes of them."""

    # The end may change with the next token: part of a character, a word, the blanks before it.
    UNSURE = re.compile("\\s*[!-~]*\ufffd*$")

    def __init__(self, encoder: Encoder, say: Callable[[str], None]):
        self.encoder, self.say, self.said = encoder, say, ""
        self.ids: list[int] | None = None

    def put(self, tokens) -> None:
        """Called by transformers: with the prompt, then with each token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += tokens.tolist()
        self._say(self.UNSURE.sub("", self.encoder.text(self.ids)))

    def end(self) -> None:
        """Called by transformers."""
        self._say(self.encoder.text(self.ids or []))

    def _say(self, text: str) -> None:
        if len(text) > len(self.said):
            self.say(text[len(self.said) :])
            self.said = text


def stream_answer(
    model, prompter: Prompter, ids: list[int], settings: Generation, say: Callable[[str], None]
) -> tuple[str, bool]:
    """Answer one prompt, passing its text to `say` as it comes: (the whole text, whether it ended by itself)."""
    import torch
    from transformers import GenerationConfig

    from temper.model.loading import decoder_start

    owner = model.get_base_model() if is_prompt_learning(model) else model
    owner.generation_config = GenerationConfig()  # some models come with sampling or penalties switched on
    greedy = {"max_new_tokens": settings.max_new_tokens}
    config = GenerationConfig(
        **({**dataclasses.asdict(settings), "top_k": 0} if settings.do_sample else greedy),  # top_k is 50 by default
        decoder_start_token_id=decoder_start(owner),
        eos_token_id=prompter.stop_ids,
        pad_token_id=prompter.tokenizer.pad_token_id,
    )
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=_Streamer(prompter.encoder, say),
        )
    answer = output[0, 1 if prompter.encoder.apart else len(ids) :].tolist()
    return prompter.encoder.text(answer), answer[-1] in prompter.stop_ids


def answer_all(model, prompter: Prompter, prompts: list[list[int]], settings: Generation, batch_size: int, seed: int):
    """Answer prompts of token ids, batched by length; `evaluation.generation.Answers` in the given order."""
    from temper.evaluation.generation import generate_answers

    # A sampled answer depends only on its id. torch's generators use 32 bits of a seed; the odd factor makes two seeds
    # differ on every row, and with seed 0 the ids are row numbers, as in the evaluation.
    rows = [
        {"id": (seed * 2_654_435_761 + number) % 2**32, "input_ids": ids, "prompt_length": len(ids)}
        for number, ids in enumerate(prompts, start=1)
    ]
    options = {**dataclasses.asdict(settings), "batch_size": batch_size}
    return generate_answers(model, prompter.tokenizer, rows, options, prompter.stop_ids)
