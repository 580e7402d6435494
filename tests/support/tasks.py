"""Tasks of lm-eval whose rows lie beside them: nothing comes from the hub."""

import json
from pathlib import Path

CHOICE = """task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: TASKS/choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ANSWER = """task: own_answer
dataset_path: json
dataset_kwargs: {data_files: {test: TASKS/answer.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function own.process
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: letters, aggregation: mean, higher_is_better: false}
metadata: {version: 2}
"""
OWN = """def process(doc, results):
    return {"letters": sum(letter.isalpha() for letter in results[0])}
"""
HUB = """task: from_hub
dataset_path: nobody/nothing
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: [a, b]
"""
NAMES = ["own_choice", "own_answer"]


def write_tasks(folder: Path) -> Path:
    """Write the tasks; their data files are named as from the current folder."""
    folder.mkdir(parents=True)
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("hub", HUB)):
        (folder / f"{name}.yaml").write_text(text.replace("TASKS", str(folder)))
    (folder / "own.py").write_text(OWN)
    subjects = ["The plot", "A scene", "This film", "The acting", "An old joke", "The music", "The end"]
    choices = [
        {"question": f"{subject} is", "choices": ["a joy", "dull and flat"], "answer": number % 2}
        for number, subject in enumerate(subjects)
    ]
    answers = [{"question": f"{subject}?", "answer": "yes"} for subject in subjects]
    for name, rows in (("choice", choices), ("answer", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
