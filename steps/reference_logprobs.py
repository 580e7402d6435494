"""Reference log-probabilities: how likely the model finds the answers before it is trained.

By hand::

    python -m steps.reference_logprobs --splits results/splits/X --model results/models/Y \\
        --output results/references/Z experiment=dpo

Reads   all splits that have pairs (or, for method=kto, labels); the model that preference optimization starts from.
Writes  a `datasets.DatasetDict` with the splits' rows in their order: id, ref_chosen_logps, ref_rejected_logps (nats,
        summed over the tokens of the answer); for method=kto with one line an answer, a pair's chosen one first: id,
        ref_logps, ref_KL_logps (of the line's prompt with another line's answer) and KL_row (that line, from 0);
        references.json (how many were computed, and how many were cached).

Every figure is cached in ``results/.state/references/`` under the model and the answer's tokens, so an edited row costs
two answers, not the whole data set. An answer's figure does not depend on the other rows, because only answers of the
same padded length share a batch.
"""

import contextlib
import hashlib
import json
import logging
import sys
import time
from pathlib import Path

from temper.config.stages import ReferenceLogprobs
from temper.data.batches import Batch, padded
from temper.errors import UserError
from temper.files import known_json_lines, load_rows
from temper.folders import locked
from temper.hashing import digest, file_sha256
from temper.keys import code_key
from temper.model import limits, serving
from temper.model.adapters import refuse_diverged
from temper.model.threads import computing_threads
from temper.progress import Progress, quiet_libraries
from temper.step import run_command
from temper.training import unpaired
from temper.training.preferences import REFERENCES, chosen_of, rejected_of

STAGE = "reference_logprobs"
KNOWN = Path("results/.state/references")
TOKENS = 8192  # padded tokens in a batch
SAVE_SECONDS = 30.0

log = logging.getLogger("temper")


def run(config: ReferenceLogprobs, splits: Path, model: Path, output: Path) -> dict:
    """Compute what is not cached yet.

    Raises:
        UserError: the splits have no pairs, or the model's training diverged.
    """
    from datasets import DatasetDict

    quiet_libraries()
    rows = load_rows(splits)
    compared = {split: part for split, part in rows.items() if _has_answers(part, config.method.name)}
    if "train" not in compared:
        raise UserError(_nothing_to_compare(splits, config.method.name))
    refuse_diverged(model)
    serving.refuse_other_splits(splits, model)
    limits.check(model, compared)
    path = KNOWN / f"{_identity(model, config)}.jsonl"
    known = _read(path)
    of = _Single if config.method.name == "kto" else _Paired
    asked = {split: of(part, split) for split, part in compared.items()}
    answers = {split: part.answers for split, part in asked.items()}
    keys = {split: [_key(answer) for answer in part] for split, part in answers.items()}
    missing = {
        key: answer
        for split in answers
        for key, answer in zip(keys[split], answers[split], strict=True)
        if key not in known
    }
    if missing:
        with computing_threads(config.num_threads):
            known |= _compute(missing, model, config, path)
    figures = {split: _dataset(part.columns([known[key] for key in keys[split]])) for split, part in asked.items()}
    DatasetDict(figures).save_to_disk(output)
    counts = {"computed": len(missing), "known": sum(map(len, keys.values())) - len(missing)}
    (output / "references.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    log.info("reference: %(computed)d answers computed, %(known)d known before", counts)
    return counts


def _has_answers(part, method: str) -> bool:
    return "rejected_input_ids" in part.column_names or (method == "kto" and "label" in part.column_names)


def _nothing_to_compare(splits: Path, method: str) -> str:
    if method == "kto":
        return (
            f"{splits}: does not say which answers are desirable; choose data.layout=unpaired_preference, or set "
            "data.label, or give preference pairs, and make the splits again"
        )
    return (
        f"{splits}: has no preference pairs; choose data.layout=preference, or set data.rejected or "
        "data.rejected_from, and make the splits again"
    )


class _Paired:
    """The answers of a split's pairs: the chosen one of a row, then its rejected one."""

    def __init__(self, part, split: str):
        del split
        self.ids = part["id"][:]
        self.answers = [side(row) for row in part for side in (chosen_of, rejected_of)]

    def columns(self, logps: list[float]) -> dict[str, list]:
        return {"id": self.ids, REFERENCES[0]: logps[::2], REFERENCES[1]: logps[1::2]}


class _Single:
    """A split's single answers, then the mismatched texts, by which TRL's KTO measures how far a model has moved."""

    def __init__(self, part, split: str):
        self.rows = unpaired.unpaired(part)
        self.others = unpaired.mismatched(self.rows)
        self.answers = self.rows + unpaired.with_answers_of(self.rows, self.others)
        if same := unpaired.of_one_prompt(self.rows, self.others):
            log.warning(
                "warning: %d of %d answers of %s are compared after their own prompt, for more than half of the rows "
                "have one prompt: how far the model moves (kl) is measured less well",
                same,
                len(self.rows),
                split,
            )

    def columns(self, logps: list[float]) -> dict[str, list]:
        ids, count = [row["id"] for row in self.rows], len(self.rows)
        figures = {unpaired.REFERENCE: logps[:count], unpaired.KL_REFERENCE: logps[count:]}
        return {"id": ids, unpaired.KL_ROW: self.others, **figures}


def _dataset(columns: dict[str, list]):
    from datasets import Dataset, Features, Value

    whole = ("id", unpaired.KL_ROW)
    kinds = {name: Value("int64" if name in whole else "float32") for name in columns}
    return Dataset.from_dict(columns, features=Features(kinds))


def _compute(missing: dict[str, dict], model: Path, config: ReferenceLogprobs, path: Path) -> dict[str, float]:
    """The figures of answers (key -> tokens and labels), which are also appended to `path` while they come."""
    import torch

    from temper.model.loading import load_model, load_tokenizer
    from temper.model.predictions import SupervisedLoss

    network = load_model(model, config.model.load.model_dump(), config.quantization.model_dump()).eval()
    loss = SupervisedLoss(share=False)  # an answer's figure must not depend on which others are missing
    padding = load_tokenizer(model).pad_token_id
    figures: dict[str, float] = {}
    waiting: dict[str, float] = {}
    saved = time.monotonic()
    with torch.inference_mode(), Progress(len(missing), "reference", "answers") as progress:
        for keys in _batches(missing):
            batch = Batch([missing[key] for key in keys], padding)
            waiting |= zip(keys, loss.sequence_logps(network, batch).tolist(), strict=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                _append(path, waiting)
                figures, waiting, saved = figures | waiting, {}, time.monotonic()
            progress.update(len(keys))
    _append(path, waiting)
    return figures | waiting


def _batches(answers: dict[str, dict]) -> list[list[str]]:
    """Keys of answers that go through the model together: of one padded length, the longest first."""
    widths: dict[tuple[int, int], list[str]] = {}
    for key, answer in answers.items():
        widths.setdefault((padded(len(answer["input_ids"])), padded(len(answer["labels"]))), []).append(key)
    batches = []
    for width in sorted(widths, reverse=True):
        size = max(1, TOKENS // max(width))
        batches += [widths[width][at : at + size] for at in range(0, len(widths[width]), size)]
    return batches


# --- what is known -------------------------------------------------------------------------------


def _identity(model: Path, config: ReferenceLogprobs) -> str:
    """What an answer's figure depends on besides its tokens: model files, how and where it is loaded, our code."""
    from temper.model import loading

    files = [path for path in sorted(model.iterdir()) if path.is_file() and not path.name.startswith(".")]
    content = {path.name: file_sha256(path) for path in files if path.name not in ("provenance.json", "config.yaml")}
    load = config.model.load.model_dump()
    resolved = {
        **load,
        **config.quantization.model_dump(),
        "dtype": str(loading.resolve_dtype(load["dtype"])),
        "attn_implementation": loading.resolve_attention(load["attn_implementation"]),
    }
    return digest([content, resolved, config.num_threads, loading.device().type, code_key(f"steps.{STAGE}")])


def _key(answer: dict) -> str:
    """A hash of the tokens that are read and those that count, long enough for billions of answers."""
    return hashlib.sha256(json.dumps([answer["input_ids"], answer["labels"]]).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, float]:
    """Figures by key. A line cut short by a kill is ignored."""
    figures = {}
    for line in known_json_lines(path):
        with contextlib.suppress(ValueError, TypeError):
            key, figure = line
            figures[key] = float(figure)
    return figures


def _append(path: Path, figures: dict[str, float]) -> None:
    """Add figures, for this and for every later run. Several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path), path.open("a", encoding="utf-8") as file:
        # The line break comes first: a line that a kill cut off must not swallow the next one.
        file.write("".join(f"\n{json.dumps([key, figure])}" for key, figure in figures.items()))


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
