"""Metrics on the test split: which there are per task, how an answer is read, how sure a figure is.

All are shares between 0 and 1 (chrF too, which sacrebleu gives from 0 to 100), except loss (nats per token) and
perplexity. The computing is left to scikit-learn, rouge-score and sacrebleu.
"""

import collections
import dataclasses
import functools
import math
import unicodedata
from collections.abc import Callable
from typing import Any

from temper.errors import UserError, suggest
from temper.evaluation.class_names import UNPARSED, check_labels, gold_label, read_label


def refuse_without_pairs(evaluation: dict, has_pairs: bool) -> None:
    """Raises: UserError: a figure of preference pairs is asked for, and there are none."""
    asked = [("eval.metric", evaluation["metric"])]
    asked += [("eval.published", figure["metric"]) for figure in evaluation["published"]]
    for key, metric in asked:
        if metric == PREFERENCE and not has_pairs:
            raise UserError(f"config: '{key}': {PREFERENCE} needs preference pairs, see data.layout=preference")


# The task's metrics; the first ranks runs unless eval.metric names another.
METRICS = {
    "labels": ("accuracy", "f1", "generated_accuracy", "exact_match"),
    "tags": ("f1", "precision", "recall", "exact_match"),
    "text": ("rouge_l", "chrf", "exact_match"),
}
LOSS_METRICS = ("loss", "perplexity")
REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")  # against a reference
LOWER_IS_BETTER = frozenset({*LOSS_METRICS, "unparsed", "unfinished"})
# What ROUGE may miss of the references. Accents are up to 5% of German, French, Spanish or Portuguese text, and cost it
# little; of Czech or Vietnamese, where it is more than 10%, the pieces of words between them are compared.
MOST_UNSEEN = 0.1
RESAMPLES = 1000
SEED = 0  # of the bootstrap: the same answers give the same interval
Statistic = Callable[[Any], float]  # row numbers -> the metric on these rows


# --- what may be asked for -----------------------------------------------------------------------


def check_metric(eval_config: dict) -> str:
    """The metric that ranks runs. Cheap, so that it can be asked before any job starts.

    Raises:
        UserError: a metric (the ranking one or a published one) that the task does not have; labels that an answer
            could not tell apart.
    """
    task = eval_config["task"]
    allowed = (*METRICS[task], *LOSS_METRICS, PREFERENCE)
    metric = eval_config.get("metric") or METRICS[task][0]
    if metric not in allowed:
        raise UserError(f"config: 'eval.metric': task '{task}' has no metric '{metric}'; {suggest(metric, allowed)}")
    for figure in eval_config.get("published") or []:
        if figure["metric"] not in allowed:
            known = suggest(figure["metric"], allowed)
            raise UserError(f"config: 'eval.published': '{figure['name']}' has metric '{figure['metric']}'; {known}")
    if task == "labels":
        check_labels(eval_config["labels"])
    return metric


# --- reading answers -----------------------------------------------------------------------------


def read_tags(text: str, separator: str = ",") -> frozenset[str]:
    """The set of tags in an answer; case and blanks around a tag do not count, an empty tag is none."""
    tags = (" ".join(unicodedata.normalize("NFC", tag).split()).casefold() for tag in text.split(separator))
    return frozenset(tag for tag in tags if tag)


def set_scores(reference: frozenset, prediction: frozenset) -> tuple[float, float, float]:
    """(precision, recall, F1) of one set. Nothing wanted and nothing given is right; only one of them empty is 0."""
    if not reference and not prediction:
        return 1.0, 1.0, 1.0
    common = len(reference & prediction)
    precision = common / len(prediction) if prediction else 0.0
    recall = common / len(reference) if reference else 0.0
    return precision, recall, 2 * common / (len(reference) + len(prediction))


# --- scoring -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scores:
    """Figures for one model on the test split.

    `values`: metric -> figure on all rows. `rows`: one score per row, between 0 and 1, as the samples show it.
    `statistics`: metric -> function from row numbers to the figure on these rows, for intervals.
    `readings`: task labels only: the label each row is given, or ``unparsed``.
    """

    values: dict[str, float]
    rows: list[float]
    statistics: dict[str, Statistic]
    readings: list[str] | None = None


def score(eval_config: dict, references: list[str], predictions: list[str], choices: list[str] | None = None) -> Scores:
    """Score answers with all metrics of the task.

    Args:
        choices: task labels: the label that the model finds likeliest of all, row by row. Accuracy and F1 are those of
            the choices, as is usual for multiple-choice tasks: a model that knows the answer but chats around it is not
            taken for ignorant, and the gain by tuning not for larger than it is. `generated_accuracy` and ``unparsed``
            are those of the free answers. Without choices all are.

    Raises:
        UserError: task labels, and a reference is none of them.
    """
    scorer = {"labels": _score_labels, "tags": _score_tags, "text": _score_text}[eval_config["task"]]
    statistics, rows, readings = scorer(eval_config, references, predictions, choices)
    exact = [float(given.strip() == wanted.strip()) for given, wanted in zip(predictions, references, strict=True)]
    statistics.setdefault("exact_match", _mean_of(exact))
    everything = range(len(references))
    values = {name: statistic(everything) for name, statistic in statistics.items()}
    return Scores(values, rows, statistics, readings)


def _score_labels(eval_config: dict, references: list[str], predictions: list[str], choices: list[str] | None):
    import numpy as np
    from sklearn.metrics import f1_score

    labels = eval_config["labels"]
    codes = {label: code for code, label in enumerate([*labels, UNPARSED])}
    free = [read_label(text, labels) or UNPARSED for text in predictions]
    readings = free if choices is None else choices
    columns = (gold_labels(references, labels), readings, free)
    true, read, said = (np.array([codes[label] for label in column]) for column in columns)

    # An unparsed answer counts against its true class, and is no class of its own in the average. Nor is a label that
    # neither the rows nor the answers have: there is nothing to be right or wrong about.
    def f1(rows):
        present = np.setdiff1d(np.union1d(true[rows], read[rows]), [codes[UNPARSED]])
        return float(f1_score(true[rows], read[rows], labels=present, average="macro", zero_division=0))

    right = (true == read).astype(float)
    unparsed = [float(reading == UNPARSED) for reading in free]
    statistics = {"accuracy": _mean_of(right), "f1": f1, "generated_accuracy": _mean_of(true == said)}
    statistics[UNPARSED] = _mean_of(unparsed)
    return statistics, right.tolist(), readings


def gold_labels(references: list[str], labels: list[str]) -> list[str]:
    """The labels that references are.

    Raises:
        UserError: one is none of them.
    """
    return [gold_label(text, labels, f"row {row} of the split") for row, text in enumerate(references, 1)]


def _score_tags(eval_config: dict, references: list[str], predictions: list[str], _choices):
    read = functools.partial(read_tags, separator=eval_config["separator"])
    pairs = [(read(wanted), read(given)) for wanted, given in zip(references, predictions, strict=True)]
    precision, recall, f1 = zip(*(set_scores(*pair) for pair in pairs), strict=True)
    statistics = {
        "f1": _mean_of(f1),
        "precision": _mean_of(precision),
        "recall": _mean_of(recall),
        "exact_match": _mean_of([float(wanted == given) for wanted, given in pairs]),
    }
    return statistics, list(f1), None


def _score_text(_eval_config: dict, references: list[str], predictions: list[str], _choices):
    from rouge_score.rouge_scorer import RougeScorer

    statistics = {"chrf": _chrf(references, predictions)}
    if rouge_unseen(references) > MOST_UNSEEN:
        chrf = statistics["chrf"]
        return statistics, [chrf([row]) for row in range(len(references))], None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    rows = [scorer.score(wanted, given)["rougeL"].fmeasure for wanted, given in pairs]
    return {"rouge_l": _mean_of(rows), **statistics}, rows, None


def rouge_unseen(references: list[str]) -> float:
    """Share of the references' letters and digits that ROUGE does not see, mean over rows as the metric is.

    rouge-score drops every character but a to z and 0 to 9. What is left would be compared, and look like a figure:
    two texts that share a digit in front of other words are the same to it.
    """
    return sum(map(_unseen, references)) / len(references)


def _unseen(text: str) -> float:
    from rouge_score.tokenize import tokenize

    written = sum(unicodedata.category(char)[0] in "LNM" for char in text.lower())
    return 1 - sum(map(len, tokenize(text, None))) / written if written else 1.0


def _chrf(references: list[str], predictions: list[str]) -> Statistic:
    """Corpus chrF from the n-gram counts of the rows, counted once, however often rows are resampled."""
    import numpy as np
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    counts = np.array(chrf._extract_corpus_statistics(predictions, [references]))
    return lambda rows: chrf._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score / 100


def _mean_of(values) -> Statistic:
    import numpy as np

    array = np.asarray(values, dtype=float)
    return lambda rows: float(array[rows].mean())


def loss_statistics(sums: list[float], tokens: list[int]) -> dict[str, Statistic]:
    """Loss per token and perplexity from each row's summed loss and number of tokens."""
    import numpy as np

    losses, counts = np.asarray(sums, dtype=float), np.asarray(tokens, dtype=float)

    def loss(rows) -> float:
        return float(losses[rows].sum() / max(counts[rows].sum(), 1.0))

    return {"loss": loss, "perplexity": lambda rows: perplexity(loss(rows))}


def preference_statistic(chosen: list[float], rejected: list[float]) -> Statistic:
    """Share of rows whose chosen answer is likelier than the rejected one, from the log-probabilities of both."""
    return _mean_of([float(good > bad) for good, bad in zip(chosen, rejected, strict=True)])


def rewards(beta: float, rows: list[dict], references: list[dict]) -> dict[str, float]:
    """What preference optimization changed: means of TRL's figures over the test split.

    Args:
        beta: the training's.
        rows: of the tuned model: chosen_logp, rejected_logp.
        references: of the model it started from: ref_chosen_logps, ref_rejected_logps.
    """
    import numpy as np

    logps = np.array([[row["chosen_logp"], row["rejected_logp"]] for row in rows])
    before = np.array([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in references])
    chosen, rejected = (beta * (logps - before)).T
    figures = (chosen > rejected, chosen - rejected, chosen, rejected)
    return {name: float(figure.mean()) for name, figure in zip(REWARDS, figures, strict=True)}


def perplexity(loss: float) -> float:
    """exp(loss), kept within what a float holds."""
    return math.exp(min(loss, 700.0))


# --- how sure ------------------------------------------------------------------------------------


def interval(statistic: Statistic, rows: int) -> list[float]:
    """95% bootstrap interval: the metric's 2.5% and 97.5% quantiles over 1,000 test splits drawn from this one.

    It says how much the figure could move with other test rows of the same kind. Training again with another seed moves
    it too; that is not in here.
    """
    import numpy as np

    rng = np.random.default_rng(SEED)
    values = [statistic(rng.integers(rows, size=rows)) for _ in range(RESAMPLES)]
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def delta_interval(ours: Statistic, theirs: Statistic, rows: int) -> list[float]:
    """95% interval of `ours` - `theirs` on the same rows: narrower than two intervals side by side suggest."""
    return interval(lambda picked: ours(picked) - theirs(picked), rows)


# --- label tasks: what is confused with what -------------------------------------------------------


def per_class(labels: list[str], references: list[str], readings: list[str]) -> dict[str, dict[str, float]]:
    """label -> precision, recall, f1 and how many rows of the test split have it."""
    from sklearn.metrics import precision_recall_fscore_support

    wanted = gold_labels(references, labels)
    columns = precision_recall_fscore_support(wanted, readings, labels=labels, zero_division=0)
    names = ("precision", "recall", "f1", "rows")
    table = zip(*(column.tolist() for column in columns), strict=True)
    return {label: dict(zip(names, figures, strict=True)) for label, figures in zip(labels, table, strict=True)}


def confusion(labels: list[str], references: list[str], readings: list[str]) -> dict:
    """Counts by true label (lines) and read label (columns; ``unparsed`` last, if there is any)."""
    from sklearn.metrics import confusion_matrix

    columns = [*labels, UNPARSED] if UNPARSED in readings else list(labels)
    wanted = gold_labels(references, labels)
    counts = confusion_matrix(wanted, readings, labels=columns)[: len(labels)]
    return {"labels": list(labels), "columns": columns, "counts": counts.tolist()}


def majority_baseline(eval_config: dict, train_references: list[str], references: list[str]) -> dict:
    """What always giving the training split's most frequent label, or tag, would score on the test split."""
    task = eval_config["task"]
    if task == "labels":
        seen = gold_labels(train_references or references, eval_config["labels"])
    else:
        texts = train_references or references
        seen = [tag for text in texts for tag in sorted(read_tags(text, eval_config["separator"]))]
    majority = max(collections.Counter(seen).items(), key=lambda counted: counted[1], default=("", 0))[0]
    scores = score(eval_config, references, [majority] * len(references))
    name = "majority class" if task == "labels" else "most frequent tag"
    return {"name": name, "answer": majority, **{metric: scores.values[metric] for metric in METRICS[task]}}


PREFERENCE = "preference_accuracy"  # the metric of any task whose splits have preference pairs
