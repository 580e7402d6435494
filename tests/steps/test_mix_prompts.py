"""mix_prompts: how often which rows come, where they stand, and rows of one data set in a split of another."""

import collections
import json
import shutil
from pathlib import Path

import pytest

from steps import format_prompts, mix_prompts
from temper.data.columns import SPLITS
from temper.data.places import of_mixture, parts_of
from tests.steps.test_own_splits import answers, complaint, rows, text, write

OUTPUT = Path("results/mixtures/both-key")


def formatted(name: str, some: list[dict], **data) -> str:
    output = f"results/prompts/{name}-key"
    shutil.rmtree(output, ignore_errors=True)
    config = {"data": {"layout": "question_answer", **data}, "prompt": {"system": None}}
    raw = write(f"{name}.jsonl", some)
    format_prompts.main(["--raw", raw, "--output", output, "--config", json.dumps(config)])
    return output


def mixed(prompts: dict[str, str], *weights: float, **data) -> dict[str, list[dict]]:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    mix = [{"source": source, "weight": weight} for source, weight in zip(prompts, weights, strict=True)]
    config = json.dumps({"data": {"mix": mix, **data}})
    mix_prompts.main(["--prompts", *prompts.values(), "--output", str(OUTPUT), "--config", config])
    lines = {split: (OUTPUT / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    return {split: list(map(json.loads, found)) for split, found in lines.items()}


def of(source: str, some: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"] for row in some if row["source"] == source]


def single(prompts: str, split: str) -> list[str]:
    lines = Path(prompts, f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][-1]["content"] for line in lines]


@pytest.fixture
def two(workspace) -> dict[str, str]:
    return {"one": formatted("one", rows(range(300))), "other": formatted("other", rows(range(1000, 1100)))}


def test_a_weight_says_how_often_a_training_row_comes(two):
    found = mixed(two, 2, 1.5)
    once = {name: single(path, "train") for name, path in two.items()}
    assert sorted(of("one", found["train"])) == sorted(once["one"] * 2)
    times = collections.Counter(of("other", found["train"]))
    assert set(times) == set(once["other"]) and set(times.values()) == {1, 2}
    assert 0.3 < sum(count == 2 for count in times.values()) / len(times) < 0.7
    for split in ("validation", "test"):
        assert {name: of(name, found[split]) for name in two} == {name: single(two[name], split) for name in two}
    stats = json.loads((OUTPUT / "stats.json").read_text())
    assert stats["splits"]["train"]["by_source"] == {
        "one": 2 * len(once["one"]),
        "other": sum(times.values()),
    }


def test_a_fraction_picks_the_same_rows_wherever_they_stand(two):
    few = set(of("one", mixed(two, 0.3, 1)["train"]))
    more = set(of("one", mixed(two, 0.6, 1)["train"]))
    assert few < more < set(single(two["one"], "train"))
    two["one"] = formatted("one", [*rows([5000]), *rows(range(300))])
    assert few == set(of("one", mixed(two, 0.3, 1)["train"])) - {"5000"}


def test_ids_name_each_row_of_each_data_set(two):
    found = mixed(two, 1, 1)
    everything = [row for some in found.values() for row in some]
    assert len({row["id"] for row in everything}) == len(everything) == 400
    at = of_mixture(parts_of(OUTPUT), {row["id"] for row in everything})
    for row in everything:
        place = at[row["id"]]
        line = Path(place.file).read_text().splitlines()[place.number - 1]
        assert json.loads(line)["answer"] == row["messages"][-1]["content"]
        assert place.file == f"{row['source']}.jsonl"


def test_a_row_of_one_data_set_in_a_split_of_another_is_told(workspace, caplog):
    shared = rows(range(40))
    one = formatted("one", rows(range(100, 200)) + shared, splits={"validation": 0.1, "test": 0.1})
    other = formatted("other", rows(range(300, 400)) + shared, splits={"validation": 0.1, "test": 0.6})
    prompts = {"one": one, "other": other}
    leaked = set(single(one, "train")) & set(single(other, "test"))
    assert len(leaked) > 5
    mixed(prompts, 1, 1)
    assert f"{len(leaked)} rows of test stand in train, too" in caplog.text
    assert "other.jsonl:" in caplog.text and ", as one.jsonl:" in caplog.text
    found = mixed(prompts, 2, 1, on_overlap="drop")
    assert not answers(found["train"]) & answers(found["test"])
    train = json.loads((OUTPUT / "stats.json").read_text())["splits"]["train"]
    assert train["by_source"] == {name: len(of(name, found["train"])) for name in prompts}
    assert train["left_out_by_overlap"] >= 2 * len(leaked)


def test_a_folder_for_each_data_set_and_rows_of_each(two, capsys):
    said = complaint(capsys, mixed, {**two, "third": two["one"]} and {"one": two["one"]}, 0.0000001)
    assert said.startswith("config: 'data.mix': weight 1e-07 of one picks none of its training rows")
    config = json.dumps({"data": {"mix": [{"source": "one", "weight": 1.0}]}})
    arguments = ["--prompts", *two.values(), "--output", "results/mixtures/x", "--config", config]
    said = complaint(capsys, mix_prompts.main, arguments)
    assert said == "--prompts: 2 folder(s), and data.mix has 1 data sets: give one for each"


def test_rows_whose_scores_tie_leave_ids_for_the_next_data_set(workspace):
    """Ids count the rows of the files, and of these some make no pair."""
    scored = [
        {"prompt": f"{text(number)}?", "responses": ["a", "b"], "scores": [number % 4, 0]} for number in range(80)
    ]
    prompts = {
        name: formatted(name, [{**row, "prompt": name + row["prompt"]} for row in scored], layout="scored_responses")
        for name in ("one", "other")
    }
    found = [row for split in mixed(prompts, 1, 1).values() for row in split]
    ids = {name: {row["id"] for row in found if row["source"] == name} for name in prompts}
    assert ids["one"].isdisjoint(ids["other"])
    places = of_mixture(parts_of(OUTPUT), ids["one"] | ids["other"])
    for row in found:
        place = places[row["id"]]
        line = Path(place.file).read_text().splitlines()[place.number - 1]
        assert json.loads(line)["prompt"] == row["messages"][0]["content"]
