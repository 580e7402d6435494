"""Answers of a model to prompts, in batches, in the order of the prompts."""

import dataclasses
import itertools
import logging
import time

from temper.data.columns import answer_start, answer_text, final_answer
from temper.model.adapters import is_prompt_learning
from temper.model.loading import decoder_start
from temper.progress import Progress

log = logging.getLogger("temper")


@dataclasses.dataclass
class Answers:
    """In the order of the prompts: the text, its tokens with the one that ended it, whether the model did end it.

    Of rows with reasoning, the text is the answer behind it.
    """

    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    seconds: float

    @property
    def tokens(self) -> list[int]:
        """How many tokens each answer took."""
        return [len(ids) for ids in self.ids]


def no_answers(rows: int) -> Answers:
    """Of rows that ask for none."""
    return Answers([""] * rows, [[] for _ in range(rows)], [True] * rows, 0.0)


def generate_answers(
    model, tokenizer, rows: list[dict], settings: dict, stop_ids: list[int], known: dict[int, list[int]] | None = None
) -> Answers:
    """Let the model answer each row's prompt, `input_ids[:prompt_length]`, which an encoder-decoder's encoder reads.

    Greedy unless `do_sample`. Each row draws from a random stream of its own, named by its id, so that neither the
    batch size nor the other rows change its draws. What they do change is how sums are rounded: not enough to show in
    float32, but in 16 bits about one answer in five differs between batches of 1 and 24, where two tokens are nearly as
    likely. The same rows in batches of the same size give the same answers. The model's own generation defaults (some
    ship with sampling or penalties switched on) are left out: the config says all there is.

    Args:
        rows: `id`, `input_ids`, `prompt_length`; where answers have reasoning, `reasoning_start`, `reasoning_end`.
        settings: the config section `eval`: batch_size, max_new_tokens, do_sample, temperature, top_p.
        stop_ids: tokens that end an answer.
        known: row number -> the tokens of its answer, where that is known already (see `greedy_gold`).
    """
    import torch

    known, ends = known or {}, set(stop_ids)
    answers = Answers([""] * len(rows), [[] for _ in rows], [False] * len(rows), 0.0)
    owner = model.get_base_model() if is_prompt_learning(model) else model
    own_defaults, owner.generation_config = owner.generation_config, _greedy(owner, settings, tokenizer, stop_ids)
    started = time.perf_counter()
    try:
        with torch.inference_mode(), Progress(len(rows), "generate", "rows") as progress:
            for row, ids in known.items():
                _store(answers, row, ids, rows[row], tokenizer, ends)
            progress.update(len(known))
            lengths = {row: part["prompt_length"] for row, part in enumerate(rows) if row not in known}
            for members in _batches(lengths, settings["batch_size"], owner is not model):
                new = _batch(model, [rows[row] for row in members], settings, tokenizer.pad_token_id)
                for row, ids in zip(members, new, strict=True):
                    _store(answers, row, ids, rows[row], tokenizer, ends)
                progress.update(len(members), f"{sum(answers.tokens)} tokens")
    finally:
        owner.generation_config = own_defaults
    answers.seconds = time.perf_counter() - started
    return answers


def greedy_gold(rows: list[dict], matched: list[int], settings: dict, stop_ids: list[int]) -> dict[int, list[int]]:
    """Rows whose gold answer is what greedy generation would give: row number -> the answer's tokens.

    The loss has been computed from the model's predictions along the gold answer. Where each of them is its next token,
    up to the one that ends the answer, generation has nothing to find out.

    Args:
        matched: of each row, how many tokens of its gold answer, from the first on, the model finds likeliest.
    """
    if settings["do_sample"]:
        return {}
    known = {}
    for number, (row, count) in enumerate(zip(rows, matched, strict=True)):
        answer = row["labels"][answer_start(row["input_ids"], row["prompt_length"]) :][:count]
        end = next((at for at, token in enumerate(answer) if token in stop_ids), None)
        if end is not None and end < settings["max_new_tokens"]:
            known[number] = answer[: end + 1]
    return known


def _batches(lengths: dict[int, int], batch_size: int, one_length: bool) -> list[list[int]]:
    """Row numbers of each batch, the longest first, so that a lack of memory shows at once.

    `one_length`: no padding. PEFT's virtual tokens stand in front of it, and positions would count it.
    """
    order = sorted(lengths, key=lengths.__getitem__, reverse=True)
    groups = [list(rows) for _, rows in itertools.groupby(order, lengths.__getitem__)] if one_length else [order]
    return [rows[at : at + batch_size] for rows in groups for at in range(0, len(rows), batch_size)]


def _greedy(model, settings: dict, tokenizer, stop_ids: list[int]):
    """Sampling is done by `_RowSampling`, so that generation itself is always greedy."""
    from transformers import GenerationConfig

    return GenerationConfig(
        decoder_start_token_id=decoder_start(model),
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def _batch(model, rows: list[dict], settings: dict, pad_token_id: int) -> list[list[int]]:
    """New token ids of each row.

    What all prompts begin with is read once. The rest is padded on the left, so that all answers start at one position;
    prompts of an encoder on the right, as in training, for its positions may be counted from the left.
    """
    import torch

    in_encoder = model.config.is_encoder_decoder
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    longest = max(map(len, prompts))
    common = _common_start(model, prompts)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        start = 0 if in_encoder else longest - len(prompt)
        for part, at in ((prompt[:common], 0), (prompt[common:], start + common)):
            ids[index, at : at + len(part)] = torch.as_tensor(part)
            mask[index, at : at + len(part)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = {"past_key_values": _read(model, ids[:1, :common], len(rows))} if common else {}
    processors = _samplers(rows, settings)
    output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **cache)
    return output[:, 1 if in_encoder else longest :].tolist()  # a decoder begins with its start token


def _common_start(model, prompts: list) -> int:
    """How many tokens of all prompts are read once; 0 for a model that keeps no state of each token."""
    from temper.model.flat_batch import worth_sharing

    if len(prompts) == 1 or is_prompt_learning(model) or model.config.is_encoder_decoder or model._is_stateful:
        return 0
    return worth_sharing(prompts)


def _read(model, ids, rows: int):
    """The cache after the model has read `ids`, (1, tokens), for as many rows."""
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _store(answers: Answers, row: int, ids: list[int], asked: dict, tokenizer, stop_ids: set[int]) -> None:
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    answers.finished[row] = end is not None
    answers.ids[row] = ids if end is None else ids[: end + 1]
    answers.texts[row] = final_answer(answer_text(tokenizer, ids, stop_ids), asked)


def _samplers(rows: list[dict], settings: dict):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList()
    if settings["do_sample"]:
        if settings["temperature"] != 1.0:
            processors.append(TemperatureLogitsWarper(settings["temperature"]))
        if settings["top_p"] < 1.0:
            processors.append(TopPLogitsWarper(settings["top_p"]))
        processors.append(_RowSampling([row["id"] for row in rows]))
    return processors


class _RowSampling:
    """Sampling as a logits processor: the largest of logits plus Gumbel noise is a draw from their softmax."""

    def __init__(self, ids: list[int]):
        import torch

        self.streams = [torch.Generator().manual_seed(row_id) for row_id in ids]  # which looks at 32 bits of it

    def __call__(self, input_ids, scores):
        import torch

        del input_ids
        draws = [torch.empty(scores.shape[1]).exponential_(generator=stream) for stream in self.streams]
        return scores.float() - torch.stack(draws).log().to(scores.device)
