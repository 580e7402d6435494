"""EleutherAI's lm-eval on a model of ours: its figures, and how they differ from those of the untouched model."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from temper.errors import UserError, lack, words
from temper.evaluation.figures import Number
from temper.files import read_json, read_json_lines
from temper.hashing import digest

FILE = "harness.json"
SAMPLES = "samples.jsonl"
log = logging.getLogger("temper")


class Metric(BaseModel):
    """A figure of a task. `stderr`: its standard error, over the rows. `base`: of the untouched model; `difference`: by
    how much this model has more, with its standard error over the same rows, where the figure is a mean over rows."""

    model_config = ConfigDict(strict=True, extra="ignore")
    value: Number
    stderr: float | None = None
    higher_is_better: bool | None = None
    base: float | None = None
    base_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


class Task(BaseModel):
    """A task, or a group of tasks. `asked`: a hash of rows and prompts; None: a group, which has none of its own."""

    model_config = ConfigDict(strict=True, extra="ignore")
    version: str | float | None
    num_fewshot: int | None
    rows: int | None
    asked: str | None
    metrics: dict[str, Metric]


class Harness(BaseModel):
    """What lm-eval measured of a model, as harness.json has it."""

    model_config = ConfigDict(strict=True, extra="ignore")
    lm_eval: str
    apply_chat_template: bool
    tasks: dict[str, Task]

    def figures(self) -> dict[str, float]:
        """``harness_<task>_<metric>`` -> figure, and ``base_harness_...`` of the untouched model."""
        found = {}
        for task, result in self.tasks.items():
            for name, metric in result.metrics.items():
                found[f"harness_{task}_{name}"] = metric.value
                if metric.base is not None:
                    found[f"base_harness_{task}_{name}"] = metric.base
        return found


def read_harness(folder: Path) -> Harness:
    """Raises: UserError: it is not there, or damaged."""
    return read_json(folder / FILE, Harness)


def measure(
    network, tokenizer, settings: dict, include_path: Path | None, max_length: int | None, metadata: dict[str, Any]
) -> dict:
    """What `lm_eval.simple_evaluate` returns for a network.

    Args:
        settings: the config section `eval.harness`, with `apply_chat_template`.
        max_length: of one text, in tokens; None: lm-eval finds it in the model's config.
        metadata: what tasks may know of the model.

    Raises:
        UserError: a task that cannot be loaded, or that runs what the model writes.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks, manager = _loaded(settings["tasks"], include_path, metadata)
    model = HFLM(
        pretrained=network,
        tokenizer=tokenizer,
        backend="seq2seq" if network.config.is_encoder_decoder else "causal",
        batch_size=settings["batch_size"],
        max_length=max_length,
    )
    # Under its own seeds, which are constants.
    return lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        batch_size=settings["batch_size"],
        apply_chat_template=settings["apply_chat_template"],
    )


def _loaded(names: list[str], include_path: Path | None, metadata: dict[str, Any]) -> tuple[list, Any]:
    """(tasks and groups, with their rows, the manager that knows them)."""
    manager = task_manager(names, include_path, metadata)
    try:
        loaded = manager.load(names)
    except Exception as error:
        if isinstance(error, UserError) or lack(error, "eval.harness"):
            raise
        raise _not_loaded(names, manager, error) from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(
            f"eval.harness: task '{unsafe[0]}' runs code that the model writes, which Temper never does: leave it out, "
            "and run it with lm-eval itself in a container"
        )
    groups = [loaded["groups"][name] for name in dict.fromkeys(names) if name in loaded["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)], manager


def task_manager(names: list[str], include_path: Path | None, metadata: dict[str, Any] | None = None):
    """lm-eval's index of tasks. It takes half a minute to read its own, so only if one of them may be needed."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager(metadata=metadata)
    own = TaskManager(include_path=str(include_path), include_defaults=False, metadata=metadata)
    if set(names) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(include_path), metadata=metadata)


def _not_loaded(names: list[str], manager, error: Exception) -> UserError:
    """Why tasks cannot be loaded: found by loading one after the other, for the name."""
    for name in names:
        try:
            manager.load([name])
        except Exception as inner:
            chain = f"{type(inner).__name__}: {words(inner)}"
            hub = any(word in chain for word in ("Hub", "huggingface", "ConnectionError", "offline", "Offline"))
            advice = (
                "its rows are on the hub, which cannot be reached: run it where there is a network (and HF_HUB_OFFLINE "
                "is not set), or use tasks with rows of your own (eval.harness.include_path)"
                if hub
                else "correct the task's file"
            )
            return UserError(f"eval.harness: task '{name}' cannot be loaded: {advice} ({chain})")
    return UserError(f"eval.harness: tasks cannot be loaded together: {words(error)}")


# --- results -------------------------------------------------------------------------------------


def results_of(found: dict, settings: dict) -> Harness:
    """The figures in what `lm_eval.simple_evaluate` returned."""
    tasks = {}
    for name, values in found["results"].items():
        shots, version = found["n-shot"].get(name), found["versions"].get(name)
        tasks[name] = Task(
            version=None if version in (None, "N/A") else version,
            num_fewshot=shots if isinstance(shots, int) else None,
            rows=found["n-samples"].get(name, {}).get("effective"),
            asked=_asked(found["samples"][name]) if name in found["samples"] else None,
            metrics=_metrics(values, found["higher_is_better"].get(name, {})),
        )
        if settings["num_fewshot"] not in (None, tasks[name].num_fewshot) and name in found["samples"]:
            log.info("%s: asked with %s examples: its file says so, whatever num_fewshot", name, shots)
    return Harness(lm_eval=found["lm_eval_version"], apply_chat_template=settings["apply_chat_template"], tasks=tasks)


def _metrics(values: dict, higher_is_better: dict) -> dict[str, Metric]:
    """lm-eval calls figures ``acc,none`` and ``acc_stderr,none``: the metric, and the filter of the answers."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        found[_name(metric, chosen)] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            higher_is_better=higher_is_better.get(metric),
        )
    return found


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric}/{chosen}"


def _asked(samples: list[dict]) -> str:
    """A hash of the rows and the prompts made of them."""
    return digest([[row["doc_hash"], row["prompt_hash"], row["target_hash"]] for row in samples])


def sample_rows(found: dict) -> list[dict]:
    """Each row of each task: the prompt, what was expected, what the model answered, and its figures."""
    rows = []
    for task, samples in found["samples"].items():
        for row in samples:
            figures = {_name(name, row["filter"]): _number(row[name]) for name in row["metrics"]}
            rows.append(
                {
                    "task": task,
                    "row": row["doc_id"],
                    "prompt": row["arguments"][0][0],
                    "target": _plain(row["target"]),
                    "answer": _plain(row["filtered_resps"]),
                    "figures": {name: value for name, value in figures.items() if value is not None},
                }
            )
    return rows


def _number(value) -> float | None:
    """A row's figure; None for what is only a part of one, as the pairs of a word perplexity are."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return None


def _plain(value):
    """Texts, numbers and lists of them as JSON holds them."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | int | float | None):
        return value
    return value.item() if hasattr(value, "item") else str(value)


# --- beside the untouched model ------------------------------------------------------------------


def compare(found: Harness, samples: list[dict], base: Path) -> None:
    """Put the figures of the untouched model beside those of `found`.

    Args:
        samples: see `sample_rows`.
        base: the folder of the untouched model's figures.

    Raises:
        UserError: it has other tasks.
    """
    other, others = read_harness(base), _figures(read_json_lines(base / SAMPLES))
    mine = _figures(samples)
    for name, task in found.tasks.items():
        before = other.tasks.get(name)
        if before is None:
            raise UserError(f"--base-harness {base}: has no task '{name}': run it with the same eval.harness")
        if before.asked != task.asked:
            log.info("%s: the untouched model was asked other rows or prompts, so the two are not compared", name)
            continue
        for metric, figure in task.metrics.items():
            if metric in before.metrics:
                _beside(figure, before.metrics[metric], mine.get((name, metric), []), others.get((name, metric), []))


def _beside(figure: Metric, base: Metric, mine: list[float], others: list[float]) -> None:
    figure.base, figure.base_stderr = base.value, base.stderr
    figure.difference = figure.value - base.value
    if len(mine) == len(others) > 1 and _is_mean(figure, mine) and _is_mean(base, others):
        figure.difference_stderr = _stderr([a - b for a, b in zip(mine, others, strict=True)])


def _figures(samples: list[dict]) -> dict[tuple[str, str], list[float]]:
    """(task, metric) -> the figure of each row."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in samples:
        for name, value in row["figures"].items():
            found.setdefault((row["task"], name), []).append(value)
    return found


def _is_mean(figure: Metric, values: list[float]) -> bool:
    return math.isclose(figure.value, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9)


def _stderr(values: list[float]) -> float:
    """The standard error of a mean."""
    import statistics

    return statistics.stdev(values) / math.sqrt(len(values))
