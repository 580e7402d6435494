"""Metrics: against figures worked out by hand, against the libraries, and what must hold for any input."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.config.schema import Eval
from temper.errors import UserError
from temper.evaluation import class_names, intervals, metrics
from temper.evaluation.metrics import Evidence, Mean, score

LABELS = ["negative", "positive"]


def labels_config(**changes) -> dict:
    return Eval(task="labels", labels=LABELS, **changes).model_dump(mode="json")


def scored(settings: dict, gold: list[str], predictions: list[str], choices: list[str] | None = None):
    return score(Evidence(settings, gold, predictions, choices))


def rows_of(gold: list[str], prompts: list[str] | None = None) -> list[dict]:
    return [
        {"prompt": prompt, "reference": answer}
        for prompt, answer in zip(prompts or ["?"] * len(gold), gold, strict=True)
    ]


# --- what may be asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(("task", "metric"), [("labels", "accuracy"), ("tags", "f1"), ("text", "rouge_l")])
def test_each_task_has_a_ranking_metric(task, metric):
    config = labels_config() if task == "labels" else Eval(task=task).model_dump(mode="json")
    assert metrics.check_metric(config) == metric


@pytest.mark.parametrize("metric", ["f1", "loss", "perplexity"])
def test_another_metric_may_rank(metric):
    assert metrics.check_metric(labels_config(metric=metric)) == metric


def test_unknown_metric_names_the_allowed():
    with pytest.raises(
        UserError,
        match="'eval.metric': task 'labels' has no metric 'bleu'; allowed: accuracy, bits_per_byte, exact_match, f1",
    ):
        metrics.check_metric(labels_config(metric="bleu"))


def test_published_figure_must_be_of_the_tasks_metrics():
    published = [{"name": "VADER", "metric": "F1 score", "value": 0.61, "source": "paper"}]
    with pytest.raises(UserError, match="'eval.published': 'VADER' has metric 'F1 score'"):
        metrics.check_metric(labels_config(published=published))


def test_labels_that_read_the_same_are_refused():
    config = Eval(task="labels", labels=["C", " C"]).model_dump(mode="json")
    with pytest.raises(UserError, match="'C' and ' C' are one"):
        metrics.check_metric(config)


# --- reading answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        (" Positive.\n", "positive"),
        ("**NEGATIVE**", "negative"),
        ("The movie review is positive, but it", "positive"),
        ("negative, not positive", "negative"),
        ("not positive", "positive"),  # the rule looks for words only
        ("positively", None),
        ("", None),
        ("I cannot say.", None),
    ],
)
def test_read_label(answer, label):
    assert class_names.read_class(answer, LABELS) == label


def test_read_label_prefers_the_longer_label_at_the_same_word():
    labels = ["very good", "very", "good"]
    assert class_names.read_class("It is very good.", labels) == "very good"
    assert class_names.read_class("very_good", labels) == "very good"
    assert class_names.read_class("It is good.", labels) == "good"


@given(st.sampled_from(LABELS), st.text(string.punctuation + " \n"), st.text(string.punctuation + " \n"))
def test_case_and_punctuation_never_hide_a_label(label, before, after):
    assert class_names.read_class(before + label.upper() + after, LABELS) == label


@given(st.text())
def test_an_answer_reads_as_a_label_or_as_none(answer):
    assert class_names.read_class(answer, LABELS) in (*LABELS, None)


def test_read_tags():
    assert metrics.read_tags(" Love,  be  yourself ,,love") == {"love", "be yourself"}
    assert metrics.read_tags("a; b", ";") == {"a", "b"}
    assert metrics.read_tags("") == frozenset()


# --- sets ----------------------------------------------------------------------------------------

SETS = st.frozensets(st.sampled_from("abcdefgh"))


def test_set_scores_by_hand():
    assert metrics.set_scores(frozenset("abcd"), frozenset("abx")) == (2 / 3, 2 / 4, 4 / 7)
    assert metrics.set_scores(frozenset(), frozenset()) == (1, 1, 1)
    assert metrics.set_scores(frozenset("a"), frozenset()) == (0, 0, 0)


@given(SETS, SETS)
def test_set_scores_bounds_and_symmetry(wanted, given_tags):
    precision, recall, f1 = metrics.set_scores(wanted, given_tags)
    back = metrics.set_scores(given_tags, wanted)
    assert min(precision, recall) - 1e-12 <= f1 <= max(precision, recall) + 1e-12
    assert all(0 <= value <= 1 for value in (precision, recall, f1))
    assert back[2] == f1
    assert (f1 == 1) == (wanted == given_tags)
    if wanted and given_tags:
        assert (back[0], back[1]) == (recall, precision)


# --- scores of a split ---------------------------------------------------------------------------


def test_labels_by_hand():
    gold = ["positive", "positive", "negative", "negative"]
    answers = ["positive", "It is negative.", "Negative", "who knows"]
    evidence = Evidence(labels_config(), gold, answers)
    scores = score(evidence)
    # positive: 1 right, 0 wrong, 1 missed: F1 2/3. negative: 1 right, 1 wrong, 1 missed (unparsed): F1 1/2.
    assert scores.values["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.values["accuracy"] == 0.5
    assert scores.values["exact_match"] == 0.25  # "Negative" is not the text of the reference
    assert scores.values["unparsed"] == 0.25
    assert scores.rows == [1, 0, 1, 0]
    assert evidence.readings == ["positive", "negative", "negative", "unparsed"]
    table = metrics.confusion(evidence)
    assert table["columns"] == [*LABELS, "unparsed"]
    assert table["counts"] == [[1, 0, 1], [1, 1, 0]]
    classes = metrics.per_class(evidence)
    assert classes["negative"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}


def test_with_choices_accuracy_is_theirs_and_free_answers_are_judged_beside_it():
    gold = ["positive", "positive", "negative", "negative"]
    answers = ["What a film!", "What a film!", "negative", "positive"]
    choices = ["positive", "positive", "negative", "positive"]
    evidence = Evidence(labels_config(), gold, answers, choices)
    scores = score(evidence)
    assert scores.values["accuracy"] == 0.75
    assert scores.values["generated_accuracy"] == 0.25
    assert scores.values["unparsed"] == 0.5
    assert scores.rows == [1, 1, 1, 0]
    assert evidence.readings == choices


def test_a_reference_that_is_no_label_is_named():
    with pytest.raises(UserError, match="row 2 of the split: the answer 'neutral' is not a label of eval.labels"):
        scored(labels_config(), ["positive", "neutral"], ["positive", "positive"])


def test_majority_baseline_comes_from_the_training_split():
    train, test = rows_of(["negative"] * 3 + ["positive"]), rows_of(["positive", "positive", "negative"])
    baseline = metrics.baselines(labels_config(), train, test)[0]
    assert baseline["answer"] == "negative"
    assert baseline["accuracy"] == pytest.approx(1 / 3)


def test_the_most_frequent_tag_is_a_baseline():
    config = Eval(task="tags").model_dump(mode="json")
    [baseline] = metrics.baselines(
        config, rows_of(["love, life", "Life", "hope"]), rows_of(["life", "hope, life", "love"])
    )
    assert baseline["answer"] == "life"
    assert baseline["f1"] == pytest.approx(scored(config, ["life", "hope, life", "love"], ["life"] * 3).values["f1"])


def test_a_classifier_that_costs_nothing_is_a_baseline():
    prompts = ["a great film", "great fun, truly", "what a bore", "a bore of a film"]
    train = rows_of(["positive", "positive", "negative", "negative"], prompts)
    test = rows_of(["positive", "negative", "negative"], ["great!", "a bore", "great bore bore"])
    found = {one["name"]: one for one in metrics.baselines(labels_config(), train, test)}
    assert found["tf-idf, logistic regression"]["accuracy"] == 1.0
    assert found["majority class"]["accuracy"] < 1.0


@pytest.mark.parametrize("train", [[], rows_of(["positive"] * 3, ["a", "b c", "d"]), rows_of(LABELS, ["?", "!"])])
def test_where_there_is_nothing_to_learn_no_classifier_is_a_baseline(train):
    test = rows_of(["positive", "negative"], ["great", "bore"])
    assert [one["name"] for one in metrics.baselines(labels_config(), train, test)] == ["majority class"]


def test_bits_per_byte_by_hand():
    import math

    sums = {"loss_sums": [3.0, 1.0], "loss_tokens": [3, 1], "answer_bytes": [5, 3]}
    values = scored_of(Evidence({"task": "text"}, ["word", "é."], ["a", "b"], **sums))
    assert values["bits_per_byte"] == pytest.approx(4 / 8 / math.log(2))
    assert "bits_per_byte" not in scored_of(Evidence({"task": "text"}, ["a"], ["a"], loss_sums=[1.0], loss_tokens=[1]))


def scored_of(evidence: Evidence) -> dict:
    return score(evidence).values


def test_tags_by_hand():
    config = Eval(task="tags").model_dump(mode="json")
    scores = scored(config, ["a, b, c, d", "love"], ["a, b, x", "LOVE"])
    assert scores.values["f1"] == pytest.approx((4 / 7 + 1) / 2)
    assert scores.values["precision"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores.values["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores.values["exact_match"] == 0.5  # equal sets


def test_text_agrees_with_the_libraries():
    import sacrebleu

    config = Eval(task="text").model_dump(mode="json")
    gold, answers = ["the cat sat on the mat", "hello world"], ["the cats on the mat", "hello"]
    scores = scored(config, gold, answers)
    # stemmed common subsequences: "the cat on the mat" of 5 and 6 words, "hello" of 1 and 2
    assert scores.values["rouge_l"] == pytest.approx((2 * 5 / 11 + 2 / 3) / 2)
    assert scores.values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [gold]).score / 100)
    assert scores.values["exact_match"] == 0


def test_text_in_another_script_has_no_rouge():
    """Of which ROUGE sees nothing, or so little that different words are the same to it."""
    config = Eval(task="text", metric="chrf").model_dump(mode="json")
    for wanted, other in (("привет мир", "нет"), ("नमस्ते 5", "अलविदा 6")):
        scores = scored(config, [wanted, wanted], [wanted, other])
        assert "rouge_l" not in scores.values
        assert scores.rows[0] == 1.0 and scores.rows[1] < 0.2


@pytest.mark.parametrize(
    ("gold", "unseen"),
    [
        (["The 2 Cats, 'it' _said_!"], 0),
        (["नमस्ते 5"], 6 / 7),
        (["cafe\u0301", "café"], (1 / 5 + 1 / 4) / 2),  # a mark of its own, or not
        (["plain english", "да"], 1 / 2),  # by rows, as the metric is
        (["plain english", "?!", "👍", "x"], 1 / 2),
    ],
)
def test_what_rouge_does_not_see(gold, unseen):
    assert metrics.rouge_unseen(gold) == pytest.approx(unseen)


def test_f1_is_over_the_labels_that_occur():
    """As scikit-learn averages by itself: a label that no row and no answer has says nothing."""
    from sklearn.metrics import f1_score

    config = Eval(task="labels", labels=["a", "b", "c"]).model_dump(mode="json")
    gold, answers = ["a", "b", "a"], ["a", "b", "b"]
    assert scored(config, gold, gold).values["f1"] == 1.0
    assert scored(config, gold, answers).values["f1"] == f1_score(gold, answers, average="macro")


def test_loss_counts_every_token_once():
    evidence = Evidence({"task": "text"}, ["a", "b"], ["a", "b"], loss_sums=[2.0, 9.0], loss_tokens=[1, 3])
    statistics = score(evidence).statistics
    assert statistics["loss"]([0, 1]) == 11 / 4
    assert statistics["perplexity"]([0]) == pytest.approx(2.718281828**2)
    assert metrics.perplexity(10_000.0) < float("inf")


# --- intervals -----------------------------------------------------------------------------------


def test_interval_holds_the_figure_and_is_the_same_each_time():
    scores = scored(labels_config(), ["positive"] * 100, ["positive"] * 80 + ["negative"] * 20)
    low, high = intervals.interval(scores.statistics["accuracy"], 100)
    assert low < 0.8 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 100) ** 0.5, rel=0.15)  # the textbook's
    assert intervals.interval(scores.statistics["accuracy"], 100) == [low, high]


def test_a_gain_is_judged_row_by_row():
    ours = scored(labels_config(), ["positive"] * 50, ["positive"] * 45 + ["negative"] * 5).statistics["accuracy"]
    assert intervals.delta_interval(ours, ours, 50) == [0, 0]


@pytest.mark.parametrize(("truth", "rows"), [(0.97, 32), (0.87, 100), (0.5, 32), (0.02, 100)])
def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says(truth, rows):
    """Near 0 and 1 too: there the bootstrap's own quantiles hold the truth of 32 rows in 61% of the cases."""
    import numpy as np

    drawn = np.random.default_rng(0).random((400, rows)) < truth
    ends = [intervals.interval(Mean(sample), rows) for sample in drawn]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.99


def test_the_interval_of_a_mean_is_scipys():
    import numpy as np
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).beta(5, 1, size=80)
    expected = bootstrap((values,), np.mean, n_resamples=1000, method="BCa", rng=np.random.default_rng(0))
    assert intervals.interval(Mean(values), 80) == pytest.approx(list(expected.confidence_interval), abs=1e-12)


@pytest.mark.parametrize("value", [0.25, 1.5])
def test_the_interval_of_rows_that_are_all_alike_is_their_figure(value):
    assert intervals.interval(Mean([value] * 20), 20) == [value, value]
    assert intervals.interval(Mean([value]), 1) == [value, value]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcx")), min_size=1, max_size=30))
def test_f1_is_that_of_scikit_learn(pairs):
    from sklearn.metrics import f1_score

    labels = ["a", "b", "c"]
    gold, given_labels = zip(*pairs, strict=True)
    ours = scored(Eval(task="labels", labels=labels).model_dump(mode="json"), gold, given_labels).values["f1"]
    occur = sorted({*gold, *given_labels} & set(labels))
    assert ours == pytest.approx(
        f1_score(gold, given_labels, labels=occur, average="macro", zero_division=0), abs=1e-12
    )


# --- the rows ------------------------------------------------------------------------------------


def test_every_metric_says_what_it_is():
    for task in metrics.TASKS:
        for name, metric in metrics.metrics_of(task).items():
            assert metric.title and metric.note, name


def test_a_metric_has_one_title_whatever_the_task():
    titles = {(name, metric.title) for task in metrics.TASKS for name, metric in metrics.metrics_of(task).items()}
    assert len(titles) == len(dict(titles))
