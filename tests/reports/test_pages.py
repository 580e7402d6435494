"""The pages as an attacker would have them: any text in any field, and a page has the elements of a harmless one."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

from steps import compare_runs
from temper.evaluation.figures import Figures
from temper.files import read_json, read_json_lines
from temper.reports import html, run_page
from temper.runs.find import read_config
from tests.support.finished import RUN
from tests.support.sweeps import write_report

TEXTS = (  # shorter than what a label is cut to
    "\"'><script>x</script></style></svg><img src=x onerror=x>",
    "javascript:alert(1)//]]> --><!-- &lt;b&gt; {{ 7 }}",
)


class Form(HTMLParser):
    """All that a page is made of but its texts and numbers: elements, their attributes, scripts, styles, addresses."""

    def __init__(self, page: Path):
        super().__init__()
        self.found, self.inside = [], None
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        kept = {name: value for name, value in attrs if name in ("style", "class", "type", "src", "charset")}
        for name, value in attrs:
            if name.endswith("href"):
                address = urlsplit(value)
                kept[name] = (address.scheme, address.netloc)
        self.found.append((tag, sorted(name for name, _ in attrs), kept))

    def handle_endtag(self, tag):
        self.inside = None
        self.found.append(tag)

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.found.append(data)

    def handle_comment(self, data):
        self.found.append(("comment", data))

    handle_decl = unknown_decl = handle_pi = handle_comment


def planted(value, text: str):
    """The same with each text in it replaced, names as well where anybody gives them."""
    if isinstance(value, dict):
        return {name: planted(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [planted(item, text) for item in value]
    return text if isinstance(value, str) else value


def run_page_of(report: Path, folder: Path, text: str) -> Path:
    """The page of a run whose every text was chosen by somebody else."""
    facts = read_json(report / "metrics.json")
    labels = facts["confusion"]["labels"]
    names = {name: f"{text} {index}" for index, name in enumerate(labels)}
    for table in ("confusion", "base_confusion"):
        facts[table] |= {side: [names.get(name, text) for name in facts[table][side]] for side in ("labels", "columns")}
    facts["classes"] = {names[name]: row for name, row in facts["classes"].items()}
    facts["published"] = [{"name": f"{text} p", "metric": "accuracy", "value": 0.5, "source": text}]
    facts["baselines"] = [{"name": f"{text} b", "accuracy": 0.5}]
    facts |= {
        "start": {
            "name": f"{text} s",
            "values": facts["values"],
            "intervals": facts["intervals"],
            "metric": "accuracy",
        },
        "accuracy_of": text,
    }
    facts["train"] |= {"dtype": text, "device": text}
    facts["data_report"] = text
    facts["without_train"] = {"in_train": {"near": 1}, "rows": 9, "value": 0.5, "interval": [0.4, 0.6]}
    facts["left_out"] = {text: {"dropped": 1, "read": 2}}
    rows = [{**row, "rejected": text} for row in planted(read_json_lines(report / "predictions.jsonl"), text)]
    output = folder / text.replace("/", "")
    output.mkdir(parents=True)
    settings = read_config(report)["eval"]
    curves = read_json_lines(report / "curves.jsonl")
    run_page.write_page(output, Figures(**facts), rows, curves, settings, {text: {text: text}})
    return output / "report.html"


def test_any_text_in_any_field_of_a_runs_page_is_text(project, tmp_path):
    report = Path("results/reports", RUN)
    plain, *found = (Form(run_page_of(report, tmp_path, text)).found for text in ("plain", *TEXTS))
    assert found == [plain] * len(TEXTS)


def test_any_text_in_any_field_of_a_sweeps_page_is_text(sweep):
    config, output = sweep
    pages = [
        sweep_page_of(config, output.with_name(str(number)), text) for number, text in enumerate(("plain", *TEXTS))
    ]
    plain, *found = (Form(page).found for page in pages)
    assert found == [plain] * len(TEXTS)


def sweep_page_of(config: dict, output: Path, text: str) -> Path:
    """The page of a sweep whose every text was chosen by somebody else: three runs, one diverged, one missing."""
    runs = []
    for number, name in enumerate("abcd"):
        report = output / f"{text} {name}".replace("/", "")
        if name != "d":
            write_report(report, 0.5 + number / 10, 0.3)
        point = {
            "prompt.system": f"{text} {name}",
            f"data.columns.{text}": number % 2,
            "adapter.target_modules": [text],
        }
        runs.append({"name": f"{text} {name}", "point": point, "report": str(report)})
    (output / f"{text} a".replace("/", "") / "metrics.json").write_text(
        json.dumps({"task": "labels", "metric": "accuracy", "diverged_at_step": 3, "train": None})
    )
    published = [{"name": text, "metric": "accuracy", "value": 0.5, "source": text}]
    evaluated = {**config["eval"], "published": published}
    given = {"experiment": text, "overrides": [f"data.name={text}"]}
    compare_runs.compare({"eval": evaluated, "sweep": {"name": text, "axes": {}}, "runs": runs, **given}, output)
    return output / "report.html"


def test_the_page_of_a_diverged_run_has_its_name_as_text(tmp_path):
    for number, text in enumerate(["plain", *TEXTS]):
        page = tmp_path / f"{number}.html"
        html.render("diverged.html", page, name=text, step=3, loss_curves=None)
        assert Form(page).found == Form(tmp_path / "0.html").found
