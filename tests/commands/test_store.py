"""`temper push` and `temper pull`: folders go to a store and come back whole, or not at all."""

import importlib.util
import json
import shutil
import tarfile
import threading
from pathlib import Path

import pytest

from temper.folders import is_complete
from temper.hashing import file_sha256
from temper.planning import planner
from temper.runs.store import Store
from tests.support import finished, tiny
from tests.support.asking import command, complaint
from tests.support.workflow_tools import executed, own_sources, snakemake

BUCKET = "s3://temper-store/reviews"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A real S3 server in this process (moto), reached as any other: by AWS_ENDPOINT_URL."""
    pytest.importorskip("s3fs", reason="python -m pip install s3fs 'moto[server]'")
    server = pytest.importorskip("moto.server", reason="python -m pip install s3fs 'moto[server]'")
    thread = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import boto3

        boto3.client("s3").create_bucket(Bucket="temper-store")
        yield
    thread.stop()


@pytest.fixture(params=["folder", "s3"])
def address(request, tmp_path_factory) -> str:
    """Of an empty store, of each kind."""
    if request.param == "folder":
        return str(tmp_path_factory.mktemp("shared") / "store")
    request.getfixturevalue("s3")
    return f"{BUCKET}/{tmp_path_factory.mktemp('prefix').name}"


@pytest.fixture
def sweep(finished_run, workspace, tiny_model) -> list[str]:
    """Arguments that name a sweep of two runs, of which the current folder has one, and what both share."""
    sources = own_sources(workspace, tiny_model, [("A joy.", "positive"), ("Dull.", "negative")] * 40).split()
    arguments = ["--experiment", "smoke", *sources, "train.learning_rate=1e-3,1e-2"]
    plan = planner.build("smoke", None, arguments[2:])
    finished.put(finished_run, plan.runs[0].artefacts)
    return arguments


def content(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in Path(folder).rglob("[!.]*") if path.is_file()}


def emptied() -> None:
    """The current folder as on another machine."""
    shutil.rmtree("results")


def test_what_was_sent_comes_back_to_the_byte(sweep, address, capsys):
    made = {str(path.parent): content(path.parent) for path in Path("results").glob("*/*/provenance.json")}
    assert len(made) == 7
    command("push")([address])
    assert "sent 7 folder(s)" in capsys.readouterr().out
    command("push")([address])
    assert capsys.readouterr().out == "sent 0 folder(s), 0 bytes; 7 were there before\n"
    emptied()
    command("pull")([address, *sweep])
    said = capsys.readouterr().out
    assert "fetched 7 folder(s)" in said
    assert {folder: content(folder) for folder in made} == made
    plan = planner.build("smoke", None, sweep[2:])
    assert [job.path for job in plan.missing() if job.stage == "train_adapter"] == [
        plan.runs[1].artefacts["train_adapter"]
    ]
    command("pull")([address, *sweep])
    assert "fetched 0 folder(s), 0 bytes\n" in capsys.readouterr().out
    assert not list(Path("results").glob("*/.tmp-*"))


def test_some_kinds_only(sweep, address, capsys):
    command("push")([address, "--folders", "adapters,reports"])
    assert "sent 3 folder(s)" in capsys.readouterr().out
    assert {path.parent.name for path in Store(address).folders()} == {"adapters", "reports"}
    emptied()
    command("pull")([address, "--folders", "reports", *sweep])
    assert "fetched 2 folder(s)" in capsys.readouterr().out
    assert not Path("results/adapters").exists()


def test_what_a_store_has_is_never_replaced(sweep, address):
    store, folder = Store(address), next(Path("results/adapters").glob("*-*"))
    store.put(folder)
    before = content(folder)
    (folder / "training.json").write_text((folder / "training.json").read_text().replace("{", "[", 1))
    Store(address).put(folder)  # as a second machine that had listed the store before the first one sent it
    emptied()
    Store(address).get(folder)
    assert content(folder) == before


def test_a_folder_that_is_not_whole_is_not_sent(sweep, address, capsys):
    folder = next(Path("results/adapters").glob("*-*"))
    (folder / "training.json").unlink()
    shutil.copytree("results/models", "results/merged", dirs_exist_ok=True)
    Path("results/merged", next(Path("results/models").glob("*-*")).name).rename("results/merged/by-hand")
    command("push")([address, "--folders", "adapters,merged"])
    said = capsys.readouterr().out
    assert f"left out: {folder} is not whole (training.json is missing)\n" in said
    assert folder not in Store(address).folders()
    assert Path("results/merged/by-hand") not in Store(address).folders(), "its name says nothing of its content"


FAULTS = {
    "another byte": "has another sha256",
    "a file too few": "training.json has another sha256",
    "a file too many": "extra.json has another sha256",
    "cut": "unexpected end of data",
    "a way out": "../out.json is no file of a folder",
}


def damaged(fault: str, packed: Path) -> None:
    """Damage a tar that a folder's store has."""
    raw = packed.read_bytes()
    if fault == "cut":
        packed.write_bytes(raw[: len(raw) // 2])
        return
    if fault == "another byte":
        at = raw.rindex(b'"seconds"')
        packed.write_bytes(raw[:at] + b'"Seconds"' + raw[at + 9 :])
        return
    with tarfile.open(packed) as tar, tarfile.open(f"{packed}.new", "w") as new:
        for member in tar:
            if not (fault == "a file too few" and member.name == "training.json"):
                new.addfile(member, tar.extractfile(member))
        if fault in ("a file too many", "a way out"):
            Path("extra.json").write_text(json.dumps({}))
            new.add("extra.json", "extra.json" if fault == "a file too many" else "../out.json")
    Path(f"{packed}.new").rename(packed)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_it_was_sent_is_refused(sweep, tmp_path_factory, capsys, fault):
    address = tmp_path_factory.mktemp("store")
    command("push")([str(address), "--folders", "adapters"])
    [packed] = (address / "adapters").glob("*.tar")
    damaged(fault, packed)
    emptied()
    said = complaint(capsys, command("pull"), address, *sweep)
    assert said.startswith(f"{packed}: is not as it was sent (")
    assert FAULTS[fault] in said
    assert said.endswith("; delete it there, and send the folder again (temper push)")
    assert not list(Path("results/adapters").glob("*-*")), "nothing of it is left"


def test_an_upload_that_breaks_leaves_nothing(sweep, tmp_path_factory, monkeypatch):
    address = tmp_path_factory.mktemp("store")
    folder = next(Path("results/adapters").glob("*-*"))

    def half(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError):
        Store(str(address)).put(folder)
    assert Store(str(address)).folders() == {}
    assert not [path for path in address.rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert is_complete(folder)


def test_two_machines_fetch_into_one_folder_at_once(sweep, address):
    command("push")([address, "--folders", "adapters"])
    folder = next(Path("results/adapters").glob("*-*"))
    emptied()
    both = [threading.Thread(target=Store(address).get, args=(folder,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert is_complete(folder)


def test_addresses_that_are_none(sweep, capsys, tmp_path):
    assert complaint(capsys, command("push"), "gs://bucket/x") == (
        "gs://bucket/x: is no store: name s3://BUCKET/PREFIX, or a folder"
    )
    assert complaint(capsys, command("push"), tmp_path / "store", "--folders", "sweeps").startswith(
        "--folders sweeps: no such folder of results/: name some of models, prompts"
    )
    assert complaint(capsys, command("pull"), tmp_path / "store", *sweep).endswith(
        "store: has no folder of results/; check the address, or send some (temper push)"
    )
    if importlib.util.find_spec("s3fs") is None:
        said = complaint(capsys, command("push"), BUCKET)
        assert said.startswith(f"{BUCKET}: needs s3fs, which is not installed: python -m pip install s3fs==")


def test_a_bucket_that_is_not_there(sweep, s3, capsys):
    said = complaint(capsys, command("push"), "s3://no-such-bucket/x")
    assert said.startswith("s3://no-such-bucket/x: The specified bucket does not exist; check the address")


@pytest.mark.slow
def test_two_machines_train_and_a_third_compares(tmp_path, tiny_model, address, monkeypatch):
    """Of a sweep of two runs each takes one; files of the third are those of the first two, to the byte."""
    machines = [tmp_path / name for name in ("one", "two", "three")]
    rates = ["1e-3", "1e-2", "1e-3,1e-2"]
    rows = [(f"{prompt} ({number})", label) for number in range(2) for prompt, label in tiny.tiny_rows(60)]
    small = "data.limit={train:40,validation:20,test:20} train.per_device_train_batch_size=4 tracking.enabled=false"
    for machine, rate in zip(machines, rates, strict=True):
        machine.mkdir()
        overrides = f"sweep=none train.learning_rate={rate} {own_sources(machine, tiny_model, rows)} {small}"
        monkeypatch.chdir(machine)
        if machine == machines[-1]:
            command("pull")([address, "--experiment", "smoke", *overrides.split()])
        done = snakemake(machine, "--config", "experiment=smoke", f"overrides={overrides}")
        assert executed(done).get("train_adapter", 0) == (machine != machines[-1])
        command("push")([address])
    assert executed(done) == {"rank_runs": 1, "compare_runs": 1}
    for folder in Path("results/adapters").glob("*-*"):
        [made] = [machine for machine in machines[:2] if (machine / folder).is_dir()]
        assert content(folder) == content(made / folder)
