"""Forgetting: the passages of a probe, their bits per byte against plain transformers, the gate."""

import json
import math
from pathlib import Path

import pytest

from steps import compare_runs, evaluate_model
from temper.config import compose
from temper.config import evaluation as checks
from temper.config.schema import Eval, Probe
from temper.errors import UserError
from temper.evaluation import forgetting
from temper.evaluation.figures import read_figures
from temper.model.loading import load_model, load_tokenizer
from temper.planning import planner
from temper.reports import forgetting as reports
from tests.support import networks, tiny
from tests.support.asking import complaint, lines_of

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
SHORT, LONG = "Großartig, ein Fest. 🎉", "The committee met again on Tuesday, and nobody was surprised. " * 8
OTHER = "A short one."


def read(folder, name: str, content: str | bytes, **settings) -> list[str]:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return forgetting.read_passages(file, Probe(source={"kind": "files", "path": name}, **settings).model_dump())


# --- the text ------------------------------------------------------------------------------------


def test_blank_lines_separate_the_passages_of_a_text(tmp_path):
    text = "\ufeffOne line\r\nand its second.\r\n\r\n \t\r\n\r\n  Two.  \n\nThree.\n"
    assert read(tmp_path, "a.txt", text) == ["One line\nand its second.", "Two.", "Three."]


def test_rows_of_one_passage_are_put_together(tmp_path):
    csv = {"fieldnames": ["id", "text"], "delimiter": "\t", "quotechar": None}
    rows = '1_1\tOne "quoted,\n1_2\t and more.\n2_1\t \n3_1\tThree.\n1_3\tNot next to the others.\n'
    asked = {"format": "csv", "csv": csv, "text": "{{ text }}", "passage": "{{ id.split('_')[0] }}"}
    assert read(tmp_path, "a.txt", rows, **asked) == ['One "quoted, and more.', "Three.", "Not next to the others."]
    asked["passage"] = None
    assert len(read(tmp_path, "a.txt", rows, **asked)) == 4, "each row is one, but for the blank one"


def test_encodings_by_name(tmp_path):
    for content, encoding in (("é\n\nü", "cp1252"), ("é\n\nü", "utf-16")):
        assert read(tmp_path, "a.txt", content.encode(encoding), encoding=encoding) == ["é", "ü"]


def test_a_limit_takes_the_same_passages_whatever_stands_beside_them(tmp_path):
    passages = [f"Passage {number}." for number in range(40)]
    some = read(tmp_path, "a.txt", "\n\n".join(passages), limit=10)
    assert len(some) == 10
    assert some == sorted(some, key=passages.index), "in the order of the text"
    dropped = next(passage for passage in passages if passage not in some)
    fewer = [passage for passage in passages if passage != dropped]
    assert read(tmp_path, "a.txt", "\n\n".join(fewer), limit=10) == some


@pytest.mark.parametrize(
    ("name", "content", "settings", "says"),
    [
        ("a.txt", "Only one.", {}, "has 1 passage(s), and its interval takes 2: blank lines separate"),
        ("a.txt", b"caf\xe9\n\nx", {}, "byte 0xe9 at column 4 is not UTF-8: set probe.encoding=cp1252"),
        ("a.log", "x\n\ny", {}, "set probe.format to text"),
        ("a.csv", "id,text\n1,x\n", {}, "has rows: say what their text is (probe.text="),
        ("a.txt", "x\n\ny", {"text": "{{ text }}"}, "'probe.text' is for rows, and this is text"),
        (
            "a.csv",
            "id,text\n1,x\n",
            {"text": "{{ txt }}"},
            r"a.csv:2: probe.text (columns: id, text): 'txt' is undefined",
        ),
        (
            "a.jsonl",
            '{"text": null}',
            {"text": "{{ text }}"},
            "probe.text (columns: text): null is a missing value, not text",
        ),
        ("a.csv", "id,text\n1\n", {"text": "{{ text }}"}, "check probe.csv.delimiter"),
        ("a.csv", "id,text\n1,x\n", {"text": "{{ text"}, "config: 'probe.text': unexpected end of template"),
    ],
)
def test_a_text_that_cannot_be_a_probe_is_one_line(tmp_path, name, content, settings, says):
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content, **settings)
    assert says in str(caught.value)


# --- the score -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with one tokenizer, as a base and a tuned one."""
    folder = tmp_path_factory.mktemp("models")
    return tiny.make_tiny_model(folder / "base"), tiny.make_tiny_model(folder / "tuned", seed=1)


def plain_bits(folder: Path, text: str, context: int) -> float:
    """Bits of a text by transformers alone: token by token, from the definition of a window."""
    import torch

    model, tokenizer = load_model(folder, LOAD).eval(), load_tokenizer(folder)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    whole, bits = [tokenizer.bos_token_id, *tokens], 0.0
    for place in range(1, len(whole)):
        start = (place - 1) // (context - 1) * (context - 1)  # where its window starts
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[start:place]])).logits[0, -1].double()
        bits -= (logits.log_softmax(0)[whole[place]] / math.log(2)).item()
    return bits


def test_bits_per_byte_are_those_of_transformers(models):
    passages = [LONG, SHORT, OTHER, SHORT + LONG]
    tokenizer, model = load_tokenizer(models[0]), load_model(models[0], LOAD).eval()
    found = forgetting.probe(model, tokenizer, passages, 64)
    assert found.sizes == [len(passage.encode()) for passage in passages]
    assert max(found.tokens) > 3 * 64, "several windows"
    expected = [plain_bits(models[0], passage, 64) for passage in passages]
    assert [loss / math.log(2) for loss in found.loss_sums] == pytest.approx(expected, rel=1e-5)
    assert forgetting.figures_of_probe(found, None).bits_per_byte == pytest.approx(sum(expected) / sum(found.sizes))


def test_windows_are_never_longer_than_the_context():
    rows = list(forgetting._windows(list(range(100, 120)), 1, 8))
    assert max(len(row["input_ids"]) for row in rows) == 8
    assert [label for row in rows for label in row["labels"][1:]] == list(range(100, 120)), "each token once"
    assert [row["input_ids"][0] for row in rows] == [1, 106, 113], "after the one before it"


def test_an_encoder_decoder_is_refused_before_its_training(tmp_path):
    tokenizer = networks.tokenizer_of("t5")
    networks.network_of("t5", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {**Eval(task="text").model_dump(), "probed": True}
    with pytest.raises(UserError, match=r"does not continue plain text.*probe=none"):
        checks.check(settings, tmp_path, {}, load_tokenizer(tmp_path), [])


# --- from the command to the figures -------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    """(reports of both models, the arguments of an evaluation)."""
    folder = tmp_path_factory.mktemp("evaluated")
    splits = tiny.make_tiny_splits(folder / "splits", models[0])
    (folder / "text.txt").write_text("\n\n".join([LONG, SHORT, OTHER, *(f"{OTHER} {n} {SHORT}" for n in range(9))]))
    settings = {"task": "labels", "labels": ["negative", "positive"], "split": "test", "max_new_tokens": 4}
    (folder / "config.json").write_text(json.dumps({"eval": settings, "model": {"load": LOAD}}))
    common = ["--splits", splits, "--config", folder / "config.json", "--probe", folder / "text.txt"]
    base = ["--model", models[0], "--output", folder / "base", *common]
    tuned = ["--model", models[1], "--output", folder / "tuned", "--base-report", folder / "base", *common]
    for arguments in (base, tuned):
        evaluate_model.main(list(map(str, arguments)))
    return folder, tuned


def test_forgetting_is_the_difference_to_the_base_model(evaluated):
    folder, _ = evaluated
    base, tuned = (read_figures(folder / name).probe for name in ("base", "tuned"))
    assert (base.passages, base.forgetting, base.base) == (12, None, None)
    assert tuned.base == pytest.approx(base.bits_per_byte)
    assert tuned.forgetting.value == pytest.approx(tuned.bits_per_byte - base.bits_per_byte)
    low, high = tuned.forgetting.interval
    assert low < tuned.forgetting.value < high
    rows = lines_of(folder / "tuned" / "probe.jsonl")
    whole = sum(row["loss_sum"] for row in rows) / sum(row["bytes"] for row in rows) / math.log(2)
    assert tuned.bits_per_byte == pytest.approx(whole)
    assert "forgetting" in (folder / "tuned" / "report.html").read_text()


def test_the_interval_is_the_paired_bootstrap_over_passages(evaluated):
    import numpy as np
    from scipy.stats import bootstrap

    folder, _ = evaluated
    ours, theirs = (lines_of(folder / name / "probe.jsonl") for name in ("tuned", "base"))
    bits = np.array([a["loss_sum"] - b["loss_sum"] for a, b in zip(ours, theirs, strict=True)]) / math.log(2)
    sizes = np.array([row["bytes"] for row in ours])
    found = bootstrap((bits, sizes), lambda b, s: b.sum() / s.sum(), paired=True, vectorized=False, n_resamples=4000,
                      rng=np.random.default_rng(1)).confidence_interval  # fmt: skip
    width = found.high - found.low
    assert read_figures(folder / "tuned").probe.forgetting.interval == pytest.approx(list(found), abs=0.1 * width)


def test_another_text_than_the_base_models_is_refused(evaluated, capsys, tmp_path):
    folder, tuned = evaluated
    (tmp_path / "text.txt").write_text(f"{OTHER}\n\nAnother one.")
    arguments = [*tuned[:-1], tmp_path / "text.txt"]
    arguments[arguments.index("--output") + 1] = tmp_path / "out"
    assert "probed by another text" in complaint(capsys, evaluate_model.main, *arguments)


# --- the gate ------------------------------------------------------------------------------------

PROBE = {"passages": 16, "bytes": 1000, "tokens": 250, "bits_per_byte": 1.2, "interval": [1.1, 1.3], "seconds": 1.0}


@pytest.fixture
def probed(sweep):
    """The sweep, with a probe in its reports: the better a run, the more it forgot."""
    config, output = sweep
    for run in config["runs"]:
        file = Path(run["report"]) / "metrics.json"
        figures = json.loads(file.read_text())
        forgot = round(figures["values"]["accuracy"] - 0.8, 3)
        change = {"value": forgot, "interval": [forgot - 0.01, forgot + 0.01]}
        figures["probe"] = {**PROBE, "base": 1.2 - forgot, "forgetting": change}
        file.write_text(json.dumps(figures))
    return config, output


def test_the_leaderboard_and_the_page_show_forgetting(probed):
    config, output = probed
    board = compare_runs.compare(config, output)
    assert [row["forgetting"] for row in board.rows] == pytest.approx([0.15, 0.1, 0.1, 0.0])
    assert board.rows[0]["base_probe_bits_per_byte"] == pytest.approx(1.05)
    page = (output / "report.html").read_text()
    assert "What tuning gains, and what it forgets" in page
    assert "the base model 1.050: +0.150 (+0.140 to +0.160), so it forgot some." in page


def test_without_a_probe_nothing_is_said_of_forgetting(sweep):
    config, output = sweep
    assert "forgetting" not in compare_runs.compare(config, output).rows[0]
    assert "forget" not in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("gate", "reasons"),
    [
        ({"forgetting": 0.15, "gain": 0.45}, []),
        ({"forgetting": 0.1}, ["forgetting +0.15 bits per byte [+0.14, +0.16] is above 0.1"]),
        ({"gain": 0.5}, ["gain in accuracy on the validation split +0.45 [+0.1, +0.2] is below 0.5"]),
    ],
)
def test_bounds_of_the_chosen_run(probed, gate, reasons):
    config, output = probed
    config["eval"]["gate"] = {"forgetting": None, "gain": None, **gate}
    assert compare_runs.compare(config, output).gate == reasons
    assert all(reason in (output / "report.html").read_text() for reason in reasons)


def test_a_lower_loss_is_a_gain(probed):
    config, output = probed
    config["eval"] |= {"metric": "loss", "gate": {"forgetting": None, "gain": 0.3}}
    for run in config["runs"]:
        file = Path(run["report"]) / "metrics.json"
        figures = json.loads(file.read_text())
        file.write_text(json.dumps({**figures, "delta": {"value": -0.35, "interval": [-0.4, -0.3]}}))
    assert compare_runs.compare(config, output).gate == []
    config["eval"]["gate"]["gain"] = 0.4
    [reason] = compare_runs.compare(config, output).gate
    assert reason == "gain in loss on the validation split +0.35 [+0.3, +0.4] is below 0.4"


def test_a_bound_on_what_no_report_has_is_not_kept(sweep):
    config, output = sweep
    config["eval"]["gate"] = {"forgetting": 1.0, "gain": None}
    assert "forgetting was not measured" in compare_runs.compare(config, output).gate[0]


def test_by_hand_the_comparison_ends_with_1_after_all_is_written(probed, tmp_path, capsys):
    config, output = probed
    config["eval"]["gate"] = {"forgetting": 0.1, "gain": 9.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        compare_runs.main(["--config", str(tmp_path / "config.json"), "--output", str(output)])
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.out.count("gate: ") == 2
    assert "does not keep 2 bounds of eval.gate: exit code 1" in said.err
    assert len(json.loads((output / "provenance.json").read_text())["gate"]) == 2


# --- the config ----------------------------------------------------------------------------------


def configs(*overrides: str):
    return compose.expand(compose.parse_overrides(["experiment=demo", "sweep=none", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["probe=none", "eval.gate={forgetting: 0.05}"],
            "is a bound on what is not measured: choose a text (probe=edi",
        ),
        (["eval.gate={}"], "config: 'eval.gate': has no bound"),
        (["eval.gate.forgeting=1"], "config: unknown key 'eval.gate.forgeting'; did you mean 'forgetting'?"),
        (["probe=none", "probe.limit=5"], "config: 'probe': 'limit' is for a probe, and there is none"),
        (["probe.limit=1"], "config: 'probe.limit': input should be greater than or equal to 2"),
        (["probe=none,editorials"], "probe cannot be an axis"),
    ],
)
def test_what_cannot_be_is_refused_at_once(overrides, says):
    with pytest.raises(UserError) as caught:
        configs(*overrides)
    assert says in str(caught.value)


def test_a_bad_path_is_told_before_any_job(workspace):
    asked = ["probe=none", "probe.source.kind=files", "probe.source.path=mine.txt"]
    with pytest.raises(UserError, match=r"^probe\.source\.path: mine\.txt: no such file"):
        planner.build("demo", "none", asked)


def test_the_text_decides_the_key_and_its_path_does_not(workspace):
    def reports_of(name: str, text: str) -> set[str]:
        Path(name).write_text(text)
        asked = ["probe=none", "probe.source.kind=files", f"probe.source.path={name}"]
        plan = planner.build("demo", "none", asked)
        return {job.path for job in plan.jobs.values() if "probe" in job.inputs}

    first = reports_of("a.txt", "One.\n\nTwo.")
    assert len(first) == 2, "the ranked report of the run, and of the untouched model"
    assert reports_of("b.txt", "One.\n\nTwo.") == first
    assert not reports_of("b.txt", "One.\n\nThree.") & first


def test_one_name_for_data_and_another_probe_is_refused(workspace):
    with pytest.raises(UserError, match=r"probe\.name"):
        planner.build("demo", "none", ["probe.name=movie_reviews"])


def test_a_sentence_names_the_tied_run_that_forgot_least(probed):
    from temper.evaluation.comparison import rank

    config, _ = probed
    ranking = rank(config["runs"], config["eval"])
    ranking.recipes[1].p_holm = 1.0
    said = reports.forgetting_sentence(ranking, lambda run: run.name)
    assert said and said.endswith("Of the runs that cannot be told from the best, d forgot least (+0.100).")
