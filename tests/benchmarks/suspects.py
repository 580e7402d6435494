"""How many wrong labels the list of suspicious rows finds: 5% of the demo's labels, flipped on purpose.

    python -m tests.benchmarks.suspects flip data/raw/movie_reviews/movieReviewSnippets_GroundTruth.txt flipped.txt
    snakemake --cores 2 --config experiment=demo sweep=none overrides="data.name=flipped ~data.source \\
        +data.source.kind=files +data.source.path=flipped.txt eval.test=none"
    python -m tests.benchmarks.suspects found flipped.txt results/suspects/flipped-*

`flip` turns the sign of the ratings of the rows that a hash of their text selects, and writes their line numbers to
`<file>.lines`. `found` prints a Markdown table of what the list finds of them, beside what chance would.
"""

import hashlib
import sys
from pathlib import Path

from temper.files import read_json_lines

SHARE = 0.05
LISTS = (10, 20, 50, 100)


def flip(source: Path, copy: Path) -> None:
    """Write the copy with wrong labels; a rating of 0, which the demo calls negative, becomes positive."""
    lines, wrong = source.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        name, rating, text = line.split("\t")
        if _selected(text):
            wrong.append(number)
            lines[number - 1] = f"{name}\t{-float(rating) or 1.0}\t{text}"
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _numbers(copy).write_text("".join(f"{number}\n" for number in wrong))
    print(f"{len(wrong)} of {len(lines)} labels are wrong in {copy}")


def _selected(text: str) -> bool:
    """By other bytes of the hash than those that assign a row to its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[24:]) / 2**64 < SHARE


def _numbers(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.lines")


def found(copy: Path, folder: Path) -> None:
    """Print what the list in a folder of score_rows finds, were it of so many rows. The file's rows are its lines."""
    from sklearn.metrics import roc_auc_score

    wrong = {int(number) for number in _numbers(copy).read_text().split()}
    scores = read_json_lines(folder / "scores.jsonl", {"id": int, "split": str, "suspicion": float})
    print("| rows of | wrong | AUC | rows listed | of them wrong | of the wrong found | by chance |")
    print("|---" * 7 + "|")
    for name, splits in (("train", ["train"]), ("validation", ["validation"]), ("both", ["train", "validation"])):
        rows = sorted((row for row in scores if row["split"] in splits), key=lambda row: -row["suspicion"])
        is_wrong = [row["id"] in wrong for row in rows]
        if not any(is_wrong):
            continue
        auc = roc_auc_score(is_wrong, [row["suspicion"] for row in rows])
        for count in LISTS:
            hits = sum(is_wrong[:count])
            print(
                f"| {name}, {len(rows)} | {sum(is_wrong)} | {auc:.3f} | {count} | {hits / count:.0%} "
                f"| {hits / sum(is_wrong):.0%} | {min(1, count / len(rows)):.0%} |"
            )


if __name__ == "__main__":
    {"flip": flip, "found": found}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
