"""A sweep seen from outside: what its command prints, `temper status` beside it, `snakemake --report` afterwards."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from temper.keys import PACKAGE_ROOT
from tests.support import tiny
from tests.support.workflow_tools import environment, own_sources, snakemake_command


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model):
    """(folder of a sweep of two runs, its arguments, what the command printed, what `temper status --watch` did)."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = [(f"{prompt} ({number})", label) for number in range(2) for prompt, label in tiny.tiny_rows(60)]
    small = "data.limit={train:40,validation:20,test:20} train.per_device_train_batch_size=4 tracking=none"
    swept = "sweep=none train.learning_rate=1e-3,1e-2"
    arguments = ["--config", "experiment=smoke", f"overrides={swept} {own_sources(folder, tiny_model, rows)} {small}"]
    planned = [*as_people_call_it(folder), "-n", *arguments]
    subprocess.run(planned, capture_output=True, env=environment(), cwd=folder, check=True)  # there is a plan to watch
    watching = [sys.executable, "-m", "temper", "status", "--watch"]
    seen = {**environment(), "PYTHONPATH": str(PACKAGE_ROOT)}
    ours = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(watching, **ours, env=seen, cwd=folder) as watch:
        command = [*as_people_call_it(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        watched = watch.communicate(timeout=60)[0]
    return folder, arguments, done.stderr, watched


def as_people_call_it(folder: Path) -> list[str]:
    """Without the option by which the other tests hear of each job."""
    command = snakemake_command(folder)
    at = command.index("--quiet")
    return command[:at] + command[at + 2 :]


def test_a_terminal_gets_a_line_for_each_job_and_the_log_the_whole(sweep):
    folder, _, printed, _ = sweep
    begun = re.findall(r"^\d\d:\d\d:\d\d (\w+) (\S+) begins$", printed, re.M)
    assert [name for name, _ in begun].count("train_adapter") == 2
    assert ("compare_runs", "single") in begun
    assert not re.search(r"^(local)?rule |jobid: |Finished jobid|Execute \d+ jobs|Select jobs", printed, re.M)
    assert re.search(r"^\d+ of \d+ steps \(\d+%\) done$", printed, re.M)
    logs = "".join(file.read_text() for file in (folder / ".snakemake" / "log").glob("*.log"))
    assert logs.count("rule train_adapter:") == 2 and "output: results/adapters/" in logs


def test_a_refused_input_is_met_once_and_says_so_in_a_line(tmp_path, tiny_model):
    """Whatever --retries says: the rules that run where Snakemake runs have their own number."""
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    overrides = f"sweep=none tracking=none {own_sources(tmp_path, broken, tiny.tiny_rows(60))}"
    command = [*as_people_call_it(tmp_path), "--retries", "2", "--until", "fetch_model", "--config", "experiment=smoke"]
    done = subprocess.run(
        [*command, f"overrides={overrides}"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "Trying to restart job" not in done.stderr
    assert done.stdout.count("error: model.source") == 1, "as it happens"
    assert done.stderr.count("error: model.source") == 1, "at the end"
    assert re.search(r"^\d\d:\d\d:\d\d fetch_model tiny-\w+ failed \(log: results/logs/", done.stderr, re.M)
    assert "set -euo pipefail" not in done.stderr, "the rule's command is in the log"
    assert "set -euo pipefail" in "".join(file.read_text() for file in (tmp_path / ".snakemake/log").glob("*.log"))


def test_status_beside_it_tells_what_began_and_ended_and_the_best(sweep):
    folder, _, _, watched = sweep
    trained = {path.name for path in (folder / "results/adapters").glob("[!.]*")}
    assert len(trained) == 2
    for name in trained:
        assert len(re.findall(rf"at work: adapters/{re.escape(name)}$", watched, re.M)) <= 1
        assert len(re.findall(rf" done: adapters/{re.escape(name)}$", watched, re.M)) == 1
    assert re.search(r"^sweep single: 2 runs: 2 done; complete$", watched, re.M)
    assert re.search(r"^best: learning_rate=0.0\d+, accuracy [01].\d+ \(", watched, re.M)


def report(sweep, name: str) -> Path:
    folder, arguments, _, _ = sweep
    command = [*snakemake_command(folder), "--report", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Missing metadata" not in done.stderr
    return folder / name


@pytest.fixture(scope="module")
def page(sweep) -> Path:
    return report(sweep, "report.html")


def test_snakemakes_report_has_all_pages_with_their_captions(sweep, page):
    text = page.read_text()
    assert "the chosen one was then judged once on test rows" in text
    folder = sweep[0]
    pages = [*folder.glob("results/*/[!.]*/*.html")]
    assert len(pages) == 3 + 2 + 1 + 1 + 1, "reports of runs and of the untouched model, data, audit, sweep"
    assert [path for path in pages if str(path.relative_to(folder)) not in text] == []
    for caption in ("token by token", "What became of the raw rows", "One model on the rows", "All runs of the sweep"):
        assert caption in text
    assert "untouched model" in text and "learning_rate=0.001" in text


def test_snakemakes_report_as_a_zip_file(sweep):
    with zipfile.ZipFile(report(sweep, "report.zip")) as file:
        names = file.namelist()
    assert sum(name.endswith("/report.html") for name in names) >= 7
    assert not any(name.endswith((".jsonl", ".safetensors")) for name in names), "pages, not the folders around them"


def test_snakemakes_report_opens_in_a_browser(page):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
    command = [chromium, *options, "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    body = re.sub(r"<script.*?</script>", "", shown, flags=re.S)
    for category in ("Sweep", "Runs", "Data"):
        assert re.search(rf">\s*{category}\s*<", body), category
