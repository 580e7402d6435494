"""Which figure of the validation split chooses a training's checkpoint (`train.metric_for_best_model`).

The loss, and in preference optimization the rewards, are computed in any case. A metric of the task, or one of your
own, takes an answer to each validation row, at each evaluation: such a training sees how answers are judged, and its
key has it.
"""

from temper.errors import UserError, suggest
from temper.evaluation.metrics import TASKS
from temper.evaluation.own_metrics import is_own

JUDGING = "temper.evaluation.choosing"  # the module, which only trainings with such a metric import
OF_CHOICES = ("accuracy", "f1")  # task labels: of the likeliest label, for which no answer is generated
SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # learning rates that go by the same figure


def judged_metric(train: dict) -> str | None:
    """The metric of answers that chooses the checkpoint; None where it is a figure of the training itself."""
    name = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    return None if name in ("loss", "nll_loss") or name.startswith(("rewards/", "logps/")) else name


def needs_answers(settings: dict, metric: str) -> bool:
    """Whether answers are generated for this metric, by the config section `eval`."""
    return settings["task"] != "labels" or metric not in OF_CHOICES


def judging_settings(train: dict, settings: dict) -> dict | None:
    """The part of the config section `eval` that the training's checkpoint depends on; None: nothing."""
    metric = judged_metric(train)
    if metric is None:
        return None
    names = ["task", "labels", "separator", "batch_size"]
    if needs_answers(settings, metric):
        names += ["max_new_tokens", "do_sample", "temperature", "top_p"]
    own = [one for one in settings["metrics"] if one["name"] == metric.partition("/")[0]]
    return {name: settings[name] for name in names} | {"metrics": own}


def check(train: dict, settings: dict | None) -> None:
    """Check a metric of answers that chooses the checkpoint.

    Args:
        settings: the config section `eval`.

    Raises:
        UserError: the task has no such metric, nothing would use it, or it would be used the wrong way round.
    """
    metric, key = judged_metric(train), "config: 'train.metric_for_best_model'"
    if metric is None:
        return
    if settings is None:
        raise UserError(f"{key}: '{metric}' needs the section `eval`, which says how answers are judged")
    known = [one.name for one in TASKS[settings["task"]] if not one.lower_is_better] + [
        one["name"] for one in settings["metrics"]
    ]
    if metric not in known and not is_own(settings, metric):
        task = settings["task"]
        raise UserError(f"{key}: validation of task '{task}' has no '{metric}'; {suggest(metric, ['loss', *known])}")
    if train.get("lr_scheduler_type") in SCHEDULES:
        name = train["lr_scheduler_type"]
        raise UserError(f"{key}: lr_scheduler_type={name} would go by '{metric}' as by a loss: choose another schedule")
    if not train.get("load_best_model_at_end"):
        raise UserError(f"{key}: '{metric}' does nothing without train.load_best_model_at_end=true: add it")
    if train.get("greater_is_better") is False:
        raise UserError(f"config: 'train.greater_is_better': of '{metric}' more is better: leave it out")
