"""The metrics: what each is called, what it means, how it is computed from what a model said of a split.

All are shares between 0 and 1 (chrF too, which sacrebleu gives from 0 to 100), except loss (nats per token),
perplexity and rewards. ROUGE and chrF are computed by rouge-score and sacrebleu. A new metric is a function here and
its row in `TASKS` or `ANY_TASK`.
"""

import collections
import dataclasses
import functools
import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from temper.errors import UserError, suggest
from temper.evaluation.class_names import UNPARSED, check_class_names, gold_class, read_class
from temper.evaluation.own_metrics import is_own

# What ROUGE may miss of the gold answers. Accents are up to 5% of German, French, Spanish or Portuguese text, and cost
# it little; of Czech or Vietnamese, where it is more than 10%, the pieces of words between them are compared.
MOST_UNSEEN = 0.1
Statistic = Callable[[Any], float]  # row numbers -> the metric on these rows


class Mean:
    """The statistic of a metric that is a mean over rows.

    `values`: (rows,) float64, the figure of each row.
    """

    def __init__(self, values):
        import numpy as np

        self.values = np.asarray(values, dtype=float)

    def __call__(self, rows) -> float:
        return float(self.values[rows].mean())

    @property
    def is_share(self) -> bool:
        """Whether each row is right or wrong."""
        return set(self.values.tolist()) <= {0.0, 1.0}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric, whole in one row.

    `name`: in configs, files and MLflow. `statistic`: its function of `Evidence`; None where the evidence has nothing
    to compute it from. `ranks`: whether it may rank runs (eval.metric).

    The function's docstring is "title: note", as pages show them. Docstrings are in no stage's key, so better words
    evaluate nothing again.
    """

    name: str
    statistic: Callable[["Evidence"], Statistic | None]
    lower_is_better: bool = False
    ranks: bool = True

    @property
    def title(self) -> str:
        return self._text.partition(": ")[0]

    @property
    def note(self) -> str:
        return self._text.partition(": ")[2].removesuffix(".")

    @property
    def _text(self) -> str:
        return " ".join((inspect.getdoc(self.statistic) or f"{self.name}: ").split())


# --- what there is to judge by -------------------------------------------------------------------


@dataclasses.dataclass
class Evidence:
    """What one model said of a split's rows, and what is right. Lists have one entry for each row.

    Args:
        settings: the config section `eval`.
        choices: task labels: the label that the model finds the likeliest. Accuracy and F1 are those of the choices, as
            is usual for multiple-choice tasks: a model that knows the answer but chats around it is not taken for
            ignorant, and the gain by tuning not for larger than it is. Without choices they are those of the answers.
        loss_sums, loss_tokens: cross entropy in nats, summed over the row's supervised tokens, and how many those are.
        answer_bytes: of the gold answer in UTF-8; None where more than the answer is supervised.
        pair_logps: log-probability of a preference pair's chosen and of its rejected answer.
        pair_tokens: how many tokens of each of the two these are the sum of.
        start_logps: the same of the model that preference optimization started from, and `beta`, the training's.
        finished: whether the answer ended by itself.
        own: name -> figures of the rows by metrics of your own (`eval.metrics`).
        groups: what the rows of one cluster share (`data.splits.group_by`); None: each row stands for itself.
    """

    settings: dict
    gold: Sequence[str]
    predictions: Sequence[str]
    choices: Sequence[str] | None = None
    loss_sums: Sequence[float] | None = None
    loss_tokens: Sequence[int] | None = None
    answer_bytes: Sequence[int] | None = None
    pair_logps: Sequence[tuple[float, float]] | None = None
    pair_tokens: Sequence[tuple[int, int]] | None = None
    start_logps: Sequence[tuple[float, float]] | None = None
    beta: float | None = None
    finished: Sequence[bool] | None = None
    own: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    groups: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.gold)

    def part(self, rows: Sequence[int]) -> "Evidence":
        """The evidence of these rows alone."""
        lists: dict[str, Any] = {
            field.name: [value[row] for row in rows]
            for field in dataclasses.fields(self)
            if field.name not in ("settings", "beta", "own") and (value := getattr(self, field.name)) is not None
        }
        own = {name: [figures[row] for row in rows] for name, figures in self.own.items()}
        return dataclasses.replace(self, **lists, own=own)

    @functools.cached_property
    def readings(self) -> list[str]:
        """Task labels: the label that each row is given, or ``unparsed``."""
        return self.said if self.choices is None else list(self.choices)

    @functools.cached_property
    def said(self) -> list[str]:
        """Task labels: the label that each free answer names, or ``unparsed``."""
        class_names = self.settings["labels"]
        return [read_class(text, class_names) or UNPARSED for text in self.predictions]

    @functools.cached_property
    def gold_classes(self) -> list[str]:
        """Task labels: the label that each gold answer is.

        Raises:
            UserError: one is none of them.
        """
        return gold_classes(self.gold, self.settings["labels"])

    @functools.cached_property
    def sets(self) -> list[tuple[frozenset, frozenset]]:
        """Task tags: the wanted and the given tags."""
        read = functools.partial(read_tags, separator=self.settings["separator"])
        return [(read(wanted), read(given)) for wanted, given in zip(self.gold, self.predictions, strict=True)]

    @functools.cached_property
    def set_scores(self) -> list[tuple[float, float, float]]:
        return [set_scores(*pair) for pair in self.sets]

    @functools.cached_property
    def rewards(self):
        """(rows, 2) of the chosen and of the rejected answer, as TRL defines them; None where nothing was optimized."""
        import numpy as np

        if self.start_logps is None or self.pair_logps is None:
            return None
        return self.beta * (np.array(self.pair_logps) - np.array(self.start_logps))


def gold_classes(texts: Sequence[str], class_names: list[str]) -> list[str]:
    """The labels that gold answers are.

    Raises:
        UserError: one is none of them.
    """
    return [gold_class(text, class_names, f"row {row} of the split") for row, text in enumerate(texts, 1)]


def read_tags(text: str, separator: str = ",") -> frozenset[str]:
    """The set of tags in an answer; case and blanks around a tag do not count, an empty tag is none."""
    tags = (" ".join(unicodedata.normalize("NFC", tag).split()).casefold() for tag in text.split(separator))
    return frozenset(tag for tag in tags if tag)


def set_scores(wanted: frozenset, given: frozenset) -> tuple[float, float, float]:
    """(precision, recall, F1) of one set. Nothing wanted and nothing given is right; only one of them empty is 0."""
    if not wanted and not given:
        return 1.0, 1.0, 1.0
    common = len(wanted & given)
    precision = common / len(given) if given else 0.0
    recall = common / len(wanted) if wanted else 0.0
    return precision, recall, 2 * common / (len(wanted) + len(given))


# --- task labels ---------------------------------------------------------------------------------


def _accuracy(evidence: Evidence) -> Statistic:
    """accuracy: share of rows whose label the model finds the likeliest of all."""
    return Mean([given == wanted for given, wanted in zip(evidence.readings, evidence.gold_classes, strict=True)])


def _macro_f1(evidence: Evidence) -> Statistic:
    """F1: mean of the F1 of all labels that occur (macro)."""
    import numpy as np

    # As scikit-learn's f1_score, which a test holds it against, counted here: 80 times as fast on 500 rows, and a
    # bootstrap asks a thousand times.

    # An unparsed answer counts against its true class, and is no class of its own in the average. Nor is a label that
    # neither the rows nor the answers have: there is nothing to be right or wrong about.
    class_names = evidence.settings["labels"]
    codes = {label: code for code, label in enumerate([*class_names, UNPARSED])}
    wanted, given = (
        np.array([codes[label] for label in column]) for column in (evidence.gold_classes, evidence.readings)
    )

    def f1(rows) -> float:
        true, read = wanted[rows], given[rows]
        right, of_true, of_read = (
            np.bincount(column, minlength=len(codes))[: len(class_names)] for column in (true[true == read], true, read)
        )
        occurs = of_true + of_read > 0
        if not occurs.any():
            return 0.0
        return float((2 * right[occurs] / (of_true + of_read)[occurs]).mean())

    return f1


def _generated_accuracy(evidence: Evidence) -> Statistic:
    """accuracy of free answers: share of generated answers that name the right label; one that names none is wrong."""
    return Mean([said == wanted for said, wanted in zip(evidence.said, evidence.gold_classes, strict=True)])


def _exact_match(evidence: Evidence) -> Statistic:
    """exact match: share of answers equal to the gold answer."""
    pairs = zip(evidence.predictions, evidence.gold, strict=True)
    return Mean([given.strip() == wanted.strip() for given, wanted in pairs])


def _unparsed(evidence: Evidence) -> Statistic | None:
    """no label found: share of generated answers with none of the labels in them."""
    return Mean([said == UNPARSED for said in evidence.said]) if evidence.settings["task"] == "labels" else None


# --- task tags -----------------------------------------------------------------------------------


def _mean_f1(evidence: Evidence) -> Statistic:
    """F1: mean F1 of each row's sets."""
    return Mean([f1 for _, _, f1 in evidence.set_scores])


def _precision(evidence: Evidence) -> Statistic:
    """precision: mean share of given tags that are wanted."""
    return Mean([precision for precision, _, _ in evidence.set_scores])


def _recall(evidence: Evidence) -> Statistic:
    """recall: mean share of wanted tags that are given."""
    return Mean([recall for _, recall, _ in evidence.set_scores])


def _equal_sets(evidence: Evidence) -> Statistic:
    """exact match: share of answers with exactly the wanted tags."""
    return Mean([wanted == given for wanted, given in evidence.sets])


# --- task text -----------------------------------------------------------------------------------


def _rouge_l(evidence: Evidence) -> Statistic | None:
    """ROUGE-L: longest common subsequence with the gold answer, F-measure with stemming, mean over rows."""
    from rouge_score.rouge_scorer import RougeScorer

    if rouge_unseen(evidence.gold) > MOST_UNSEEN:
        return None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(evidence.gold, evidence.predictions, strict=True)
    return Mean([scorer.score(wanted, given)["rougeL"].fmeasure for wanted, given in pairs])


def rouge_unseen(texts: Sequence[str]) -> float:
    """Share of the texts' letters and digits that ROUGE does not see, mean over rows as the metric is.

    rouge-score drops every character but a to z and 0 to 9. What is left would be compared, and look like a figure:
    two texts that share a digit in front of other words are the same to it.
    """
    return sum(map(_unseen, texts)) / len(texts)


def _unseen(text: str) -> float:
    from rouge_score.tokenize import tokenize

    written = sum(unicodedata.category(char)[0] in "LNM" for char in text.lower())
    return 1 - sum(map(len, tokenize(text, None))) / written if written else 1.0


def _chrf(evidence: Evidence) -> Statistic:
    """chrF: character n-gram F-score over the whole split, 0 to 1."""
    import numpy as np
    from sacrebleu.metrics import CHRF

    # Corpus chrF from the n-gram counts of the rows, counted once, however often rows are resampled.
    chrf = CHRF()
    counts = np.array(chrf._extract_corpus_statistics(evidence.predictions, [evidence.gold]))
    return lambda rows: chrf._compute_score_from_stats(counts[rows].sum(axis=0).tolist()).score / 100


# --- any task ------------------------------------------------------------------------------------


def _loss(evidence: Evidence) -> Statistic | None:
    """loss: cross entropy in nats per supervised token of the gold answers."""
    import numpy as np

    if evidence.loss_sums is None:
        return None
    sums, tokens = (np.asarray(column, dtype=float) for column in (evidence.loss_sums, evidence.loss_tokens))
    return lambda rows: float(sums[rows].sum() / max(tokens[rows].sum(), 1.0))


def _perplexity(evidence: Evidence) -> Statistic | None:
    """perplexity: exp(loss)."""
    loss = _loss(evidence)
    return None if loss is None else lambda rows: perplexity(loss(rows))


def _bits_per_byte(evidence: Evidence) -> Statistic | None:
    """bits per byte: cross entropy of the gold answers, with their end, per byte of UTF-8; compares across models."""
    import numpy as np

    if evidence.loss_sums is None or evidence.answer_bytes is None:
        return None
    sums, sizes = (np.asarray(column, dtype=float) for column in (evidence.loss_sums, evidence.answer_bytes))
    return lambda rows: float(sums[rows].sum() / max(sizes[rows].sum(), 1.0) / math.log(2))


def perplexity(loss: float) -> float:
    """exp(loss), kept within what a float holds."""
    return math.exp(min(loss, 700.0))


def _preference_accuracy(evidence: Evidence) -> Statistic | None:
    """preference accuracy: share of pairs whose chosen answer the model finds likelier than the rejected one."""
    pairs = evidence.pair_logps
    return None if pairs is None else Mean([chosen > rejected for chosen, rejected in pairs])


def _preference_accuracy_per_token(evidence: Evidence) -> Statistic | None:
    """preference accuracy per token: the same by the mean log-probability of an answer's tokens, for by their sum
    shorter answers are likelier."""
    pairs, tokens = evidence.pair_logps, evidence.pair_tokens
    if pairs is None or tokens is None:
        return None
    means = [
        (chosen / max(1, of_chosen), rejected / max(1, of_rejected))
        for (chosen, rejected), (of_chosen, of_rejected) in zip(pairs, tokens, strict=True)
    ]
    return Mean([chosen > rejected for chosen, rejected in means])


def _reward_accuracy(evidence: Evidence) -> Statistic | None:
    """reward accuracy: share of pairs in which training raised the chosen answer more than the rejected one."""
    rewards = evidence.rewards
    return None if rewards is None else Mean(rewards[:, 0] > rewards[:, 1])


def _reward_margin(evidence: Evidence) -> Statistic | None:
    """reward margin: reward of the chosen less that of the rejected answer, mean over pairs."""
    rewards = evidence.rewards
    return None if rewards is None else Mean(rewards[:, 0] - rewards[:, 1])


def _reward_chosen(evidence: Evidence) -> Statistic | None:
    """reward, chosen answers: beta times the change of the chosen answer's log-probability by training."""
    rewards = evidence.rewards
    return None if rewards is None else Mean(rewards[:, 0])


def _reward_rejected(evidence: Evidence) -> Statistic | None:
    """reward, rejected answers: beta times the change of the rejected answer's log-probability by training."""
    rewards = evidence.rewards
    return None if rewards is None else Mean(rewards[:, 1])


def _unfinished(evidence: Evidence) -> Statistic | None:
    """cut off: share of answers that did not end within eval.max_new_tokens."""
    return None if evidence.finished is None else Mean([not ended for ended in evidence.finished])


# --- the rows ------------------------------------------------------------------------------------

PREFERENCE, BITS_PER_BYTE = "preference_accuracy", "bits_per_byte"
DOCUMENTS = "documents"  # the task of rows that are raw text: how likely it is, and no answers
OF_PREFERENCE = (PREFERENCE, "preference_accuracy_per_token")
# Of training and its validation, beside those here.
TRAINING_FIGURES = {"logps", "learned_tokens", "pairs", "answers", "nll_loss", "kl"}
PER_TOKEN = ("loss", "perplexity")  # not comparable between models that cut text into other tokens
# A task's own metrics. The first ranks runs unless eval.metric names another, and scores single rows.
TASKS = {
    "labels": (
        Metric("accuracy", _accuracy),
        Metric("f1", _macro_f1),
        Metric("generated_accuracy", _generated_accuracy),
        Metric("exact_match", _exact_match),
    ),
    "tags": (
        Metric("f1", _mean_f1),
        Metric("precision", _precision),
        Metric("recall", _recall),
        Metric("exact_match", _equal_sets),
    ),
    DOCUMENTS: (Metric(BITS_PER_BYTE, _bits_per_byte, lower_is_better=True),),
    "text": (
        Metric("rouge_l", _rouge_l),
        Metric("chrf", _chrf),
        Metric("exact_match", _exact_match),
    ),
}
ANY_TASK = (
    Metric("loss", _loss, lower_is_better=True),
    Metric("perplexity", _perplexity, lower_is_better=True),
    Metric(BITS_PER_BYTE, _bits_per_byte, lower_is_better=True),
    Metric(PREFERENCE, _preference_accuracy),
    Metric(OF_PREFERENCE[1], _preference_accuracy_per_token),
    Metric("rewards/accuracies", _reward_accuracy, ranks=False),
    Metric("rewards/margins", _reward_margin, ranks=False),
    Metric("rewards/chosen", _reward_chosen, ranks=False),
    Metric("rewards/rejected", _reward_rejected, ranks=False),
    Metric(UNPARSED, _unparsed, lower_is_better=True, ranks=False),
    Metric("unfinished", _unfinished, lower_is_better=True, ranks=False),
)


@functools.cache
def metrics_of(task: str) -> dict[str, Metric]:
    """Name -> metric, of all that a task has, in the order in which files and pages show them."""
    return {metric.name: metric for metric in (*TASKS[task], *ANY_TASK)}


def with_own(task: str, names: Iterable[str]) -> dict[str, Metric]:
    """`metrics_of` a task, and those of your own among `names`, which have their name for a title."""
    known = metrics_of(task)
    return known | {name: Metric(name, _own(name)) for name in names if name not in known}


def _own(name: str) -> Callable[[Evidence], Statistic | None]:
    def statistic(evidence: Evidence) -> Statistic | None:
        return Mean(evidence.own[name]) if name in evidence.own else None

    statistic.__doc__ = f"{name}: of your own (eval.metrics), mean over rows."
    return statistic


@functools.cache
def lower_is_better(name: str) -> bool:
    return any(metric.lower_is_better for metric in ANY_TASK if metric.name == name)


def sweeps_model(point: Iterable[str]) -> bool:
    """Whether a model is among swept keys."""
    return any(key == "model" or key.startswith("model.") for key in point)


def check_metric(settings: dict) -> str:
    """The metric that ranks runs. Cheap, so that it can be asked before any job starts.

    Args:
        settings: the config section `eval`.

    Raises:
        UserError: a metric (the ranking one or a published one) that the task does not have; labels that an answer
            could not tell apart.
    """
    task = settings["task"]
    allowed = [name for name, metric in metrics_of(task).items() if metric.ranks]
    name = settings.get("metric") or allowed[0]
    _check_own_names(settings)
    allowed += [metric["name"] for metric in settings.get("metrics") or []]
    if name not in allowed and not is_own(settings, name):
        raise UserError(f"config: 'eval.metric': task '{task}' has no metric '{name}'; {suggest(name, allowed)}")
    for figure in settings.get("published") or []:
        if figure["metric"] not in allowed and not is_own(settings, figure["metric"]):
            known = suggest(figure["metric"], allowed)
            raise UserError(f"config: 'eval.published': '{figure['name']}' has metric '{figure['metric']}'; {known}")
    if task == "labels":
        check_class_names(settings["labels"])
    return name


def _check_own_names(settings: dict) -> None:
    """Refuse names of own metrics that would be taken for something else."""
    ours = {metric.name.partition("/")[0] for metrics in (*TASKS.values(), ANY_TASK) for metric in metrics}
    names = [metric["name"] for metric in settings.get("metrics") or []]
    for name in names:
        if name in ours | TRAINING_FIGURES or name.endswith(("_low", "_high")):
            why = "is a figure of Temper's" if name in ours | TRAINING_FIGURES else "looks like the end of an interval"
            raise UserError(f"config: 'eval.metrics': '{name}' {why}: give it another name")
        if names.count(name) > 1:
            raise UserError(f"config: 'eval.metrics': two are called '{name}': give one of them another name")


def refuse_without_pairs(settings: dict, has_pairs: bool) -> None:
    """Raises: UserError: a figure of preference pairs is asked for, and there are none."""
    asked = [("eval.metric", settings["metric"])]
    asked += [("eval.published", figure["metric"]) for figure in settings["published"]]
    for key, metric in asked:
        if metric in OF_PREFERENCE and not has_pairs:
            raise UserError(f"config: '{key}': {metric} needs preference pairs, see data.layout=preference")


# --- scoring -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scores:
    """Figures for one model on a split.

    `values`: metric -> figure on all rows. `rows`: one score per row, between 0 and 1, as the samples show it.
    `statistics`: metric -> function from row numbers to the figure on these rows, for intervals.
    """

    values: dict[str, float]
    rows: list[float]
    statistics: dict[str, Statistic]


def score(evidence: Evidence) -> Scores:
    """Score a model with all metrics that the task has and the evidence allows.

    Raises:
        UserError: task labels, and a gold answer is none of them.
    """
    known = with_own(evidence.settings["task"], evidence.own)
    found = {name: metric.statistic(evidence) for name, metric in known.items()}
    statistics = {name: statistic for name, statistic in found.items() if statistic is not None}
    everything = range(len(evidence))
    values = {name: statistic(everything) for name, statistic in statistics.items()}
    of_rows = next(iter(statistics.values()))
    return Scores(values, [of_rows([row]) for row in everything], statistics)


# --- label tasks: what is confused with what -----------------------------------------------------


def per_class(evidence: Evidence) -> dict[str, dict[str, float]]:
    """label -> precision, recall, f1 and how many rows of the split have it."""
    from sklearn.metrics import precision_recall_fscore_support

    class_names = evidence.settings["labels"]
    columns = precision_recall_fscore_support(
        evidence.gold_classes, evidence.readings, labels=class_names, zero_division=0
    )
    names = ("precision", "recall", "f1", "rows")
    table = zip(*(column.tolist() for column in columns), strict=True)
    return {label: dict(zip(names, figures, strict=True)) for label, figures in zip(class_names, table, strict=True)}


def confusion(evidence: Evidence) -> dict:
    """Counts by true label (lines) and read label (columns; ``unparsed`` last, if there is any)."""
    from sklearn.metrics import confusion_matrix

    class_names = list(evidence.settings["labels"])
    columns = [*class_names, UNPARSED] if UNPARSED in evidence.readings else class_names
    counts = confusion_matrix(evidence.gold_classes, evidence.readings, labels=columns)[: len(class_names)]
    return {"labels": class_names, "columns": columns, "counts": counts.tolist()}


MOST_LEARNED = 20_000  # rows that the trained baseline learns from: seconds


def baselines(settings: dict, train: list[dict], rows: list[dict]) -> list[dict]:
    """What needs no language model.

    Args:
        train, rows: those learned from and those judged on, with `prompt` and `reference`.

    Returns:
        {"name", "answer" where it is always the same, metric: its figure on `rows`}
    """
    task, gold = settings["task"], [row["reference"] for row in rows]
    given = {}
    if task in ("labels", "tags"):
        answer = _most_frequent(settings, [row["reference"] for row in train] or gold)
        name = "majority class" if task == "labels" else "most frequent tag"
        given[name] = {"answer": answer}, [answer] * len(gold)
    if task == "labels" and (answers := _classified(settings, train, rows)):
        given["tf-idf, logistic regression"] = {}, answers
    found = []
    for name, (more, answers) in given.items():
        values = score(Evidence(settings, gold, answers)).values
        found.append({"name": name, **more, **{metric.name: values[metric.name] for metric in TASKS[task]}})
    return found


def _most_frequent(settings: dict, texts: Sequence[str]) -> str:
    if settings["task"] == "labels":
        seen = gold_classes(texts, settings["labels"])
    else:
        seen = [tag for text in texts for tag in sorted(read_tags(text, settings["separator"]))]
    return max(collections.Counter(seen).items(), key=lambda counted: counted[1], default=("", 0))[0]


def _classified(settings: dict, train: list[dict], rows: list[dict]) -> list[str] | None:
    """Answers of a classifier that costs nothing, trained on the same rows: any tuned model should beat it.

    Logistic regression on tf-idf of the prompts' words and pairs of words. None where it has nothing to learn.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    learned = train[:MOST_LEARNED]
    wanted = gold_classes([row["reference"] for row in learned], settings["labels"])
    prompts = [row["prompt"] for row in learned]
    if len(set(wanted)) < 2 or not any(re.search(r"\w\w", prompt) for prompt in prompts):
        return None
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return model.fit(prompts, wanted).predict([row["prompt"] for row in rows]).tolist()
