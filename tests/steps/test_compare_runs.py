"""compare_runs: order and columns of the leaderboard, partial sweeps, the page."""

import csv
import json
import math
import re
import shlex
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from steps import compare_runs, rank_runs
from temper.config.schema import Eval
from temper.errors import UserError
from temper.reports import html, leaderboard, plots, sweep_page
from temper.runs import find as runs
from tests.support.asking import command
from tests.support.sweeps import FIGURES, write_report

NASTY = "<img src=x onerror=alert(1)>"


def board_of(folder) -> list[dict]:
    with (folder / "leaderboard.csv").open() as file:
        return list(csv.DictReader(file))


def test_best_first_and_ties_by_loss(sweep):
    config, output = sweep
    board = compare_runs.compare(config, output)
    assert [row["run"] for row in board.rows] == ["b", "d", "c", "a"]
    assert [row["run"] for row in board_of(output)] == ["b", "d", "c", "a"]


def test_a_metric_that_is_better_when_lower(sweep):
    config, output = sweep
    config["eval"]["metric"] = "loss"
    board = compare_runs.compare(config, output)
    assert [row["run"] for row in board.rows] == ["a", "b", "d", "c"]
    assert next(name for name in board.rows[0] if name.startswith("validation_")) == "validation_loss"


def test_columns(sweep):
    config, output = sweep
    compare_runs.compare(config, output)
    row = board_of(output)[0]
    columns = [
        *("run", "train.learning_rate", "adapter.r"),
        *(
            "validation_accuracy",
            "validation_f1",
            "validation_generated_accuracy",
            "validation_exact_match",
            "validation_loss",
        ),
        *(
            "base_validation_accuracy",
            "base_validation_f1",
            "base_validation_generated_accuracy",
            "base_validation_exact_match",
            "base_validation_loss",
        ),
        *("train_seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters"),
        *("validation_accuracy_low", "validation_accuracy_high"),
        *("place", "behind_best", "behind_best_low", "behind_best_high", "p_holm", "tied"),
    ]
    assert list(row) == columns
    assert (row["train.learning_rate"], row["adapter.r"], row["validation_accuracy"]) == ("0.0001", "16", "0.95")
    assert (row["base_validation_accuracy"], row["train_seconds"]) == ("0.5", "90")


def test_a_run_without_a_report_is_left_out_and_named(sweep, capsys):
    config, output = sweep
    config["runs"].append(
        {"name": "failed\x1b[2J", "point": {"train.learning_rate": 1.0, "adapter.r": 4}, "report": "nowhere"}
    )
    compare_runs.main(["--config", json.dumps(config), "--output", str(output)])
    said = capsys.readouterr()
    assert "left out: failed\\x1b[2J has no report (nowhere)" in said.err
    assert "4 of 5 runs" in said.err
    assert "partial: 1 run(s) without a report: failed\\x1b[2J" in said.out
    assert "\x1b" not in said.err + said.out
    assert "Partial:" in (output / "report.html").read_text()
    assert len(board_of(output)) == 4


def test_no_report_at_all(sweep):
    config, output = sweep
    for run in config["runs"]:
        run["report"] = "nowhere"
    with pytest.raises(UserError, match="none of the sweep's 4 run"):
        compare_runs.compare(config, output)
    assert not (output / "leaderboard.csv").exists()


def test_made_again_in_place_from_its_own_config(sweep, capsys):
    config, output = sweep
    compare_runs.main(["--config", json.dumps(config), "--output", str(output)])
    first = capsys.readouterr().out
    write_report(output.parents[1] / "reports" / "e", 0.99, 0.1)
    (output / "config.yaml").write_text((output / "config.yaml").read_text().replace("reports/a", "reports/e"))
    compare_runs.main(["--config", str(output / "config.yaml"), "--output", str(output)])
    assert capsys.readouterr().out != first
    assert board_of(output)[0]["validation_accuracy"] == "0.99"
    left = sorted(path.name for path in output.iterdir())
    assert left == ["config.yaml", "leaderboard.csv", "leaderboard.json", "provenance.json", "report.html"]


def test_show_prints_the_leaderboard(sweep, capsys):
    config, output = sweep
    compare_runs.compare(config, output)
    command("leaderboard")([str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep rates, best accuracy on the validation split first"
    assert lines[2].split()[:4] == ["learning_rate", "r", "accuracy", "f1"]
    assert lines[3].split()[:4] == ["1", "0.0001", "16", "0.950"]
    assert lines[7].split() == ["0.500", "0.800", "0.750", "0.700", "3.000", "(base", "model)"]
    assert f"page: {output / 'report.html'}" in lines


def with_tests(config: dict, output, test: str = "chosen", **figures: tuple[float, float]) -> None:
    """Give runs a report on the test split: name -> (accuracy, loss)."""
    config["eval"]["test"] = test
    for run in config["runs"]:
        run["test_report"] = str(output.parents[1] / "reports" / f"{run['name']}-test")
        if run["name"] in figures:
            write_report(Path(run["test_report"]), *figures[run["name"]])
            change({"report": run["test_report"]}, split="test")


def test_the_chosen_run_has_figures_of_both_splits(sweep, capsys):
    config, output = sweep
    with_tests(config, output, b=(0.88, 0.35), a=(0.99, 0.1))  # a has a report, and was not chosen
    board = compare_runs.compare(config, output)
    assert [row["run"] for row in board.rows] == ["b", "d", "c", "a"], "the test split moves none"
    assert [row["test_accuracy"] for row in board.rows] == [0.88, None, None, None]
    assert (board.rows[0]["base_test_accuracy"], board.rows[0]["validation_accuracy"]) == (0.5, 0.95)
    command("leaderboard")([str(output)])
    said = capsys.readouterr().out
    assert "test split: b accuracy 0.880 (0.860 to 0.900), base model 0.500" in said
    page = (output / "report.html").read_text()
    assert "opened for the chosen run only" in page
    assert 'href="../../reports/b-test/report.html"' in page
    assert "a-test" not in page


def test_the_page_lists_the_suspicious_rows_of_the_chosen_run_only(sweep):
    config, output = sweep
    for run in config["runs"]:
        run["suspects"] = str(output.parents[1] / "suspects" / run["name"])
        row = {"rank": 1, "file": "data/raw/x/<x>.csv", "line": 7, "split": "train", "given": "negative"}
        row |= {"likelier": "positive", "suspicion": 3.25, "prompt": f"Of {run['name']} <b>", "id": 6}
        folder = Path(run["suspects"])
        folder.mkdir(parents=True)
        content = {"figure": "margin", "rows": {"train": 900, "validation": 100}, "suspects": [row]}
        (folder / "suspects.json").write_text(json.dumps(content))
    compare_runs.compare(config, output)
    page = (output / "report.html").read_text()
    assert "Of b &lt;b&gt;" in page
    assert "Of a" not in page
    assert "The 1 of 1,000 training and validation rows" in page
    assert "&lt;x&gt;.csv:7" in page
    assert 'href="../../suspects/b/suspects.csv"' in page
    shutil.rmtree(config["runs"][1]["suspects"])
    compare_runs.compare(config, output)
    assert "Suspicious rows" not in (output / "report.html").read_text()


def test_which_runs_are_judged_on_the_test_split(sweep):
    config, output = sweep
    names = {}
    for test in ("none", "chosen", "tied", "all"):
        with_tests(config, output, test)
        made = output.parent / test
        rank_runs.main(["--config", write_config(made, config), "--output", str(made / "ranking")])
        ranking = json.loads((made / "ranking" / "ranking.json").read_text())
        names[test] = ranking["tested"]
        assert (ranking["chosen"], ranking["split"]) == ("b", "validation")
    assert names["none"] == []
    assert names["chosen"] == ["b"]
    assert names["tied"] == ["b", *(name for name in ranking["tied"] if name != "b")]
    assert sorted(names["all"]) == ["a", "b", "c", "d"]


def write_config(folder: Path, config: dict) -> str:
    folder.mkdir(parents=True)
    view = {"eval": config["eval"], "sweep": {"choose": "best"}, "runs": config["runs"]}
    (folder / "config.json").write_text(json.dumps(view))
    return str(folder / "config.json")


def test_the_test_split_stays_closed_until_all_runs_are_ranked(sweep, capsys):
    config, output = sweep
    shutil.rmtree(config["runs"][2]["report"])
    with pytest.raises(SystemExit) as stopped:
        rank_runs.main(["--config", write_config(output.parent / "x", config), "--output", str(output.parent / "r")])
    assert stopped.value.code == 2
    assert "has no report yet" in capsys.readouterr().err.splitlines()[-1]


def test_runs_judged_on_different_splits_are_not_ranked(sweep):
    config, output = sweep
    change(config["runs"][1], split="test")
    with pytest.raises(UserError, match="is of the test split, and .* of the validation split"):
        compare_runs.compare(config, output)


def test_ranked_by_the_test_split_itself(sweep, capsys):
    config, output = sweep
    for run in config["runs"]:
        change(run, split="test")
    board = compare_runs.compare(config, output)
    assert board.rows[0]["test_accuracy"] == 0.95
    assert not any(name.startswith("validation") for name in board.rows[0])
    command("leaderboard")([str(output)])
    assert "flattered by the choice" in capsys.readouterr().out
    assert "flattered a little" in (output / "report.html").read_text()


def test_show_without_a_leaderboard(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("leaderboard")([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_page(sweep):
    config, output = sweep
    compare_runs.compare(config, output)
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 3  # one per swept key, and the loss curves
    assert 'href="../../reports/b/report.html"' in page
    assert "experiment=demo sweep=none overrides=&#34;train.learning_rate=0.0001 adapter.r=16&#34;" in page
    assert "overlap" not in page  # 0.95 is clear of 0.90 at intervals of 0.02


def test_the_page_admits_that_the_order_may_be_chance(sweep):
    config, output = sweep
    write_report(output.parents[1] / "reports" / "near", 0.94, 0.3)
    config["runs"].append({**config["runs"][0], "name": "near", "report": str(output.parents[1] / "reports" / "near")})
    compare_runs.compare(config, output)
    page = (output / "report.html").read_text()
    assert "4 of 5 runs cannot be told apart on 100 validation rows (paired test at 5%, Holm" in page
    tied = {row["run"]: row["tied"] for row in board_of(output)}
    assert tied == {"b": "True", "near": "True", "d": "True", "c": "True", "a": "False"}


def test_runs_are_compared_row_by_row(sweep):
    config, output = sweep
    compare_runs.compare(config, output)
    rows = {row["run"]: row for row in board_of(output)}
    # b has right what d has, and 5 rows more: McNemar's exact p is 2 / 2^5, Holm's the double, as c is like d.
    assert float(rows["d"]["behind_best"]) == pytest.approx(-0.05)
    assert float(rows["d"]["p_holm"]) == pytest.approx(2 * 0.0625)
    assert float(rows["a"]["p_holm"]) == pytest.approx(3 * 2 / 2**15, rel=1e-4)
    low, high = float(rows["a"]["behind_best_low"]), float(rows["a"]["behind_best_high"])
    assert low < -0.15 < high < 0


def test_the_cheapest_of_those_that_are_tied_may_be_chosen(sweep, capsys):
    config, output = sweep
    change(config["runs"][3], train={"flops_per_step": 10**9, "global_step": 50})
    config["sweep"]["choose"] = "cheapest_of_tied"
    board = compare_runs.compare(config, output)
    assert (board.rows[0]["run"], board.chosen) == ("b", "d")
    leaderboard.print_leaderboard(output)
    shown = capsys.readouterr().out
    assert "chosen (sweep.choose): d" in shown
    assert re.search(r"^2= .*  d$", shown, re.MULTILINE) and re.search(r"^ ?4 .*  a$", shown, re.MULTILINE)
    page = (output / "report.html").read_text()
    assert "whose training took fewer operations" in page and "train.learning_rate=0.001 adapter.r=16" in page


def test_runs_of_other_rows_are_not_compared_row_by_row(sweep):
    config, output = sweep
    file = Path(config["runs"][0]["report"]) / "predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "id": row["id"] + 1}) + "\n" for row in rows))
    compare_runs.compare(config, output)
    assert "judged on different rows" in (output / "report.html").read_text()
    assert {row["run"]: row["p_holm"] for row in board_of(output)}["a"] == ""


@pytest.fixture
def seeds(sweep):
    """The sweep's four runs as two recipes of two seeds: 0.80 and 0.95, 0.90 and 0.90."""
    config, output = sweep
    for run, (rate, seed) in zip(config["runs"], ((1e-4, 42), (1e-4, 43), (1e-3, 43), (1e-3, 42)), strict=True):
        run["point"] = {"train.learning_rate": rate, "seed": seed}
    return config, output


def test_seeds_of_a_recipe_are_repeats_and_no_competitors(seeds, capsys):
    config, output = seeds
    board = compare_runs.compare(config, output)
    assert [row["run"] for row in board.rows] == ["d", "c", "a", "b"], "by the mean of the recipe, then by seed"
    assert board.chosen == "d", "of the best recipe the first seed, not the luckiest"
    rows = {row["run"]: row for row in board_of(output)}
    assert [rows[run]["place"] for run in "abcd"] == ["2", "2", "1", "1"]
    assert float(rows["b"]["mean_accuracy"]) == pytest.approx(0.875)
    assert float(rows["b"]["sd_accuracy"]) == pytest.approx(0.15 / 2**0.5, rel=1e-4)
    page = (output / "report.html").read_text()
    assert "Best of 2 recipes" in page and "2 of 2 recipes cannot be told apart" in page
    assert "differ by 0.075 (standard deviation): two single runs mean something from 0.456 apart" in page
    leaderboard.print_leaderboard(output)
    assert "places are by the mean of accuracy" in capsys.readouterr().out


def test_seeds_alone_say_how_far_apart_two_runs_mean_something(seeds):
    config, output = seeds
    config["runs"] = config["runs"][:2]
    compare_runs.compare(config, output)
    page = (output / "report.html").read_text()
    assert "One recipe" in page
    assert "differ by 0.106 (standard deviation): two single runs mean something from 1.906 apart" in page


def test_what_seeds_change_counts_in_the_comparison(seeds):
    """Recipes that rows tell apart, while their own seeds differ as much, are not told apart."""
    config, output = seeds
    for run, accuracy in zip(config["runs"], (0.70, 0.88, 0.80, 0.95), strict=True):
        folder = Path(run["report"])
        shutil.rmtree(folder)
        write_report(folder, accuracy, 0.3)
    compare_runs.compare(config, output)
    row = {row["run"]: row for row in board_of(output)}["a"]
    assert float(row["behind_best"]) == pytest.approx(-0.085)
    assert row["tied"] == "True" and float(row["behind_best_low"]) < -0.3


def test_models_are_compared_by_bits_per_byte(sweep):
    """Their tokens differ, so a loss per token says nothing about which is better."""
    config, output = sweep
    for run, bits in zip(config["runs"], (3.0, 1.0, 2.0, 4.0), strict=True):
        change(run, values={**FIGURES, "accuracy": 0.9, "loss": bits * -1 + 5, "bits_per_byte": bits})
        run["point"] = {"model": run["name"]}
    board = compare_runs.compare(config, output)
    assert [row["run"] for row in board.rows] == ["b", "c", "a", "d"], "of equal accuracy"
    assert "validation_bits_per_byte" in board.rows[0] and "validation_loss" not in board.rows[0]


def test_a_metric_of_the_whole_split_is_compared_by_the_paired_bootstrap(sweep):
    config, output = sweep
    config["eval"]["metric"] = "loss"
    compare_runs.compare(config, output)
    rows = {row["run"]: row for row in board_of(output)}
    assert float(rows["b"]["behind_best"]) == pytest.approx(0.1, abs=1e-6)
    assert float(rows["b"]["behind_best_low"]) > 0 and float(rows["b"]["p_holm"]) < 0.001


def test_the_page_shows_html_as_text(sweep):
    config, output = sweep
    for run in config["runs"]:
        run["point"]["prompt.system"] = f"{NASTY} {run['name']}"
    compare_runs.compare(config, output)
    page = (output / "report.html").read_text()
    assert NASTY not in page
    assert "&lt;img src=x" in page


def test_a_single_run_without_a_base_model(tmp_path, capsys):
    report = write_report(tmp_path / "results" / "reports" / "only", 0.9, 0.2, base=None)
    settings = Eval(task="labels", labels=["negative", "positive"]).model_dump(mode="json")
    runs = [{"name": "only", "point": {}, "report": report}]
    output = tmp_path / "results" / "sweeps" / "single"
    compare_runs.compare({"eval": settings, "sweep": {"name": "single", "axes": {}}, "runs": runs}, output)
    assert board_of(output)[0]["base_validation_accuracy"] == ""
    page = (output / "report.html").read_text()
    assert "Best of 1 run: " in page and "What each swept value does" not in page
    leaderboard.print_leaderboard(output)
    assert re.search(r"^1 +0.900 .*  only$", capsys.readouterr().out, re.MULTILINE)


def test_a_diverged_run_stands_below_the_others_without_figures(sweep, capsys):
    config, output = sweep
    folder = output.parents[1] / "reports" / "a"
    facts = {"task": "labels", "metric": "accuracy", "diverged_at_step": 7, "train": {"train_seconds": 3.0}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    board = compare_runs.compare(config, output)
    assert board.rows[-1]["run"] == config["runs"][0]["name"]
    row = board_of(output)[-1]
    assert (row["validation_accuracy"], row["train_seconds"], row["diverged_at_step"]) == ("", "3", "7")
    leaderboard.print_leaderboard(output)
    assert "diverged, step 7" in capsys.readouterr().out
    assert "<strong>Diverged:</strong>" in (output / "report.html").read_text()


def change(run: dict, **figures) -> None:
    """Change figures of a run's report."""
    file = Path(run["report"]) / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | figures))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_figures_that_are_not_finite_stand_below_all_others(sweep, capsys, metric):
    config, output = sweep
    config["eval"]["metric"] = metric
    a, b, c, d = config["runs"]
    for run, broken in ((a, {metric: math.nan}), (b, {"loss": -math.inf}), (c, {"f1": math.nan})):
        change(run, values={**FIGURES, "accuracy": 0.99, "loss": 0.1, **broken})
    change(d, interval=[math.nan, 1.0], intervals={metric: [math.nan, 1.0]})
    assert compare_runs.compare(config, output).rows[0]["run"] == "c"
    text = (output / "leaderboard.json").read_text()
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"]
    assert [row[f"validation_{metric}"] is None for row in rows] == [False, True, True, True]
    assert not {"nan", "inf", "-inf"} & {cell for row in board_of(output) for cell in row.values()}
    leaderboard.print_leaderboard(output)
    assert capsys.readouterr().out.count("no finite figures") == 3
    assert (output / "report.html").read_text().count("figures that are not finite") == 3


@pytest.mark.parametrize("runs", [1, 4])
def test_a_sweep_whose_runs_all_diverged_is_one_line_and_no_leaderboard(sweep, capsys, runs):
    config, output = sweep
    for step, run in enumerate(config["runs"], 3):
        change(run, diverged_at_step=step)
    config["runs"] = config["runs"][:runs]
    with pytest.raises(SystemExit) as stopped:
        compare_runs.main(["--config", json.dumps(config), "--output", str(output)])
    assert stopped.value.code == 2
    steps = ", ".join(str(step) for step in range(3, 3 + runs))
    message = f"error: every run with a report diverged (at steps {steps}): lower train.learning_rate\n"
    assert capsys.readouterr().err.endswith(message)
    assert not output.exists()


def test_another_experiments_page_over_the_same_sweep_is_kept(sweep, monkeypatch):
    config, output = sweep
    compare_runs.compare(config, output)
    before = (output / "leaderboard.csv").read_text()
    fewer = {**config, "experiment": "other", "runs": config["runs"][:2]}
    compare_runs.compare(fewer, output)
    assert (output / "leaderboard.csv").read_text() != before
    assert (output.with_name("rates@demo") / "leaderboard.csv").read_text() == before
    monkeypatch.chdir(output.parents[2])
    assert str(runs._best(None)) == config["runs"][1]["report"], "the kept one is not asked for"
    assert runs._best("rates@demo") == runs._best("rates")
    with pytest.raises(UserError, match="did you mean 'rates'"):
        runs._best("rate")


def test_the_kept_page_takes_the_place_of_no_other_sweep(sweep):
    config, output = sweep
    named_alike = output.with_name("rates-demo")
    compare_runs.compare({**config, "sweep": {"name": "rates-demo", "axes": {}}}, named_alike)
    before = {path.name: path.read_bytes() for path in named_alike.iterdir()}
    compare_runs.compare(config, output)
    (output / "left.over").touch()
    for experiment in ("other", "demo", "other"):
        compare_runs.compare({**config, "experiment": experiment, "runs": config["runs"][:2]}, output)
        (output / "left.over").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in named_alike.iterdir()} == before
    kept = {path.name for path in output.parent.iterdir() if not path.name.startswith(".")}
    assert kept == {"rates", "rates-demo", "rates@demo", "rates@other"}
    assert not (output.with_name("rates@demo") / "left.over").exists(), "of the first time"


def test_another_sweeps_folder_is_not_overwritten(sweep):
    config, output = sweep
    compare_runs.compare(config, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UserError, match="has the sweep 'rates', not 'mine': name another folder"):
        compare_runs.compare({**config, "sweep": {"name": "mine", "axes": {}}}, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_the_receipt_of_another_sweep_or_experiment_is_not_lost(sweep):
    config, output = sweep
    compare_runs.compare(config, output)
    (output / "receipt.json").write_text("of demo")
    with pytest.raises(UserError, match="name another folder"):
        compare_runs.compare({**config, "sweep": {"name": "mine", "axes": {}}}, output)
    assert (output / "receipt.json").read_text() == "of demo"
    compare_runs.compare({**config, "experiment": "other"}, output)
    assert (output.with_name("rates@demo") / "receipt.json").read_text() == "of demo"
    assert not (output / "receipt.json").exists(), "it is not of this comparison"


# --- anybody's text ------------------------------------------------------------------------------

TEXTS = [
    r"Put it in $\boxed{}$.",
    "$x$ and $",
    "_hidden",
    "100% sure {x} %s",
    "two\nlines\tand\r a tab",
    "x" * 5000,
    "x" * 5000 + "y",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \U0001f600",
    "\x00 \x1b[31mred \ud83d half",
    "</text></svg><script>alert(1)</script>",
    "]]> --> &amp; #010101 <!--",
    "",
]


def with_texts(config: dict, output, texts: list[str]) -> dict:
    """The sweep's config with a run for each text."""
    runs = []
    for index, text in enumerate(texts):
        report = write_report(output.parents[1] / "reports" / f"t{index}", 0.5 + index / 1000, 0.4)
        runs.append(
            {"name": f"_t{index}", "point": {"prompt.system": text, "adapter.r": 4 + index % 2}, "report": report}
        )
    return {**config, "runs": runs}


def test_texts_that_mean_something_to_matplotlib_or_a_page_are_shown_as_they_are(sweep, recwarn):
    from html.parser import HTMLParser

    config, output = sweep
    texts = [text.replace("\ud83d", "") for text in TEXTS]  # a config with half a character is refused
    compare_runs.compare(with_texts(config, output, texts), output)
    page = (output / "report.html").read_text(encoding="utf-8")
    tags, shown = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

        def handle_data(self, data):
            shown.append(data)

    Reader().feed(page)
    assert tags.count("script") == 1, "the page's own"
    text = "".join(shown)
    assert r"Put it in $\boxed{}$." in text and "100% sure {x} %s" in text and "#010101" in text
    assert not any(char in page for char in "\x00\x1b")
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("texts", [[text, "other"] for text in TEXTS], ids=range(len(TEXTS)))
def test_each_text_is_in_the_legend_and_on_the_axis(sweep, texts):
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    svg = plots.sweep_curves([(text, lines) for text in texts])
    legend = ElementTree.fromstring(svg)
    words = ["".join(node.itertext()) for node in legend.iter() if node.tag.endswith("text")]
    assert html.short(texts[0], 60) in words and "other" in words
    points = [{"x": text, "y": 0.5, "interval": None, "others": text, "best": False} for text in texts]
    axis = ElementTree.fromstring(plots.axis_effect(points, "prompt.system", "accuracy", mean=True))
    words = ["".join(node.itertext()) for node in axis.iter() if node.tag.endswith("text")]
    assert html.short(texts[0], plots.LONGEST_TICK) in words


@pytest.mark.parametrize(
    ("names", "titles"), [(["loss"], ["training loss"]), (["loss", "eval_loss"], ["training loss", "validation loss"])]
)
def test_a_loss_that_no_run_has_is_not_drawn(names, titles):
    lines = [{"step": step, **dict.fromkeys(names, 1.0 / step)} for step in (1, 2, 3)]
    svg = ElementTree.fromstring(plots.sweep_curves([("a", lines), ("b", lines)]))
    words = ["".join(node.itertext()) for node in svg.iter() if node.tag.endswith("text")]
    assert [word for word in words if word.endswith(" loss")] == titles


def test_long_texts_that_differ_at_their_end_do_not_look_the_same():
    first, second = html.distinct(["x" * 5000 + "y", "x" * 5000 + "z"], 60)
    assert first != second
    assert html.distinct(["x" * 5000, "x" * 5001], 60) == ["x" * 40 + "…" + "x" * 19 + f" ({i})" for i in (1, 2)]


def test_figures_of_numbers_that_are_none():
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1e308}]
    assert plots.loss_curves(lines) is None
    assert "<svg" in plots.loss_curves([*lines, {"step": 4, "loss": 0.5}])
    points = [{"x": x, "y": 0.5, "interval": None, "others": "", "best": False} for x in (10**400, 1, float("inf"))]
    assert "<svg" in plots.axis_effect(points, "train.seed", "accuracy", mean=True)


def test_a_thousand_runs_make_a_page_that_opens(sweep):
    config, output = sweep
    report = config["runs"][0]["report"]
    runs = [
        {"name": f"run-{n}", "point": {"train.learning_rate": n * 1e-5, "adapter.r": n % 7}, "report": report}
        for n in range(1, 1001)
    ]
    started = time.monotonic()
    compare_runs.compare({**config, "runs": runs}, output)
    assert time.monotonic() - started < 60  # 3 where nothing else runs
    page = (output / "report.html").read_text()
    assert len(page) < 2_000_000
    assert "The best 50 runs." in page
    assert len(board_of(output)) == 1000


def test_curves_are_read_of_the_runs_that_are_drawn(sweep, monkeypatch):
    config, output = sweep
    Path(config["runs"][0]["report"], "curves.jsonl").write_text("cut off")
    with pytest.raises(UserError, match="curves.jsonl: damaged"):
        compare_runs.compare(config, output)
    monkeypatch.setattr(plots, "MOST_CURVES", 3)
    assert len(compare_runs.compare(config, output).rows) == 4


def test_a_text_is_no_formula_in_a_spreadsheet_and_a_number_stays_one(sweep):
    config, output = sweep
    texts = [
        "=cmd|' /C calc'!A0",
        "＝1+1",
        "＋1",
        "－1",
        "＠SUM(A1)",
        "+1+1",
        "-2+3+cmd",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        " =1",
        "-0.5",
        "-1e-4",
        "plain",
    ]
    compare_runs.compare(with_texts(config, output, texts), output)
    found = {row["run"]: row["prompt.system"] for row in board_of(output)}
    for index, text in enumerate(texts):
        assert found[f"_t{index}"] == (text if index > 10 else f"'{text}".replace("\r", "\\r")), text
    exact = {row["run"]: row["prompt.system"] for row in json.loads((output / "leaderboard.json").read_text())["rows"]}
    assert list(map(exact.get, found)) == [texts[int(name[2:])] for name in found]
    config["runs"] = [{**run, "point": {"train.seed": -index}} for index, run in enumerate(config["runs"])]
    compare_runs.compare(config, output)
    assert {row["train.seed"] for row in board_of(output)} == {"0", "-1", "-2", "-3"}


def test_a_text_does_not_steer_the_terminal_or_fill_it(sweep, capsys):
    config, output = sweep
    compare_runs.compare(with_texts(config, output, ["\x1b]0;title\x07\x1b[2J", "x" * 5000, "\x9b31m"]), output)
    leaderboard.print_leaderboard(output)
    said = capsys.readouterr().out
    assert not any(char in said for char in "\x1b\x07\x9b") and "\\x1b[2J" in said
    assert max(map(len, said.splitlines())) < 300


def test_the_command_has_what_was_given_beside_the_sweep(workspace):
    from temper.planning import planner

    texts = "adapter.r=8 adapter=dora,lora train.learning_rate=1e-4,1e-3 eval.samples=3 sweep.name=mine tracking=none"
    made = planner.build("smoke", None, texts)
    config = made.comparison.config
    assert config["overrides"] == ["adapter.r=8", "eval.samples=3", "sweep.name=mine", "tracking=none"]
    for run in made.runs:
        words = shlex.split(sweep_page._command_for(run.point, config))[4:]
        assert "sweep.name" not in " ".join(words), "this sweep's page stays"
        [again] = planner.build(**dict(word.split("=", 1) for word in words)).runs
        assert (again.name, again.config["eval"]["samples"]) == (run.name, 3)


def test_of_a_large_sweep_a_terminal_gets_the_first_lines(sweep):
    config, output = sweep
    board = compare_runs.compare(config, output)
    many = board.model_copy(update={"rows": [{**board.rows[0], "run": f"run-{number}"} for number in range(1200)]})
    text = leaderboard.leaderboard_text(many, output)
    assert f"and 1,180 more runs: {output / 'leaderboard.csv'}" in text
    assert len(text.splitlines()) < 40
    assert "more runs" not in leaderboard.leaderboard_text(board, output)


@pytest.mark.parametrize(("base", "said"), [(0.5, False), (0.95, True), (0.99, True), (None, False)])
def test_a_ranking_of_runs_that_learned_nothing_yet_says_so(tmp_path, base, said):
    runs = [
        {"name": name, "point": {"adapter.r": name}, "report": write_report(tmp_path / name, accuracy, 0.3, base)}
        for name, accuracy in (("a", 0.95), ("b", 0.9))
    ]
    settings = Eval(task="labels", labels=["negative", "positive"]).model_dump(mode="json")
    note = rank_runs.unlearned(rank_runs.rank(runs, settings))
    assert bool(note) is said
    if note:
        assert f"no run is better than the untouched model (accuracy {base:.3f})" in note
