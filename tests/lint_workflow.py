"""`snakemake --lint` less one piece of advice: steps run in the project's .venv, so rules name no container.

python tests/lint_workflow.py
"""

import re
import subprocess
import sys
from pathlib import Path

NOT_OURS = "Specify a conda environment or container for each rule."


def main() -> None:
    # The exit code is not 0 as soon as there is any advice, so what it says is what counts.
    command = [sys.executable, "-m", "snakemake", "--lint"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    rules = len(
        re.findall(r"^(?:rule (?!all:)|checkpoint )", Path("Snakefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    advice = [line.strip("* :") for line in said.splitlines() if re.match(r"\s+\* ", line)]
    if advice.count(NOT_OURS) != rules:
        sys.exit(f"snakemake --lint looked at {advice.count(NOT_OURS)} rules, not at {rules}:\n{said}")
    if len(advice) > rules:
        sys.exit(said)
    print(f"snakemake --lint: {rules} rules, nothing but its advice on containers")


if __name__ == "__main__":
    main()
