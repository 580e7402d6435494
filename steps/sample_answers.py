"""On-policy pairs: the model learns to reject its own wrong answers.

By hand::

    python -m steps.sample_answers --splits results/splits/X --model results/models/Y \\
        --output results/pairs/Z experiment=dpo 'method.own_answers={max_new_tokens: 8}'

Reads   all splits; the model that preference optimization starts from.
Writes  splits as tokenize_splits does. In train and validation the rejected answer is the model's own, and rows that it
        answers correctly are left out; the test split stays as it is. audit.json counts both; answers.jsonl has all
        answers.

An answer is wrong if it differs from the reference, ignoring blanks at the ends. Each row has its own random stream, so
the same rows give the same pairs. In 16 bits an answer may also depend on the rows that share its batch, see
`temper.evaluation.generation.generate_answers`.
"""

import json
import logging
import sys
from pathlib import Path

from temper.config.schema import OfPairs
from temper.config.stages import SampleAnswers
from temper.data import in_train
from temper.data.columns import IGNORED, features
from temper.errors import UserError
from temper.files import json_lines, load_rows, read_json
from temper.model import limits, serving
from temper.model.adapters import refuse_diverged
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.step import run_command

STAGE = "sample_answers"
SAMPLED = ("train", "validation")

log = logging.getLogger("temper")


def run(config: SampleAnswers, splits: Path, model: Path, output: Path) -> dict:
    """Let the model answer, and keep the rows that it answers wrongly.

    Raises:
        UserError: `method.own_answers` is not set, or the model answers all rows of a split correctly.
    """
    from datasets import Dataset, DatasetDict

    from temper.model import loading

    quiet_libraries()
    if not (isinstance(config.method, OfPairs) and config.method.own_answers):
        raise UserError("config: 'method.own_answers' is not set, and it says how the model answers: see method=dpo")
    settings = config.method.own_answers.model_dump()
    refuse_diverged(model)
    served_with = serving.refuse_other_splits(splits, model)
    rows = load_rows(splits)
    limits.check(model, rows, SAMPLED, settings["max_new_tokens"], "method.own_answers.max_new_tokens")
    tokenizer = loading.load_tokenizer(model)
    network = loading.load_model(model, config.model.load.model_dump()).eval()
    stop_ids = loading.stop_token_ids(model, tokenizer)
    counts = {}
    with (output / "answers.jsonl").open("w", encoding="utf-8") as file:
        for split in [split for split in SAMPLED if split in rows]:
            with computing_threads(config.num_threads):
                pairs = _pairs(network, tokenizer, list(rows[split]), settings, stop_ids, file)
            counts[split] = {"read": len(rows[split]), "rows": len(pairs), "right": len(rows[split]) - len(pairs)}
            if not pairs:
                raise UserError(
                    f"{model}: all its answers to the {split} split are right, so there is nothing to reject; "
                    "raise method.own_answers.temperature, or use rows it does not know yet"
                )
            rows[split] = Dataset.from_list(pairs, features=_features(rows[split].column_names))
            log.info("%s: %d rows, %d answered wrongly and kept", split, counts[split]["read"], len(pairs))
    DatasetDict(rows).save_to_disk(output)
    serving.write(output, served_with)
    in_train.copy(splits, output)
    text = json.dumps({**read_json(splits / "audit.json"), "own_answers": counts}, indent=2)
    (output / "audit.json").write_text(text + "\n", encoding="utf-8")
    return {"own_answers": counts}


def _features(names: list[str]):
    """The columns of pairs made of rows with these columns."""
    return features(pairs=True, reasoning="reasoning_start" in names, about=names)


def _pairs(network, tokenizer, rows: list[dict], settings: dict, stop_ids: list[int], file) -> list[dict]:
    """The rows answered wrongly, each with that answer as the rejected one. Writes all answers to `file`."""
    from temper.evaluation.generation import generate_answers

    answers = generate_answers(network, tokenizer, rows, settings, stop_ids)
    pairs = []
    for row, text, ids in zip(rows, answers.texts, answers.ids, strict=True):
        right = text == row["reference"].strip()
        line = {"id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "answer": text, "right": right}
        file.write(json_lines([line]))
        if not right:
            prompt = row["input_ids"][: row["prompt_length"]]
            learned = {"rejected_input_ids": prompt + ids, "rejected_labels": [IGNORED] * len(prompt) + ids}
            if network.config.is_encoder_decoder:
                learned = {"rejected_input_ids": prompt, "rejected_labels": ids}
            pairs.append({**row, **learned, "rejected": text})
    return pairs


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
