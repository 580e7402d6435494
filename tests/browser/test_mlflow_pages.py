"""MLflow's pages as a browser shows them: what the link of a sweep opens, notes, curves, reports, the champion.

MLFLOW_SHOTS=folder keeps a picture of each page.
"""

import os
import re
import time
from pathlib import Path

import pytest

from temper import tracking
from tests.support import browser, stores
from tests.test_tracking import LINES, plan, runs_of  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture
def server(plan):  # noqa: F811
    """The server of `temper ui` on the store of the planned sweep, at a free port."""
    made, _ = plan
    tracking.open_own_store()
    serving = stores.Server(Path.cwd(), ["--workers=1", f"--backend-store-uri=sqlite:///{tracking.STORE}"]).start()
    yield serving
    serving.kill()


@pytest.fixture
def page():
    with browser.opened() as page:
        yield page


def shot(page, name: str) -> None:
    if folder := os.environ.get("MLFLOW_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def at(server, link: str) -> str:
    """A link to `make ui`, or one without a server, as a link to the test's."""
    return f"{server.uri}/{link[link.index('#') :]}"


def sweep_run(runs):
    return next(run for run in runs if run.data.tags[tracking.RUN_TAG] == "-")


def names_in_order(page) -> list[str]:
    """The runs in the table, from above."""
    rows = page.locator(".ag-center-cols-container [role=row], .ag-pinned-left-cols-container [role=row]")
    found = rows.evaluate_all(
        "rows => rows.map(row => [Number(row.getAttribute('row-index')), row.innerText])"
        ".filter(([_, text]) => text.includes('=')).sort((one, other) => one[0] - other[0]).map(pair => pair[1])"
    )
    return [re.search(r"\w+=\S+", text)[0] for text in found]


def test_the_link_opens_the_sweeps_runs_best_first(plan, server, page):  # noqa: F811
    made, board = plan
    assert tracking.mirror(made, board)[0]
    other = tracking._connect(made.tracking, "other")
    tracking._child_run(other, "r", "of=another")
    link = tracking.link(made.tracking, made.sweep)
    page.goto(at(server, link))
    page.get_by_text("2 matching runs").wait_for()
    shot(page, "runs")
    order = [next(run.title for run in made.runs if run.name == row["run"]) for row in board.rows]
    assert names_in_order(page) == order, "all of this sweep, none of another, the best first"
    shown = page.locator("[role=columnheader]").evaluate_all(
        "all => all.sort((one, other) => one.getBoundingClientRect().x - other.getBoundingClientRect().x)"
        ".map(one => one.getAttribute('col-id'))"
    )
    asked = [f"params.`{key}`" for key in made.runs[0].point] + ["metrics.`validation_accuracy`"]
    assert [name for name in shown if name in asked] == asked, "what is swept, then what ranks"
    assert page.get_by_role("link", name="Models", exact=True).count(), "the menu is that for training models"


def test_the_notes_say_how_good_it_is_and_lead_on(plan, server, page):  # noqa: F811
    made, board = plan
    assert tracking.mirror(made, board)[0]
    place = tracking._connect(made.tracking, made.sweep)
    _, runs = runs_of(made)
    page.goto(at(server, f"#/experiments/{place.experiment}/runs/{sweep_run(runs).info.run_id}"))
    page.get_by_text("accuracy 0.900").wait_for()
    shot(page, "sweep")
    data, best = (_address(page, server, name) for name in ("what is learned of the rows", "best run"))
    page.goto(data)
    page.frame_locator("iframe").get_by_role("heading").first.wait_for()
    shot(page, "data")
    page.goto(best)
    page.get_by_text("untouched model: 0.600").wait_for()
    shot(page, "best")
    page.goto(_address(page, server, "report"))
    report = page.frame_locator("iframe")
    report.get_by_text("accuracy, tuned").first.wait_for()
    shot(page, "report")


def _address(page, server, name: str) -> str:
    """Where a link of a note leads; a click would open it in another tab."""
    return at(server, page.get_by_role("link", name=name, exact=True).get_attribute("href"))


def test_a_curve_grows_while_a_training_runs(plan, server, page):  # noqa: F811
    made, _ = plan
    tracking.prepare(made.tracking, made.sweep)
    with tracking.follow(made.jobs[made.runs[0].segments[-1]].settings["follow"]) as listener:
        for line in LINES[:2]:
            listener(line)
        run = _until(lambda: _live(made, "loss"))
        page.goto(at(server, f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics"))
        _until(lambda: _points(page) == 2)
        shot(page, "curve-of-two")
        for line in LINES[2:]:
            listener(line)
        _until(lambda: _points(page) == 4)  # the page asks again by itself
        shot(page, "curve-of-four")


def _live(made, metric: str):
    return next((run for run in runs_of(made)[1] if metric in run.data.metrics), None)


def _points(page) -> int:
    """How many points the first curve has."""
    return page.evaluate(
        "() => Math.max(0, ...[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.data[0].x.length))"
    )


def _until(asked, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := asked()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.5)
    return found


def test_the_champion_has_a_page_with_its_card_and_its_signature(plan, server, page):  # noqa: F811
    made, board = plan
    assert "champion of 'movie_reviews' is version 1" in tracking.mirror(made, board)[1]
    page.goto(at(server, "#/models/movie_reviews?workflowType=machine_learning"))
    page.get_by_text("champion").first.wait_for()
    shot(page, "model")
    page.goto(at(server, "#/models/movie_reviews/versions/1?workflowType=machine_learning"))
    page.get_by_text("Schema").first.wait_for()
    page.get_by_text("Inputs (").first.click()
    page.get_by_text("prompt").first.wait_for()
    shot(page, "version")
    text = page.inner_text("body")
    assert "Limits" in text and "The whole card is README.md" in text
