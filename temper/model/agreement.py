"""Whether two networks answer alike: their logits along the greedy answers of one of them, and the answers themselves.

Both read the same tokens, prompt and answer, so one forward pass a row tells where the other would have gone on with
another token: greedy answers are the same up to there.
"""

import dataclasses

from temper.model.loading import decoder_start

ROWS = 8
NEW_TOKENS = 16
PROMPT_TOKENS = 512  # rows with longer prompts are passed over, where there are others
# How far merging may move the logits, as a share of their spread, by the coarser precision of weights and arithmetic.
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 0.02, "bfloat16": 0.1}
# An answer may turn only where two tokens are nearly as likely: no further apart than so many times the difference.
TIE = 8


@dataclasses.dataclass
class Spoken:
    """Prompts, a network's greedy answers to them (token ids), and the logits that led to each token.

    `logits`: of each row (tokens of the answer, vocabulary), float32, on the CPU. `start`: what an encoder-decoder's
    decoder begins with; None for a causal model.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list
    start: int | None


@dataclasses.dataclass
class Agreement:
    """How alike two networks are.

    `logit_difference`: mean absolute difference of the logits, as a share of their standard deviation. `answers`: how
    many there are; `answers_alike`: how many are the same to the last token. `turn`: the largest distance, as the same
    share, of the two tokens where an answer turns; 0 when none does.
    """

    logit_difference: float
    answers: int
    answers_alike: int
    turn: float

    def within(self, tolerance: float) -> bool:
        """Whether the logits differ by no more than `tolerance`, and answers turn only where two tokens nearly tie."""
        return self.logit_difference <= tolerance and self.turn <= TIE * self.logit_difference

    def __str__(self) -> str:
        return (
            f"logits differ by {self.logit_difference:.2g} of their spread, {self.answers_alike} of {self.answers} "
            "greedy answers are the same"
        )


def prompts_of(rows, count: int = ROWS) -> list[list[int]]:
    """The first `count` prompts of a split that are not long, or else its shortest ones."""
    lengths = list(rows["prompt_length"])
    short = [row for row, length in enumerate(lengths) if length <= PROMPT_TOKENS]
    chosen = (short or sorted(range(len(lengths)), key=lengths.__getitem__))[:count]
    return [rows[row]["input_ids"][: lengths[row]] for row in chosen]


def random_prompts(vocabulary: int) -> list[list[int]]:
    """Token ids in place of rows, the same each time."""
    import torch

    return torch.randint(vocabulary, (ROWS, 16), generator=torch.Generator().manual_seed(0)).tolist()


def speak(network, prompts: list[list[int]], stop_ids: list[int]) -> Spoken:
    """Let a network, with or without adapter, answer prompts greedily, one by one: padding would change digits."""
    import torch
    from transformers import GenerationConfig

    owner = network.get_base_model() if hasattr(network, "get_base_model") else network
    own, owner.generation_config = owner.generation_config, GenerationConfig()  # without penalties it may come with
    start = decoder_start(owner)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        decoder_start_token_id=start,
        output_logits=True,
        return_dict_in_generate=True,
    )
    spoken = Spoken(prompts, [], [], start)
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=network.device)
            with torch.inference_mode():
                made = network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            spoken.answers.append(made.sequences[0, len(prompt) if start is None else 1 :].tolist())
            spoken.logits.append(torch.cat(made.logits).float().cpu())
    finally:
        owner.generation_config = own
    return spoken


def logits_along(network, spoken: Spoken) -> list:
    """A network's logits for each token of the answers that another one gave; shaped as `Spoken.logits`."""
    import torch

    found = []
    for prompt, answer in zip(spoken.prompts, spoken.answers, strict=True):
        read = [*prompt, *answer[:-1]] if spoken.start is None else prompt
        inputs = {"input_ids": torch.tensor([read], device=network.device)}
        if spoken.start is not None:
            inputs["decoder_input_ids"] = torch.tensor([[spoken.start, *answer[:-1]]], device=network.device)
        with torch.inference_mode():
            found.append(network(**inputs).logits[0, -len(answer) :].float().cpu())
    return found


def compare(expected: list, found: list) -> Agreement:
    """How alike two networks are, by their logits along the same answers."""
    import torch

    wanted, got = torch.cat(expected), torch.cat(found)
    spread = wanted.std().item()
    turns = [turn / spread for turn in map(_turn, expected, found) if turn is not None]
    difference = (got - wanted).abs().mean().item() / spread
    return Agreement(difference, len(expected), len(expected) - len(turns), max(turns, default=0.0))


def _turn(expected, found) -> float | None:
    """By how much `expected` (tokens, vocabulary) prefers its own token where `found` first takes another one."""
    own, other = expected.argmax(dim=1), found.argmax(dim=1)
    different = (own != other).nonzero()
    if not len(different):
        return None
    at = int(different[0])
    return (expected[at, own[at]] - expected[at, other[at]]).item()
