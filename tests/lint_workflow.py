"""`snakemake --lint` less one piece of advice: steps run in the project's .venv, so rules name no container.

python tests/lint_workflow.py
"""

import re
import subprocess
import sys

NOT_OURS = "Specify a conda environment or container for each rule."
RULES = 11  # that do work; `all` only asks


def main() -> None:
    # The exit code is not 0 as soon as there is any advice, so what it says is what counts.
    command = [sys.executable, "-m", "snakemake", "--lint"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    advice = [line.strip("* :") for line in said.splitlines() if re.match(r"\s+\* ", line)]
    if advice.count(NOT_OURS) != RULES:
        sys.exit(f"snakemake --lint looked at {advice.count(NOT_OURS)} rules, not at {RULES}:\n{said}")
    if len(advice) > RULES:
        sys.exit(said)
    print(f"snakemake --lint: {RULES} rules, nothing but its advice on containers")


if __name__ == "__main__":
    main()
