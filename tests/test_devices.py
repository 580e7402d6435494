"""A GPU for each job. What lists the GPUs is a stand-in; the locks, the processes and the steps are real."""

import json
import os
import subprocess
import sys
import time

import pytest

from steps import evaluate_model, train_adapter
from temper import devices, step
from temper.config.stages import STAGES
from temper.errors import UserError
from tests.conftest import ROOT
from tests.support.gpus import TWO, install

CUT = """GPU 0: NVIDIA H200 (UUID: GPU-0a)
  MIG 1g.18gb     Device  0: (UUID: MIG-1)
  MIG 1g.18gb     Device  1: (UUID: MIG-2)
GPU 1: NVIDIA H200 (UUID: GPU-0b)"""


@pytest.mark.parametrize(
    ("listed", "given", "names"),
    [
        (TWO, None, ["GPU-0a", "GPU-0b"]),
        (CUT, None, ["MIG-1", "MIG-2", "GPU-0b"]),
        (TWO, "1", ["1"]),
        (TWO, "GPU-0b, GPU-0a", ["GPU-0b", "GPU-0a"]),
        (TWO, "", []),
        (TWO, "-1", []),
        ("", None, []),
    ],
)
def test_the_gpus_are_those_that_the_environment_leaves(monkeypatch, tmp_path, listed, given, names):
    install(monkeypatch, tmp_path, listed)
    if given is not None:
        monkeypatch.setenv(devices.CUDA, given)
    assert devices.gpus() == names


def test_a_driver_that_does_not_answer_has_no_gpus(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "NVIDIA-SMI has failed (UUID: GPU-no)", status=9)
    assert devices.gpus() == []


def test_gpus_of_amd_are_numbered(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "")
    for number, gpu in enumerate(("0", "0", "51", "77")):  # two processors, two GPUs
        (tmp_path / "nodes" / str(number)).mkdir(parents=True)
        (tmp_path / "nodes" / str(number) / "gpu_id").write_text(f"{gpu}\n")
    monkeypatch.setattr(devices, "AMD_NODES", tmp_path / "nodes")
    with devices.own_gpus():
        assert os.environ[devices.HIP] == "0"
        assert devices.CUDA not in os.environ
    monkeypatch.setenv(devices.HIP, "1")
    assert devices.gpus() == ["1"]


@pytest.mark.parametrize("given", ["1", "GPU-0b"])
def test_what_a_scheduler_has_given_is_left_alone(monkeypatch, tmp_path, given):
    install(monkeypatch, tmp_path, TWO)
    monkeypatch.setenv(devices.CUDA, given)
    with devices.own_gpus():
        assert os.environ[devices.CUDA] == given
    assert not list(tmp_path.glob("temper-gpus/*")), "there was nothing to choose"


def test_of_several_that_are_given_one_is_taken(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, TWO)
    monkeypatch.setenv(devices.CUDA, "1,0")
    with devices.own_gpus():
        assert os.environ[devices.CUDA] == "1"
        monkeypatch.delenv(devices.CUDA)  # another project's job, which nobody gave anything
        with devices.own_gpus():
            assert os.environ[devices.CUDA] == "GPU-0a", "the other one is that with number 1"
        os.environ[devices.CUDA] = "1"
    assert os.environ[devices.CUDA] == "1,0"


JOB = """
import json, logging, os, sys, time
from temper import devices
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
with devices.own_gpus():
    began = time.time()
    print(os.environ[devices.CUDA], flush=True)
    time.sleep(float(sys.argv[1]))
    print(json.dumps([os.environ[devices.CUDA], began, time.time()]))
"""


def start(seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", JOB, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_two_jobs_have_the_same_gpu_at_the_same_time(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, TWO)
    said = [job.communicate() for job in [start(0.5) for _ in range(5)]]
    taken: dict[str, list] = {"GPU-0a": [], "GPU-0b": []}
    for out, _ in said:
        name, began, ended = json.loads(out.splitlines()[-1])
        taken[name].append((began, ended))
    for times in taken.values():
        times.sort()
        assert times, "each was used"
        assert all(one[1] <= other[0] for one, other in zip(times, times[1:], strict=False))
    assert "1 GPU(s) wanted, and too few of 2 are free of other jobs: waiting" in "".join(error for _, error in said)


def test_a_killed_job_leaves_its_gpu(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, TWO)
    jobs = [start(600), start(600)]
    assert {job.stdout.readline().strip() for job in jobs} == {"GPU-0a", "GPU-0b"}
    for job in jobs:
        job.kill()
        job.communicate()
    started = time.monotonic()
    with devices.own_gpus():
        assert time.monotonic() - started < devices.PAUSE


def test_a_job_of_several_takes_all_of_them_or_none(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, TWO)
    with devices.own_gpus(2):
        assert os.environ[devices.CUDA] == "GPU-0a,GPU-0b"
    job = start(1)
    assert job.stdout.readline().strip() == "GPU-0a"
    began = time.time()
    with devices.own_gpus(2):
        assert time.time() > json.loads(job.stdout.read())[2] > began, "it waited, and held none meanwhile"
    job.communicate()
    refused = pytest.raises(UserError, match="num_processes=3, a GPU for each, and here are 2: give num_processes=2")
    with refused, devices.own_gpus(3):
        pass


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["experiment=smoke"], 1),
        (["num_processes=3"], 3),
        (["num_processes=3", "train.use_cpu=true"], 0),
        (["--config", '{"num_processes": 2, "train": {}}'], 2),
        (["--config", '{"num_processes": 2, "train": {"use_cpu": true}}'], 0),
        (["num_processes=many"], 1),
    ],
)
def test_a_step_knows_its_number_of_gpus_before_it_knows_its_config(words, count):
    arguments = step.step_parser(train_adapter).parse_intermixed_args(
        ["--splits", "s", "--model", "m", "--output", "o", *words]
    )
    assert step._gpus(arguments) == count


def test_locks_that_cannot_be_written_are_named(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, TWO)
    (tmp_path / "temper-gpus").write_text("a file")
    with pytest.raises(UserError, match="temper-gpus.*cannot be locked"), devices.own_gpus():
        pass


def test_a_step_takes_its_gpu_before_a_library_can_look(monkeypatch, workspace, tiny_model, tiny_splits, capsys):
    install(monkeypatch, workspace, TWO)
    evaluate_model.main(
        ["--model", str(tiny_model), "--splits", str(tiny_splits), "--output", "report", "experiment=smoke"]
        + ["sweep=none", "eval.published=[]", "model.load.dtype=float32"]
    )
    assert "GPU: GPU-0a, of 2" in capsys.readouterr().err
    computing = [name for name, stage in STAGES.items() if stage.on_gpu]
    code = f"import importlib, sys; [importlib.import_module('steps.' + name) for name in {computing}]"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
