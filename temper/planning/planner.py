"""Turns the points of a sweep into jobs whose paths end in keys."""

import copy
import math
import os
import statistics
from pathlib import Path

from temper import tracking
from temper.config import harness as harness_checks
from temper.config.audit import check as check_audit
from temper.config.best import JUDGING
from temper.config.compose import Search, chosen_experiment, own_folder, parse_overrides, split_overrides, use_folder
from temper.config.schema import STRATEGIES_OF, WITH_REFERENCE, Merge, Probe, Quantization, Sweep
from temper.config.search import EPOCHS, HALVING, SEARCHES, Point, Rungs, guessed, write_study
from temper.config.stages import FOLDERS, PLATEAU, STAGES, keys_hidden, numbered, stage_config
from temper.config.validate import all_data_sets, data_sets, documents_config, has_pairs, sft_config
from temper.errors import UserError
from temper.evaluation import own_metrics
from temper.evaluation.forgetting import told_of_probe
from temper.evaluation.metrics import BITS_PER_BYTE, DOCUMENTS, PER_TOKEN, check_metric, lower_is_better, sweeps_model
from temper.files import read_json
from temper.folders import check_name, is_complete
from temper.hashing import HashCache, canonical_json
from temper.keys import code_key, stage_key
from temper.model.adapters import load_for_training
from temper.model.layout import model_files
from temper.planning.plan import FOR_CHOSEN, HASHES, RANKING, RESULTS, STATE, Job, Plan, PlannedRun
from temper.planning.trunks import DECAYING_AT_THE_END, needs_total, shares_trunk
from temper.sources import pins as raw_data
from temper.sources.revisions import pinned


def build(
    experiment: str | None = None,
    sweep: str | None = None,
    overrides: str | list[str] = "",
    conf_dir: str | None = None,
) -> Plan:
    """Plan an experiment, as far as its rankings that are made tell what to run.

    Arguments and errors are those of `growing`.
    """
    return growing(experiment, sweep, overrides, conf_dir).plan


def growing(
    experiment: str | None = None,
    sweep: str | None = None,
    overrides: str | list[str] = "",
    conf_dir: str | None = None,
) -> "Growing":
    """The same plan, which can be told to go on when its ranking is made.

    Args:
        experiment: a file of conf/experiment; None takes the default of conf/config.yaml.
        sweep: a file of conf/sweep; None takes the experiment's own.
        overrides: Hydra overrides, as one text or a list; a swept value (``a=1,2``) is an axis.
        conf_dir: a folder of configs that is searched before conf/, from now on.

    Raises:
        UserError: for anything in config or raw data that would make a job fail later.
    """
    if conf_dir:
        use_folder(conf_dir)
    texts = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    chosen = [f"{group}={name}" for group, name in (("experiment", experiment), ("sweep", sweep)) if name]
    return Growing([*chosen, *texts], texts)


NO_STRATEGY = Sweep(name="grid")


class Growing:
    """A plan that grows: with each ranking that is made, by the runs of the next round (see `temper.config.search`).

    It begins with the rounds whose rankings are there. What it was made from is read once, so that an edit to a config
    or to data does not change a sweep at work.

    Args:
        overrides: all of them.
        shown: those that the sweep's page shows, less its axes.
    """

    def __init__(self, overrides: list[str], shown: list[str]):
        self.overrides = overrides
        parsed = parse_overrides(overrides)
        self.search = Search(parsed)
        first = self.search.runs[0][1][1]
        tracking.check(first["tracking"])
        self.is_search = self.search.sweep.strategy in SEARCHES
        if self.is_search and first["eval"]["split"] == "test":
            raise UserError(
                f"sweep: strategy={self.search.sweep.strategy} would rank by the test split round after round, which "
                "flatters what it chooses: rank by eval.split=validation"
            )
        self.first, self.planner = first, _Planner(HashCache(HASHES), self.search.rungs)
        self.shown = [text for text in shown if text.partition("=")[0].strip() not in parsed.axes]
        self.names: dict[Point, list[str]] = {}  # a point -> its runs, one of each seed
        self.known: list[dict] = []  # data sets whose options were checked: looking for their files takes time
        self.plan = Plan(first["sweep"]["name"], chosen_experiment(parsed), {}, first["tracking"], [], {})
        self._add_round()
        if not self.goes_on():
            self._finish()

    def goes_on(self) -> bool:
        """Add the rounds that follow on the rankings that are made; whether there is one."""
        grew = False
        while self.is_search and self.plan.is_made(self.plan.ranking) and self.search.tell(*self._came_out()):
            self._add_round()
            grew = True
        if grew:
            self._finish()
        return grew

    def likely(self) -> Plan:
        """The plan with all rounds, as if the first points of each round to come were the best: for a forecast."""
        again = Growing(self.overrides, [])
        while again.search.tell(guessed(again.search.points, {})):
            again._add_round()
        return again.plan

    def write_study(self, path: Path) -> None:
        """Write a search as a study of Optuna."""
        search, lower = self.search, lower_is_better(check_metric(self.first["eval"]))
        if search.told and search.asked:
            write_study(path, search.sweep, search.asked, search.rungs, search.told, maximize=not lower)

    def _came_out(self) -> tuple[dict[Point, float], dict[Point, float] | None]:
        """(what the ranking says of each point of this round, the mean over its seeds; what halving goes by)

        Lower is better. Halving goes by the place: by the metric of those that are better than the untouched model, by
        more than their rows explain. All others come after them, by their loss. It says who has learned more, where
        the metric says as yet who has forgotten less.
        """
        wanted = {"metric": str, "values": dict, "losses": dict, "gained": list[str]}
        found = read_json(Path(self.plan.ranking.path) / RANKING, wanted)
        sign, points = 1 if lower_is_better(found["metric"]) else -1, self.search.points

        def mean(figures: dict, sign: int, point: Point) -> float:
            own = [figures[name] for name in self.names[point]]
            return math.inf if None in own else statistics.fmean(sign * value for value in own)

        values = {point: mean(found["values"], sign, point) for point in points}
        if self.search.sweep.strategy != HALVING:
            return values, None
        gained = {point for point in points if not {*self.names[point]}.isdisjoint(found["gained"])}
        by = {point: values[point] if point in gained else mean(found["losses"], 1, point) for point in points}
        order = sorted(points, key=lambda point: (point not in gained, by[point]))
        return values, {point: math.inf if math.isinf(values[point]) else at for at, point in enumerate(order)}

    def _add_round(self) -> None:
        runs = {run.name: run for run in self.plan.runs}
        for point, (values, config) in self.search.runs:
            check_metric(config["eval"])
            _refuse_cut(self.search.rungs, config)
            for data in all_data_sets(config):
                if data not in self.known:
                    raw_data.check_options(data)
                    self.known.append(data)
            run = self.planner.add_run(config, values)
            runs.setdefault(run.name, run)  # 1e-4 and 0.0001 are one run
            self.names.setdefault(point, []).append(run.name)
        self.planner.hashes.save()
        plan = self.plan
        plan.runs, plan.jobs, plan.axes = list(runs.values()), self.planner.jobs, self.search.axes
        _add_comparison(plan, self.first, self.shown)

    def _finish(self) -> None:
        """Add to the plan what all its rounds together say, and check it."""
        self.plan.coming = self.search.coming()
        _add_tracking_targets(self.plan)
        # A search may ask for more epochs later, so it keeps the last checkpoints until all is compared.
        _add_retention(self.plan, "last" if self.is_search else self.first["keep"]["checkpoints"])
        _check_places(self.plan)
        _check_audits(self.plan)


def _check_audits(plan: Plan) -> None:
    """Refuse rows that were tokenized before, under other limits than those of this plan."""
    for job in plan.jobs.values():
        if job.stage == "tokenize_splits" and is_complete(Path(job.path)):
            audit = read_json(Path(job.path) / "audit.json", {"max_length": int, "splits": dict[str, dict]})
            check_audit(audit, job.settings["tokenize"], Path(job.inputs["prompts"]))


def _check_places(plan: Plan) -> None:
    """Refuse now what would stop a job hours later: a name that is too long, or a file in a folder's place."""
    for path in plan.jobs:
        check_name(Path(path), "config: a folder is named after data.name, model.name and sweep.name")
    folders = {job.path for job in plan.jobs.values() if job.stage != "fetch_data"}
    for place in {path.rpartition("/")[0] for path in plan.jobs}:
        folders.update(map(str, (Path(place), *Path(place).parents)))
    for folder in sorted(folders):
        if os.path.lexists(folder) and not Path(folder).is_dir():
            raise UserError(f"{folder}: is not a folder, and there should be one: move it away")


def _add_tracking_targets(plan: Plan) -> None:
    """Tell each training which MLflow run its curves belong to: the shortest run of its trunk."""
    for run in sorted(plan.runs, key=lambda run: len(run.segments)):
        for path in run.segments:
            target = {"tracking": plan.tracking, "sweep": plan.sweep, "run": run.name, "title": run.title}
            plan.jobs[path].settings.setdefault("follow", target)


def _add_retention(plan: Plan, checkpoints: str) -> None:
    """Tell each training what to keep of its checkpoints: the last one where another job of this plan continues."""
    continued = {job.inputs.get("previous") for job in plan.jobs.values()}
    for path, job in plan.jobs.items():
        if job.stage == "train_adapter":
            job.settings["keep"] = "last" if path in continued else checkpoints


def _add_comparison(plan: Plan, config: dict, overrides: list[str]) -> None:
    """The last job: compare all reports of the sweep. `overrides`: those that are not axes."""
    for run in plan.runs:
        for key in ("task", "split"):
            if run.config["eval"][key] != config["eval"][key]:
                raise UserError(f"sweep: runs with different eval.{key} cannot be ranked together: sweep them apart")
    if sweeps_model(plan.axes) and config["eval"]["metric"] in PER_TOKEN:
        raise UserError(
            f"sweep: '{config['eval']['metric']}' is per token, and models have different tokens: rank by "
            f"eval.metric={BITS_PER_BYTE}, or sweep the models apart"
        )
    reports = {run.name: run.artefacts["evaluate_model"] for run in plan.runs}
    runs = [{"name": run.name, "point": run.point, "report": reports[run.name]} for run in plan.runs]
    choose = config["sweep"]["choose"]
    settings = {name: value for name, value in config["eval"].items() if name != "gate"}  # the comparison's affair
    _add_ranking(plan, {"eval": settings, "sweep": {"choose": choose}, "runs": runs}, reports)

    for run, planned in zip(plan.runs, runs, strict=True):
        planned["test_report"] = run.artefacts["test_report"]
        planned |= {name: run.artefacts[stage] for stage, name in FOR_CHOSEN.items() if stage in run.artefacts}
    view = {
        "experiment": plan.experiment,
        "eval": config["eval"],
        "sweep": {"name": plan.sweep, "axes": plan.axes, "choose": choose, **_strategy(config["sweep"])},
        "runs": runs,
    }
    path = str(RESULTS / "sweeps" / plan.sweep)
    # The overrides are not in the key: the page only shows them, and what they change is in the runs.
    key = stage_key("compare_runs", view, {})
    plan.jobs[path] = Job("compare_runs", path, key, {**view, "overrides": overrides, **_own_configs()}, reports)


def _strategy(sweep: dict) -> dict:
    """What a sweep says of its strategy, for the page."""
    return {name: sweep[name] for name in ("strategy", *STRATEGIES_OF) if sweep[name] != getattr(NO_STRATEGY, name)}


def _add_ranking(plan: Plan, view: dict, reports: dict[str, str]) -> None:
    """The job that decides which runs are judged on the test split."""
    view = copy.deepcopy(view)
    key = stage_key("rank_runs", view, {})  # the reports' paths, which it has, end in their keys
    path = str(RESULTS / FOLDERS["rank_runs"] / f"{plan.sweep}-{key}")
    plan.jobs[path] = Job("rank_runs", path, key, view, reports)


def _own_configs() -> dict[str, str]:
    """Where the user's own configs are, for the command on the page."""
    own = own_folder()
    return {"conf_dir": os.path.relpath(own)} if own else {}


def _refuse_cut(rungs: Rungs, config: dict) -> None:
    """Refuse rungs of a training that cannot stop there and go on as if it had not."""
    if not rungs.key:
        return
    if why := needs_total(config["train"]):
        raise UserError(f"sweep: runs are trained on from rung to rung, and {why}")
    field = rungs.key.partition(".")[2]
    for name in ("sft", "first"):
        before = config["method"].get(name)
        if before and field not in before["train"]:
            raise UserError(
                f"sweep: the rungs are values of {rungs.key}, which method.{name} would take over, so that each rung "
                f"starts from another model: set method.{name}.train.{field}"
            )


# The config sections that decide what is made before any training; `probe` by its text.
OF_UNTOUCHED = sorted(
    {"probe"}.union(
        *(
            STAGES[stage].config.model_fields
            for stage in ("fetch_data", "format_prompts", "mix_prompts", "tokenize_splits", "evaluate_model")
        )
    )
)


class _Planner:
    """Collects jobs; artefacts that several runs need are planned once."""

    def __init__(self, hashes: HashCache, rungs: Rungs):
        self.hashes, self.rungs = hashes, rungs
        self.jobs: dict[str, Job] = {}
        self.identities: dict[str, dict] = {}
        self.sources: dict[str, str] = {}  # data set's name -> its pin
        self.own_code: dict[str, dict[str, str]] = {}  # eval.metrics -> file -> hash
        self.harness: dict[str, dict] = {}  # eval.harness -> what its key has beside it
        self.untouched: dict[str, tuple] = {}  # sections of its stages -> what `_untouched` says
        self.model_files: dict[str, dict] = {}  # model.source -> hashes of a local one's files
        self.exact: dict[str, dict] = {}  # source as the config has it -> the same, pinned

    def add_run(self, config: dict, point: dict) -> PlannedRun:
        config = self._pinned(config)
        base = self._job("fetch_model", config["model"]["name"], config, {}, extra=self._model_files(config))
        prompts, raw, splits, bases = self._untouched(config, base)
        start, starts = base, {}
        firsts: dict[str, Job] = {}
        if config["method"].get("sft"):
            start, starts = self._tuned(sft_config(config), base, splits, bases)[1:]
        if config["method"].get("first"):
            start, firsts, starts = self._after_documents(config, base, splits, bases)
        before = {"start_report": starts, "first_report": firsts}
        adapters, merged, reports = self._tuned(config, start, splits, bases, before)
        split = config["eval"]["split"]
        artefacts = {
            **raw,
            "fetch_model": base.path,
            prompts.stage: prompts.path,
            "tokenize_splits": splits.path,
            "train_adapter": adapters[-1].path,
            "merge_adapter": merged.path,
            "evaluate_model": reports[split].path,
            "base_report": bases[split].path,
            "test_report": reports["test"].path,
            **({"start_report": starts[split].path} if starts else {}),
        }
        if config["eval"]["suspects"] and config["eval"]["task"] != DOCUMENTS:
            inputs = {"model": start.path, "adapter": adapters[-1].path}
            inputs |= {"splits": splits.path, "prompts": prompts.path}
            inputs |= {"raw": raw["fetch_data"]} if raw else {}
            artefacts["score_rows"] = self._job("score_rows", _slug(config), config, inputs).path
        artefacts |= self._harness(config, base, start, adapters[-1], splits)
        name, key = Path(reports[split].path).name, reports[split].key
        return PlannedRun(name, key, point, config, artefacts, [segment.path for segment in adapters])

    def _untouched(self, config: dict, base: Job) -> tuple[Job, dict[str, str], Job, dict[str, Job]]:
        """(prompts, raw data by the stage that fetches it, splits, reports of the untouched model on these).

        Most runs of a sweep share them, so they are planned once for all whose sections of these stages are the same.
        """
        sections = {name: config[name] for name in OF_UNTOUCHED if name in config}
        asked = canonical_json([base.path, sections, config["method"].get("first")])
        if asked not in self.untouched:
            self.untouched[asked] = self._plan_untouched(config, base)
        return self.untouched[asked]

    def _plan_untouched(self, config: dict, base: Job) -> tuple[Job, dict[str, str], Job, dict[str, Job]]:
        slug = f"{config['data']['name']}-{config['model']['name']}"
        prompts, raw = self._prompts(config)
        splits = self._job("tokenize_splits", slug, config, {"prompts": prompts.path, "model": base.path})
        inputs = {"model": base.path, "splits": splits.path}
        return prompts, raw, splits, self._reports(f"base-{slug}", config, inputs)

    def _after_documents(self, config: dict, base: Job, splits: Job, bases: dict[str, Job]):
        """(the model trained on the documents of `method.first`, its reports on these, and on the run's own rows)."""
        first = documents_config(config)
        _, _, rows, untouched = self._untouched(first, base)
        adapters, merged, reports = self._tuned(first, base, rows, untouched)
        inputs = {"model": merged.path, "splits": splits.path, "adapter": adapters[-1].path}
        name = f"{config['data']['name']}-after-{_slug(first)}"
        return merged, reports, self._reports(name, config, inputs, base_report=bases)

    def _prompts(self, config: dict) -> tuple[Job, dict[str, str]]:
        """(the job whose prompts are tokenized, the raw data of a single data set by the stage that fetches it)."""
        if "mix" not in config["data"]:
            job, pin = self._formatted(config)
            return job, {"fetch_data": pin}
        parts = [self._formatted({**config, "data": data})[0].path for data in data_sets(config["data"])]
        return self._job("mix_prompts", config["data"]["name"], config, numbered("prompts", parts)), {}

    def _formatted(self, config: dict) -> tuple[Job, str]:
        """(the job that formats a data set, its raw data)."""
        data = config["data"]
        pin = self._raw(data)
        return self._job("format_prompts", data["name"], config, {"raw": pin}, {"raw": self._identity(data)}), pin

    def _reports(self, slug: str, config: dict, inputs: dict[str, str], **others: dict[str, Job]) -> dict[str, Job]:
        """Split -> the report of a model: on the split that ranks the runs, and on the test split.

        Args:
            others: name of an input -> reports of another model, of which each report reads the one of its own split.
        """
        found = {}
        config = config if "adapter" in inputs else _unmerged(config)
        for split in dict.fromkeys([config["eval"]["split"], "test"]):
            probed = config if split == config["eval"]["split"] else {**config, "probe": Probe().model_dump()}
            view = {**probed, "eval": {**config["eval"], "split": split}}
            beside = {name: reports[split].path for name, reports in others.items() if reports}
            # The probe is the same text, whatever the split: the report that ranks has its figures.
            probe, extra = self._probe(probed)
            name = slug if split == "validation" else f"{slug}-{split}"
            found[split] = self._job("evaluate_model", name, view, {**inputs, **beside, **probe}, extra, {"probe"})
        return found

    def _tuned(self, config: dict, start: Job, splits: Job, bases: dict[str, Job], before: dict | None = None):
        """(training jobs, merge, reports) of a model trained from `start`.

        Args:
            before: reports of the trainings that came before, as `_reports` takes them.
        """
        pairs = self._own_answers(config, start, splits)
        references = self._references(config, start, pairs)
        learnt = config
        if pairs is not splits:  # for the training they are data like any other
            learnt = {**config, "method": {**config["method"], "own_answers": None}}
        adapters = self._adapters(learnt, {"splits": pairs.path, "model": start.path, **references})
        adapter, slug = adapters[-1], _slug(config)
        parts = {"model": start.path, "adapter": adapter.path, "splits": splits.path}
        merged = self._job("merge_adapter", slug, config, parts)
        inputs = {"model": start.path, "splits": splits.path, "adapter": adapter.path}
        if has_pairs(config["data"]):  # by which runs are judged, not by sampled ones
            inputs |= self._references(config, start, splits)
        reports = self._reports(slug, config, inputs, base_report=bases, **(before or {}))
        return adapters, merged, reports

    def _own_answers(self, config: dict, start: Job, splits: Job) -> Job:
        """The splits to learn from: as they are, or with the wrong answers of `start` as rejected ones."""
        if not config["method"].get("own_answers"):
            return splits
        view = {**config, "method": {name: config["method"][name] for name in ("name", "own_answers")}}
        return self._job("sample_answers", _data_slug(config), view, {"model": start.path, "splits": splits.path})

    def _references(self, config: dict, start: Job, splits: Job) -> dict[str, str]:
        """What preference optimization reads besides the splits: the starting model's log-probabilities of the answers.

        All runs of a sweep that start from the same model share them.
        """
        if config["method"]["name"] not in WITH_REFERENCE:
            return {}
        load = load_for_training(config["adapter"], config["model"]["load"])
        view = {**config, "model": {**config["model"], "load": load}}
        job = self._job("reference_logprobs", _data_slug(config), view, {"model": start.path, "splits": splits.path})
        return {"references": job.path}

    def _pinned(self, config: dict) -> dict:
        """The config with hub branches replaced by their commits, so that keys depend on the commits."""
        found = {
            name: self._exactly(config[name], kind, name) for name, kind in (("model", "model"), ("probe", "dataset"))
        }
        if first := config["method"].get("first"):
            exact = self._exactly(first["data"], "dataset", "method.first.data")
            found["method"] = {**config["method"], "first": {**first, "data": exact}}
        data = config["data"]
        if "mix" in data:
            parts = [{**part, "data": self._exactly(part["data"], "dataset", "data")} for part in data["mix"]]
            return {**config, **found, "data": {**data, "mix": parts}}
        return {**config, **found, "data": self._exactly(data, "dataset", "data")}

    def _exactly(self, section: dict, kind: str, name: str) -> dict:
        """A section with its source pinned, if it has one."""
        source = section["source"]
        if source is None:
            return section
        asked = canonical_json(source)
        if asked not in self.exact:
            self.exact[asked] = pinned(source, kind, f"{name}.source")
        return {**section, "source": self.exact[asked]}

    def _probe(self, config: dict) -> tuple[dict[str, str], dict]:
        """(the input `probe` of an evaluation, the identity of its text), if there is one."""
        if config["probe"]["source"] is None:
            return {}, {}
        if config["probe"]["name"] in [data["name"] for data in all_data_sets(config)]:
            raise UserError(
                f"config: 'probe.name': {config['probe']['name']} is the name of the data, whose folder it "
                "would share: name the probe otherwise"
            )
        with told_of_probe():
            return {"probe": self._raw(config["probe"])}, {"probe_text": self._identity(config["probe"])}

    def _raw(self, section: dict) -> str:
        """Plan the fetch_data job; its output is the pin file, its identity the content of the raw files."""
        name, source = section["name"], section["source"]
        path = str(raw_data.pin_path(name, source))
        key = raw_data.pin_key(source)
        if self.sources.setdefault(name, path) != path:
            raise UserError(
                f"config: two sources for data.name={name}, which has one folder data/raw/{name}: "
                "sweep data=..., with a name each"
            )
        self.jobs.setdefault(path, Job("fetch_data", path, key, stage_config("fetch_data", {"data": section}), {}))
        return path

    def _identity(self, section: dict) -> dict:
        name, source = section["name"], section["source"]
        path = str(raw_data.pin_path(name, source))
        if path not in self.identities:
            self.identities[path] = raw_data.planned_identity(name, source, self.hashes)
        return self.identities[path]

    def _model_files(self, config: dict) -> dict:
        """Content hashes of a local model's files, so that a changed file is a changed model."""
        source = config["model"]["source"]
        if source["kind"] != "files":
            return {}
        asked = canonical_json(source)
        if asked not in self.model_files:
            self.model_files[asked] = self._hashed(source)
        return self.model_files[asked]

    def _hashed(self, source: dict) -> dict:
        folder = Path(source["path"]) if isinstance(source["path"], str) else None
        if folder is None or not (folder / "config.json").is_file():
            raise UserError(f"model.source.path: {source['path']}: not a model folder (no config.json in it)")
        names = model_files([path.name for path in folder.iterdir()], f"model.source.path: {folder}")
        return {"files": {name: self.hashes.sha256(folder / name) for name in names}}

    def _own_code(self, settings: dict) -> dict[str, str]:
        """What stands for your own metrics: an edit to a function evaluates again, and trains nothing."""
        asked = canonical_json(settings["metrics"])
        if asked not in self.own_code:
            self.own_code[asked] = own_metrics.code(settings)
        return self.own_code[asked]

    def _harness(self, config: dict, base: Job, start: Job, adapter: Job, splits: Job) -> dict[str, str]:
        """What lm-eval measures of the untouched and of the tuned model, which is made only for the chosen run."""
        settings = config["eval"]["harness"]
        if not settings:
            return {}
        asked = canonical_json(settings)
        if asked not in self.harness:
            self.harness[asked] = {"lm_eval": harness_checks.version(), "own_code": harness_checks.files(settings)}
            harness_checks.check_tasks(settings, STATE)
        extra, name = self.harness[asked], f"base-{config['model']['name']}"
        untouched = self._job("run_harness", name, _unmerged(config), {"model": base.path}, extra)
        inputs = {"model": start.path, "adapter": adapter.path, "splits": splits.path, "base_harness": untouched.path}
        tuned = self._job("run_harness", _slug(config), config, inputs, extra)
        return {"base_harness": untouched.path, "run_harness": tuned.path}

    def _adapters(self, config: dict, inputs: dict[str, str]) -> list[Job]:
        """The training jobs of a run: one, or one per epoch or rung if runs can share them (`planning.trunks`).

        A segment of a trunk has the key of the training that ends there, so that runs find each other's segments by
        path, in any order and from any sweep. The segment before it is its input but not in its key: it saves work and
        changes no bit. All segments keep their checkpoints in one folder, named by the key without the end.
        """
        field, ends = self._ends(config["train"])
        if not ends:
            return [self._alone(config, inputs)]

        without_end = {name: value for name, value in config["train"].items() if name != field}
        trunk = self._key("train_adapter", {**config, "train": without_end}, inputs)[0]

        # With a decay, a segment stops where the decay of the training that ends there would begin. It must not decay
        # itself: the next segment continues at the constant rate. Its key says so, as the whole training differs.
        decays = config["train"]["lr_scheduler_type"] == DECAYING_AT_THE_END
        part, suffix = ({"part": PLATEAU}, "-plateau") if decays else ({}, "")

        segments: list[Job] = []
        for end in ends:
            train = {**config["train"], field: end}
            before = {"previous": segments[-1].path} if segments else {}
            job = self._training({**config, "train": train}, {**inputs, **before}, suffix, part)
            job.settings |= {"trunk": trunk, **part}
            segments.append(job)

        if decays:  # the run itself: the decay, from its last plateau
            segments.append(self._alone(config, {**inputs, "previous": segments[-1].path}))
            for job in segments[1:]:
                job.settings["plateau"] = job.inputs["previous"]
        return segments

    def _ends(self, train: dict) -> tuple[str, list[int | float]]:
        """(the field that says how long a training is, where its segments end); none where it is a job by itself."""
        field, rungs = (self.rungs.key or EPOCHS).partition(".")[2], [float(rung) for rung in self.rungs.values]
        if train.get(field) in rungs:
            return field, [int(end) if end == int(end) else end for end in rungs if end <= train[field]]
        field = EPOCHS.partition(".")[2]  # also what comes before the training that is searched for (method.sft)
        return field, list(range(1, int(train.get(field, 3)) + 1)) if shares_trunk(train) else []

    def _alone(self, config: dict, inputs: dict[str, str]) -> Job:
        """A training that shares its checkpoints with no other."""
        job = self._training(config, inputs)
        job.settings["trunk"] = job.key
        return job

    def _training(self, config: dict, inputs: dict[str, str], suffix: str = "", part: dict | None = None) -> Job:
        slug = _slug(config) + suffix
        job = self._job("train_adapter", slug, config, inputs, unkeyed={"previous"}, upstream=part)
        # Runs that share a training may be evaluated differently, and its limits must suit all of them.
        evaluations = job.settings.setdefault("evaluations", [])
        judged = {**config["eval"], "probed": config["probe"]["source"] is not None}
        evaluations += [judged] if judged not in evaluations else []
        asked = config["eval"]["max_new_tokens"]
        job.settings["max_new_tokens"] = max(asked, job.settings.get("max_new_tokens", 0))
        return job

    def _key(self, stage: str, config: dict, inputs: dict, extra=None, unkeyed=frozenset(), upstream=None):
        """(key, hashed config, settings) of an artefact. `extra` adds to its config, `upstream` to its inputs' keys."""
        keyed, settings = _without_unkeyed(stage, stage_config(stage, config))
        keyed.update(extra or {})
        if stage == "train_adapter" and "eval" in keyed:
            keyed["judging_code"] = code_key(JUDGING)
        if keyed.get("eval", {}).get("metrics"):
            keyed["own_code"] = self._own_code(keyed["eval"])
        keys = {name: self.jobs[path].key for name, path in inputs.items() if name not in unkeyed | {"raw"}}
        return stage_key(stage, keyed, keys | (upstream or {})), keyed, settings

    def _job(self, stage, slug, config, inputs, extra=None, unkeyed=frozenset(), upstream=None) -> Job:
        key, keyed, settings = self._key(stage, config, inputs, extra, unkeyed, upstream)
        path = str(RESULTS / FOLDERS[stage] / f"{slug}-{key}")
        return self.jobs.setdefault(path, Job(stage, path, key, keyed, inputs, settings))


def _without_unkeyed(stage: str, view: dict) -> tuple[dict, dict]:
    """Split a stage's config into the part that its key hashes and the part in no key."""
    keyed, settings = {}, {}
    for section, value in view.items():
        hidden = keys_hidden(stage, section)
        if hidden and isinstance(value, dict):
            keyed[section] = {name: item for name, item in value.items() if name not in hidden}
            rest = {name: item for name, item in value.items() if name in hidden}
            if rest:
                settings[section] = rest
        else:
            keyed[section] = value
    return keyed, settings


def _unmerged(config: dict) -> dict:
    """The config for an untouched model, whose figures do not depend on how others are merged."""
    return {**config, "merge": Merge().model_dump(), "quantization": Quantization().model_dump()}


def _data_slug(config: dict) -> str:
    """Name of what is made of the splits with the model that preference optimization starts from."""
    return f"{config['data']['name']}-{config['model']['name']}{'-sft' if config['method'].get('sft') else ''}"


def _first(config: dict) -> str:
    """What a training comes after, as a part of its name."""
    method = config["method"]
    if method.get("first"):
        return f"{method['first']['data']['name']}-"
    return "sft-" if method.get("sft") else ""


def _slug(config: dict) -> str:
    """A readable name. It depends only on the config, so that sweeps share artefacts."""
    train, adapter = config["train"], config["adapter"]
    kind = next((kind for kind in ("dora", "rslora") if adapter.get(f"use_{kind}")), adapter.get("peft_type") or "full")
    rank = f"-r{adapter['r']}" if "r" in adapter else ""
    bits = next((f"-{bits}bit" for bits in (4, 8) if config["quantization"][f"load_in_{bits}bit"]), "")
    rate = f"{train.get('learning_rate', 5e-5):g}"
    epochs = f"e{train.get('num_train_epochs', 3):g}"
    length = f"{train['max_steps']}steps" if train.get("max_steps", -1) > 0 else epochs
    parts = [
        config["data"]["name"],
        config["model"]["name"],
        _first(config) + config["method"]["name"],
        kind.lower() + rank + bits,
        f"lr{rate}",
        length,
    ]
    return "-".join(parts)


def bytes_to_read(plan: Plan, job: Job) -> int:
    """The size of the rows that a job of format_prompts or mix_prompts reads, as far as they are there."""
    raw = Path(job.inputs.get("raw", ""))
    if job.stage == "mix_prompts":
        files = [file for folder in job.inputs.values() for file in Path(folder).glob("*.jsonl")]
    elif raw.is_file():
        files = raw_data.data_files(raw)
    else:
        parts = raw_data.by_split(plan.jobs[str(raw)].config["data"]["source"]).items()
        local = [(part, raw_data.section_of(split)) for split, part in parts if part["kind"] == "files"]
        files = [file for part, section in local for file in raw_data.source_files(part, section).values()]
    return sum(file.stat().st_size for file in files)
