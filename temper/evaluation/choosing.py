"""A metric of answers as the figure that chooses a training's checkpoint.

Only trainings that ask for it depend on this module and what it imports: they import it by name, and the planner puts
its code into their keys. So an edit to how answers are judged trains nothing else again.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from temper.errors import UserError, suggest
from temper.evaluation import generation, likelihoods, own_metrics
from temper.evaluation.choices import likeliest
from temper.evaluation.metrics import MOST_UNSEEN, Evidence, rouge_unseen, with_own
from temper.evaluation.own_metrics import code as own_code
from temper.model.loading import stop_token_ids
from temper.sources.own_code import refuse_changed
from temper.units import count, seconds

log = logging.getLogger("temper")


class ValidationJudge:
    """Judges the model that is being trained by its answers to the validation split. Draws no random numbers.

    Args:
        metric: of the task, or of your own.
        settings: the config section `eval`.
        by_answers: whether the metric takes generated answers, or the likeliest labels alone.
        rows: the splits.
        folder: the model that is trained, for the tokens that end an answer.
        evaluations: about how often it will be asked, for the log.
        planned_code: what the plan found of own metrics.

    Raises:
        UserError: ROUGE-L cannot see these texts; an own metric fails, or gives no figure of this name.
    """

    def __init__(
        self,
        metric: str,
        settings: dict,
        by_answers: bool,
        rows,
        folder: Path,
        tokenizer,
        evaluations: int,
        planned_code: dict[str, str] | None,
    ):
        self.metric, self.settings, self.by_answers, self.splits = metric, settings, by_answers, rows
        self.rows, self.tokenizer = list(rows["validation"]), tokenizer
        self.stop_ids = stop_token_ids(folder, tokenizer)
        self.left, self.asked = evaluations, 0
        refuse_changed(planned_code, own_code(settings))
        self._check()
        log.info("%s", self._cost())

    def _check(self) -> None:
        place = "config: 'train.metric_for_best_model'"
        if self.metric == "rouge_l" and rouge_unseen([row["reference"] for row in self.rows]) > MOST_UNSEEN:
            raise UserError(f"{place}: ROUGE-L sees the letters a to z and digits only: choose eval_chrf")
        if own_metrics.is_own(self.settings, self.metric):
            known = own_metrics.names(self.settings, self.rows[0])
            if self.metric not in known:
                raise UserError(f"{place}: no metric '{self.metric}'; {suggest(self.metric, known)}")

    def _cost(self) -> str:
        what = f"an answer of up to {self.settings['max_new_tokens']} tokens to each"
        if not self.by_answers:
            what = f"the likelihood of {len(self.settings['labels'])} labels for each"
        rows = f"of {count(len(self.rows))} validation rows"
        return f"eval_{self.metric} chooses the checkpoint: each of about {self.left} evaluations takes {what} {rows}"

    def __call__(self, model) -> float:
        """The metric of the model as it is now."""
        started = time.perf_counter()
        evidence = self._evidence(model)
        statistic = with_own(self.settings["task"], evidence.own)[self.metric].statistic(evidence)
        assert statistic is not None, "it was checked that these rows have it"
        value = statistic(range(len(evidence)))
        took = time.perf_counter() - started
        self.left, self.asked = max(0, self.left - 1), self.asked + 1
        more = f"; {self.left} more make about {seconds(self.left * took)}" if self.asked == 1 and self.left else ""
        log.info("validation %s %.4f, which took %s%s", self.metric, value, seconds(took), more)
        return value

    def _evidence(self, model) -> Evidence:
        rows, gold = self.rows, [row["reference"] for row in self.rows]
        size = self.settings["batch_size"], self.tokenizer.pad_token_id
        if not self.by_answers:
            whose = "the model in training", "validation"
            found = likeliest(model, self.splits, rows, self.settings["labels"], self.tokenizer, size, whose)
            return Evidence(self.settings, gold, [""] * len(rows), choices=found.chosen)
        matched = likelihoods.row_losses(model, rows, *size).matched
        known = generation.greedy_gold(rows, matched, self.settings, self.stop_ids)
        answers = generation.generate_answers(model, self.tokenizer, rows, self.settings, self.stop_ids, known)
        answered = own_metrics.answered(rows, prediction=answers.texts, finished=answers.finished)
        own = own_metrics.values(self.settings, answered)
        return Evidence(self.settings, gold, answers.texts, finished=answers.finished, own=own)
