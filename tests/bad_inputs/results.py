"""What an earlier command wrote and is damaged by now: cut, emptied, of another type, not UTF-8, gone."""

import json
import os
import shutil
from pathlib import Path

from tests.bad_inputs import Bad, World
from tests.support.finished import ADAPTER, BASE, CONFIG, MERGED, RUN

MODEL, PROMPTS, SPLITS = "models/tiny-00000000a0", "prompts/reviews-00000000a1", "splits/reviews-tiny-00000000a2"
FOLDERS = {
    "model": f"results/{MODEL}",
    "prompts": f"results/{PROMPTS}",
    "splits": f"results/{SPLITS}",
    "adapter": f"results/adapters/{ADAPTER}",
    "merged": f"results/merged/{MERGED}",
    "base_report": f"results/reports/{BASE}",
    "report": f"results/reports/{RUN}",
    "sweep": "results/sweeps/tiny",
}
AGAIN = r"; delete {folder} and (make it again|run snakemake again)"

# --- the commands that read it -------------------------------------------------------------------


def _flags(*names: str, **others: str) -> list[str]:
    folders = {name: FOLDERS[name] for name in names} | others
    return [part for name, folder in folders.items() for part in (f"--{name.replace('_', '-')}", folder)]


EVALUATE = [*_flags("splits", "adapter", "base_report", model=FOLDERS["merged"], output="new"), *CONFIG]
COMMANDS = {
    "tokenize_splits": [*_flags("prompts", "model", output="new"), *CONFIG],
    "train_adapter": [*_flags("splits", "model", output="new"), *CONFIG],
    "merge_adapter": [*_flags("model", "adapter", output="new"), *CONFIG],
    "evaluate_model": EVALUATE,
    "compare_runs": ["--config", f"{FOLDERS['sweep']}/config.yaml", "--output", "results/sweeps/tiny"],
    "show": [FOLDERS["sweep"]],
    "chat": ["--run", RUN],
    "best": ["--run", "best"],
    "publish": ["--run", RUN, "--repository", "me/it", "--merged", "--dry-run", "new"],
    "plan": ["--experiment", "smoke"],
}
MODULES = {"show": "leaderboard", "best": "chat"}

# --- what happens to a file ----------------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _gone(path: Path) -> None:
    path.unlink()


def _with(content: str | bytes):
    """Other content of the same size, which only who reads it can see."""

    def spoil(path: Path) -> None:
        new = content.encode() if isinstance(content, str) else content
        path.write_bytes(new.ljust(path.stat().st_size))

    return spoil


def _without(*names: str):
    """Some keys taken out of a JSON object."""

    def spoil(path: Path) -> None:
        whole = json.loads(path.read_text(encoding="utf-8"))
        part = whole
        for name in names[:-1]:
            part = part[name]
        del part[names[-1]]
        _with(json.dumps(whole))(path)

    return spoil


def _changed(**values):
    """Other values in a JSON object."""
    return lambda path: _with(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))(path)


def _bad(name: str, says: str, command: str, file: str, spoil) -> Bad:
    """`file`: a name of FOLDERS and a path in that folder."""
    kind, _, inside = file.partition("/")

    def arguments(world: World) -> list[str]:
        shutil.copytree(world.project / "results", "results")
        spoil(Path(FOLDERS[kind]) / inside)
        return COMMANDS[command]

    return Bad(f"{name}, {command}", says.format(folder=FOLDERS[kind]), MODULES.get(command, command), arguments)


NO_JSON = r"{folder}/%s: damaged \(Expecting.*\)" + AGAIN
SHAPE = r"{folder}/%s: damaged \(.*%s.*\)" + AGAIN
CUT = r"{folder}: not whole: %s has \d+ bytes, and had \d+ when it was written" + AGAIN
MISSING = r"{folder}: not whole: %s is missing" + AGAIN

CASES = [
    # cut, emptied or gone: seen by the sizes that the provenance has
    _bad("prompts cut", CUT % "train.jsonl", "tokenize_splits", "prompts/train.jsonl", _cut),
    _bad("prompts gone", MISSING % "test.jsonl", "tokenize_splits", "prompts/test.jsonl", _gone),
    _bad("splits cut", CUT % "train/data.*arrow", "train_adapter", "splits/train/data-00000-of-00001.arrow", _cut),
    _bad("splits cut", CUT % "test/data.*arrow", "evaluate_model", "splits/test/data-00000-of-00001.arrow", _cut),
    _bad("audit emptied", CUT % "audit.json", "evaluate_model", "splits/audit.json", _empty),
    _bad("weights cut", CUT % "model.safetensors", "train_adapter", "model/model.safetensors", _cut),
    _bad("weights cut", CUT % "model.safetensors", "merge_adapter", "model/model.safetensors", _cut),
    _bad("merged weights cut", CUT % "model.safetensors", "chat", "merged/model.safetensors", _cut),
    _bad("merged weights cut", CUT % "model.safetensors", "publish", "merged/model.safetensors", _cut),
    _bad("adapter cut", CUT % "adapter_model.safetensors", "merge_adapter", "adapter/adapter_model.safetensors", _cut),
    _bad("tokenizer emptied", CUT % "tokenizer.json", "evaluate_model", "merged/tokenizer.json", _empty),
    _bad("answers of the base cut", CUT % "predictions.jsonl", "evaluate_model", "base_report/predictions.jsonl", _cut),
    _bad("figures of the base gone", r"it has no metrics\.json", "evaluate_model", "base_report/metrics.json", _gone),
    _bad("config emptied", CUT % "config.yaml", "chat", "splits/config.yaml", _empty),
    # of the same size, but of other content
    _bad("splits no Arrow", r"{folder}: cannot be read \(.*\)" + AGAIN, "train_adapter",
         "splits/train/data-00000-of-00001.arrow", _with("no arrow")),
    _bad("splits no JSON", r"{folder}: cannot be read \(.*\)" + AGAIN, "evaluate_model",
         "splits/dataset_dict.json", _with("{")),
    _bad("audit is a list", SHAPE % ("audit.json", "not an object"), "evaluate_model",
         "splits/audit.json", _with("[]")),
    _bad("audit without splits", SHAPE % ("audit.json", "has no 'splits'"), "evaluate_model", "splits/audit.json",
         _without("splits")),
    _bad("training.json is a list", SHAPE % ("training.json", "not an object"), "merge_adapter",
         "adapter/training.json", _with("[]")),
    _bad("training.json is not JSON", NO_JSON % "training.json", "evaluate_model", "adapter/training.json", _with("{")),
    _bad("curves broken", NO_JSON % "metrics.jsonl", "evaluate_model", "adapter/metrics.jsonl", _with("{}\n{\n")),
    _bad("curves are numbers", SHAPE % ("metrics.jsonl", "valid dictionary"), "evaluate_model",
         "adapter/metrics.jsonl", _with("1\n2\n")),
    _bad("answers broken", NO_JSON % "predictions.jsonl", "evaluate_model", "base_report/predictions.jsonl",
         _with("{")),
    _bad("figures of the base without task", SHAPE % ("metrics.json", "has no 'task'"), "evaluate_model",
         "base_report/metrics.json", _without("task")),
    _bad("provenance no JSON", r"{folder}: not whole: provenance\.json is damaged" + AGAIN, "merge_adapter",
         "adapter/provenance.json", _with("{")),
    _bad("config with a Python tag", SHAPE % ("config.yaml", "constructor"), "chat", "splits/config.yaml",
         _with("a: !!python/object/apply:os.system [true]\n")),
    _bad("config not UTF-8", SHAPE % ("config.yaml", "utf-8"), "chat", "splits/config.yaml", _with(b"a: \xff\n")),
    # what the comparison and the leaderboard read
    _bad("figures no JSON", NO_JSON % "metrics.json", "compare_runs", "report/metrics.json", _with("{")),
    _bad("figures cut", SHAPE % ("metrics.json", "char"), "compare_runs", "report/metrics.json", _cut),
    _bad("figures emptied", NO_JSON % "metrics.json", "compare_runs", "report/metrics.json", _empty),
    _bad("figures nested too deep", SHAPE % ("metrics.json", "recursion"), "compare_runs", "report/metrics.json",
         lambda path: path.write_text("[" * 100_000)),
    _bad("figures lack the metric", SHAPE % ("metrics.json", "no figure 'accuracy'"), "compare_runs",
         "report/metrics.json", _without("values", "accuracy")),
    _bad("figures of a wrong type", SHAPE % ("metrics.json", "'values'.*valid dictionary"), "compare_runs",
         "report/metrics.json", _changed(values=[])),
    _bad("curves of the report broken", NO_JSON % "curves.jsonl", "compare_runs", "report/curves.jsonl", _with("{")),
    _bad("leaderboard no JSON", NO_JSON % "leaderboard.json", "show", "sweep/leaderboard.json", _with("{")),
    _bad("leaderboard no JSON", NO_JSON % "leaderboard.json", "best", "sweep/leaderboard.json", _with("{")),
    _bad("leaderboard without rows", SHAPE % ("leaderboard.json", "row"), "best", "sweep/leaderboard.json",
         _with('{"rows": [], "chosen": "x"}')),
    _bad("leaderboard without its choice", SHAPE % ("leaderboard.json", "has no 'chosen'"), "best",
         "sweep/leaderboard.json", _without("chosen")),
    _bad("leaderboard without rows", SHAPE % ("leaderboard.json", "'rows'"), "show", "sweep/leaderboard.json",
         _without("rows")),
    _bad("leaderboard not UTF-8", SHAPE % ("leaderboard.json", "utf-8"), "show", "sweep/leaderboard.json",
         _with(b'{"metric": "\xff"}')),
    # what says which folders belong together
    _bad("provenance no JSON", NO_JSON % r"provenance\.json", "chat", "report/provenance.json", _with("{")),
    _bad("provenance is a list", SHAPE % ("provenance.json", "not an object"), "chat", "report/provenance.json",
         _with("[]")),
    _bad("provenance without inputs", SHAPE % ("provenance.json", "has no 'inputs'"), "chat",
         "report/provenance.json", _without("inputs")),
]  # fmt: skip


def _named_by_itself(world: World) -> list[str]:
    shutil.copytree(world.project / "results", "results")
    path = Path(FOLDERS["model"], "provenance.json")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**recorded, "stage": "merge_adapter", "inputs": {"model": FOLDERS["model"]}}))
    return ["--run", RUN, "--compare"]


def _output(name: str, says: str, *make: tuple[str, str | None], output: str = "mine") -> Bad:
    """`make`: files in the current folder, (path, content); content None is a link to nowhere."""

    def arguments(world: World) -> list[str]:
        shutil.copytree(world.project / "results", "results")
        for path, content in make:
            if content is None:
                Path(path).symlink_to("nowhere")
            else:
                world.write(path, content)
        return [*_flags("model", "adapter", output=output), *CONFIG]

    return Bad(name, says, "merge_adapter", arguments)


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


LONG = "n" * 250
CASES += [
    Bad("provenance that names itself", r"damaged \(its provenance\.json names itself\)", "chat", _named_by_itself),
    _output("output with somebody's files", r"has files that no step wrote", ("mine/notes.txt", "mine")),
    _output("output with somebody's files and a timestamp", r"has files that no step wrote",
            ("mine/notes.txt", "mine"), ("mine/.snakemake_timestamp", "")),
    _output("output is a link to nowhere", r"--output mine: is there already and is not a folder", ("mine", None)),
    _output("output is a file", r"--output mine: is there already and is not a folder", ("mine", "mine")),
    _output("output below a file", r"mine.*Not a directory; there is a file where a folder should be",
            ("mine", "mine"), output="mine/new"),
    _output("output with too long a name", r"the name n+\.\.\. has 250 bytes.*may have 240", output=LONG),
    _plan("data with too long a name", r"data\.name.*the name n+\.\.\. has 250 bytes", f"data.name={LONG}"),
    _plan("model with too long a name", r"model\.name.*the name .*has \d+ bytes", f"model.name={LONG}"),
    _plan("sweep with too long a name", r"sweep\.name.*the name n+\.\.\. has 261 bytes", f"sweep.name={LONG}"),
    _plan("names that are too long together", r"has \d+ bytes", f"data.name={LONG[:120]}", f"model.name={LONG[:120]}"),
    Bad("answers to a link to nowhere", r"--output new\.jsonl: is there already", "predict",
        lambda world: (Path("new.jsonl").symlink_to("nowhere"),
                       ["--run", RUN, "--input", "-", "--output", "new.jsonl"])[1]),
    Bad("GGUF to a link to nowhere", r"--output new\.gguf: is there already", "export",
        lambda world: (Path("new.gguf").symlink_to("nowhere"), ["--run", RUN, "--output", "new.gguf"])[1]),
    Bad("log that cannot be written", r"--log /proc/new/log: cannot be written", "merge_adapter",
        lambda world: [*_flags("model", "adapter", output="new"), "--log", "/proc/new/log", *CONFIG]),
    Bad("file in the place of a stage's folder", r"results/adapters: is not a folder", "plan",
        lambda world: (world.write("results/adapters", ""), COMMANDS["plan"])[1]),
    Bad("file in the place of the sweep's folder", r"results/sweeps/smoke: is not a folder", "plan",
        lambda world: (world.write("results/sweeps/smoke", ""), COMMANDS["plan"])[1]),
    Bad("file in the place of the results", r"results: is not a folder", "plan",
        lambda world: (world.write("results", ""), COMMANDS["plan"])[1]),
    Bad("run with too long a name", r"n\.\.\.: File name too long; choose a shorter name", "chat",
        lambda _: ["--run", "n" * 300]),
    Bad("references without their training", r"--adapter is missing: --references goes with", "evaluate_model",
        lambda world: (world.write("pairs/references.json", "{}"),
                       [*_flags(model=str(world.model), splits=str(world.splits), references="pairs", output="new"),
                        *CONFIG])[1]),
    Bad("diverged model without its training", r"--adapter is missing: gone: a training that", "evaluate_model",
        lambda world: (world.write("gone/diverged.json", '{"step": 3}'),
                       [*_flags(model="gone", splits=str(world.splits), output="new"), *CONFIG])[1]),
    Bad("plan that is damaged", r"plan\.json: damaged \(Expecting.*run snakemake again", "merge_adapter",
        lambda world: [*_flags(model=str(world.project / FOLDERS["model"]), output="new",
                               adapter=str(world.project / FOLDERS["adapter"])),
                       "--plan", str(world.write("plan.json", "{"))]),
    Bad("plan without the output", r"plan\.json: has no new; name the output as the plan does", "merge_adapter",
        lambda world: [*_flags(model=str(world.project / FOLDERS["model"]), output="new",
                               adapter=str(world.project / FOLDERS["adapter"])),
                       "--plan", str(world.write("plan.json", '{"jobs": {}}'))]),
]  # fmt: skip
