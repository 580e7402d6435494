"""Config: every file in conf/ composes, every bad value is one clear line."""

import itertools
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.config import compose, stages
from temper.errors import UserError
from tests.conftest import ROOT


def composed(*overrides):
    """(axes, configs)"""
    axes, points = compose.expand(compose.parse_overrides(list(overrides)))
    return axes, [config for _, config in points]


def test_every_file_in_conf_composes_and_validates(workspace):
    checked = []
    for group, choices in compose.groups().items():
        for choice in choices:
            alone = [] if group in ("experiment", "sweep") else ["sweep=none"]
            alone += ["data.rejected_from=[positive,negative]"] if group == "method" and choice != "sft" else []
            if choice in ("editorials", "documents") and group in ("data", "eval"):  # raw text, both together
                alone += ["data=editorials", "eval=documents", "prompt.system=null"]
            _, configs = composed(*alone, f"{group}={choice}")
            assert configs, f"{group}={choice} gives no run"
            checked.append(f"{group}/{choice}")
    files = [path for path in (ROOT / "conf").rglob("*.yaml") if path.parent.name != "conf"]
    assert len(checked) == len(files) > 0, checked


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=3", "config: unknown key 'train.lr'; did you mean 'learning_rate'?"),
        ("train.learnig_rate=3", "config: unknown key 'train.learnig_rate'; did you mean 'learning_rate'?"),
        ("train.learning_rate=fast", "config: 'train.learning_rate': input should be a valid number"),
        ("train.learning_rate=-1", "config: 'train.learning_rate' must be above 0 (found -1)"),
        ("train.warmup_ratio=1.5", "must be from 0 to below 1"),
        ("train.output_dir=x", "config: 'train.output_dir' cannot be set: the workflow names all folders"),
        ("train.lr_scheduler_type=cosin", "cosin is not a valid SchedulerType"),
        ("adapter.r=x", "config: 'adapter.r': input should be a valid integer"),
        ("adapter.rank=8", "config: unknown key 'adapter.rank'"),
        ("adapter.peft_type=LORRA", "config: 'adapter.peft_type': 'LORRA'; did you mean 'LORA'?"),
        ("adapter=lorra", "'adapter=lorra': conf/adapter/lorra.yaml does not exist; did you mean 'lora'?"),
        ("data.sorce=x", "config: unknown key 'data.sorce'; did you mean 'source'?"),
        ("data.source.sha=x", "config: unknown key 'data.source.sha'; did you mean 'sha256'?"),
        ("data.limit.train=none", "config: 'data.limit.train': input should be a valid integer"),
        ("data.splits.test=0.95", "leave no rows for training"),
        ("prompt.template=x", "'template' is for apply_chat_template: false"),
        (
            "eval.task=label",
            "config: 'eval.task': input should be 'labels', 'tags', 'text' or 'documents' (found",
        ),
        ("seed=-1", "config: 'seed': input should be greater than or equal to 0 (found -1)"),
        ("nonsense=1", "config: unknown key 'nonsense'"),
        ("train.learning_rate", "write key=value"),
        ("~train.lr", "override '~train.lr': there is no such key"),
        ("train.learning_rate='1e-3'", "config: 'train.learning_rate': input should be a valid number"),
        ("train.learning_rate=nan", "config: 'train.learning_rate' is nan: a finite number is needed"),
        ("train.learning_rate=true", "config: 'train.learning_rate': input should be a valid number"),
        ("train.num_train_epochs=1e18", "config: 'train.num_train_epochs' must be from 0 to 10000"),
        ("train.hub_token=x", "a config is stored and shown, so it must not hold a token"),
        ("adapter.peft_type=lora", "config: 'adapter.peft_type': 'lora'; did you mean 'LORA'?"),
        ("adapter.lora_dropout=-1", "config: 'adapter.lora_dropout' must be from 0 to below 1"),
        ("seed=range(1,1)", "sweep 'seed=range(1,1)': the axis has no values"),
        ("tracking=mlflow,none", "tracking cannot be an axis"),
        ("train@foo=default", "packages (@...) are not supported"),
        ("data.source=[]", "override 'data.source=[]': does not fit what is there"),
        ("sweep.axes=[1]", "does not fit what is there"),
        ("sweep.name=..", "config: 'sweep.name': string should match pattern"),
        ("data.csv.delimiter=ab", "config: 'data.csv.delimiter': string should have at most 1 character"),
        ("data.splits.test=0", "config: 'data.splits.test': input should be greater than 0"),
        ("method=dpo", "config: method=dpo needs preference pairs: choose data.layout=preference, or say what"),
        ("method.beta=1", "config: unknown key 'method.beta'"),
        ("method.name=cpo", "does not match any of the expected tags: 'sft', 'dpo', 'orpo', 'simpo', 'kto'"),
        ("method=orpo", "config: method=orpo needs preference pairs: choose data.layout=preference, or say what"),
        (
            "method=kto",
            "config: method=kto needs to know which answers are desirable: choose data.layout=unpaired_pref",
        ),
        ("data.label=rating", "config: method=sft would learn the undesirable answers as well: give it the desirable"),
        ("data.score_pairs=all", "'score_pairs' is for layout 'scored_responses', not for 'template'"),
        ("eval.metric=preference_accuracy_per_token", "preference_accuracy_per_token needs preference pairs"),
        ("eval.metric=preference_accuracy", "config: 'eval.metric': preference_accuracy needs preference pairs"),
        ("data.layout=preference", "'prompt', 'completion', 'rejected' and 'label' are for layout 'template'"),
        ("prompt.system=über", "put a value with blanks or other special characters in quotes"),
    ],
)
def test_a_fault_is_one_line_that_names_it(workspace, override, message):
    with pytest.raises(UserError) as error:
        composed("sweep=none", override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.beta=0", "config: 'method.beta': input should be greater than 0 (found 0)"),
        ("method.bta=1", "config: unknown key 'method.bta'; did you mean 'beta'?"),
        ("method.loss_type=dpo", "config: 'method.loss_type': input should be 'sigmoid', 'hinge', 'ipo' or 'robust'"),
        ("method.label_smoothing=0.1", "label_smoothing 0.1 is for loss_type 'robust'; 'sigmoid' ignores it"),
        ("method.label_smoothing=0.5", "config: 'method.label_smoothing': input should be less than 0.5 (found 0.5)"),
        ("method.sft={tran:{}}", "config: unknown key 'method.sft.tran'; did you mean 'train'?"),
        ("method.sft={train:{lr:1}}", "config: 'method.sft': unknown key 'train.lr'; did you mean 'learning_rate'?"),
        ("train.label_smoothing_factor=0.1", "config: 'train.label_smoothing_factor' is for method=sft"),
        ("data.rejected=x", "'rejected_from' and 'rejected' both say what the rejected answer is"),
        ("data.label=x", "'label' says whether single answers are desirable, 'rejected_from' makes pairs"),
        ("prompt.loss_on=all", "config: 'prompt.loss_on': all is for method=sft and orpo; method=dpo compares answers"),
        ("train.metric_for_best_model=kl", "validation of task 'labels' has no 'kl'"),
        ("data.rejected_from=[a]", "config: 'data.rejected_from': list should have at least 2 items"),
    ],
)
def test_a_fault_of_preference_optimization_is_one_line(workspace, override, message):
    with pytest.raises(UserError) as error:
        composed("experiment=dpo", override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


LABELLED = ["data.rejected_from=null", "data.label=rating"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=orpo", "method.lambda=1"], "config: unknown key 'method.lambda'; allowed: beta, name"),
        (["experiment=simpo", "method.gamma=1"], "config: unknown key 'method.gamma'; did you mean 'simpo_gamma'?"),
        (["experiment=kto", "method.desirable_weight=0"], "config: 'method.desirable_weight': input should be greater"),
        (["experiment=dpo", *LABELLED], "method.own_answers; single answers with a label are for method=kto"),
        (["experiment=kto", *LABELLED, "method.sft={}"], "config: 'method.sft' would learn the undesirable answers"),
        (["experiment=orpo", "train.label_smoothing_factor=0.1"], "is for method=sft: leave it out"),
    ],
)
def test_methods_and_rows_that_do_not_fit_are_one_line(workspace, overrides, message):
    with pytest.raises(UserError) as error:
        composed(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_orpo_may_learn_the_prompts_and_kto_takes_labels(workspace):
    composed("experiment=orpo", "prompt.loss_on=all")
    composed("experiment=kto", *LABELLED)


def test_a_stage_by_itself_names_the_same_faults(workspace):
    view = stages.load_stage_config("train_adapter", None, ["experiment=dpo"])
    with pytest.raises(UserError, match="unknown key 'method.bta'; did you mean 'beta'"):
        stages.validated_stage("train_adapter", {**view, "method": {"name": "dpo", "bta": 1}})


def test_a_swept_value_replaces_the_axis_and_a_fixed_one_collapses_it(workspace):
    axes, configs = composed("sweep=demo", "train.learning_rate=1e-4,2e-4,3e-4", "adapter.r=8")
    assert axes == {"train.num_train_epochs": ["1", "2"], "train.learning_rate": ["0.0001", "0.0002", "0.0003"]}
    assert [config["train"]["learning_rate"] for config in configs[::2]] == [1e-4, 2e-4, 3e-4]
    assert {config["adapter"]["r"] for config in configs} == {8}


def test_hydras_sweep_grammar_and_group_axes(workspace):
    axes, configs = composed("sweep=none", "adapter=lora,lora_all_linear", "train.num_train_epochs=range(1,4)")
    assert len(configs) == 6
    assert [config["adapter"]["target_modules"] for config in configs][3:] == ["all-linear"] * 3
    assert [config["train"]["num_train_epochs"] for config in configs] == [1, 2, 3] * 2


def test_a_files_source_over_a_hub_source_leaves_nothing_behind(workspace):
    _, configs = composed("experiment=english_quotes", "data.source.kind=files", "data.source.path=mine.jsonl")
    assert configs[0]["data"]["source"] == {"kind": "files", "path": "mine.jsonl"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1 b=2", ["a=1", "b=2"]),
        ("a='x y'  b=[1, 2] c={k: v}", ["a='x y'", "b=[1, 2]", "c={k: v}"]),
        ("", []),
        ("a=choice(1, 2)", ["a=choice(1, 2)"]),
    ],
)
def test_overrides_are_split_outside_quotes_and_brackets(text, parts):
    assert compose.split_overrides(text) == parts


@given(st.lists(st.from_regex(r"[a-z]{1,5}=[0-9]{1,4}", fullmatch=True)))
def test_splitting_takes_joined_overrides_apart_again(parts):
    assert compose.split_overrides("  ".join(parts)) == parts


def test_values_in_a_sweep_file_are_what_they_are_in_yaml(workspace, monkeypatch):
    from omegaconf import OmegaConf

    axes = {"prompt.system": [None, "be, rude", "it's"], "data.limit": [{"train": 10}]}
    base = compose.composed(compose.parse_overrides(["sweep=none"]))
    OmegaConf.update(base, "sweep.axes", axes)
    monkeypatch.setattr(compose, "composed", lambda overrides: base.copy())
    _, points = compose.expand(compose.parse_overrides([]))
    assert [config["prompt"]["system"] for _, config in points] == [None, "be, rude", "it's"]
    assert {config["data"]["limit"]["train"] for _, config in points} == {10}


def test_unbalanced_overrides_are_refused():
    with pytest.raises(UserError, match="unbalanced bracket"):
        compose.split_overrides("a=[1,2")


def test_each_stage_accepts_its_own_config_and_refuses_a_typo(workspace):
    for stage in stages.STAGES:
        # The first two take the runs of a sweep, the last one several data sets.
        if stage not in ("rank_runs", "compare_runs", "mix_prompts"):
            view = stages.load_stage_config(stage, None, ["experiment=smoke"])
            unset = {"eval": None} if stage == "train_adapter" else {}  # given where answers choose the checkpoint
            assert stages.validated_stage(stage, view) == unset | view
    with pytest.raises(UserError, match="unknown key 'tokenize.max_lenth'; did you mean 'max_length'"):
        stages.validated_stage("tokenize_splits", {"prompt": {}, "tokenize": {"max_lenth": 3}})


def test_a_bad_config_ends_snakemake_with_one_line_and_code_2(workspace):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", workspace, "--cores", "1"]
    done = subprocess.run([*command, "--config", "overrides=train.lr=3"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: config: unknown key 'train.lr'; did you mean 'learning_rate'?"
    assert "Traceback" not in done.stderr
    assert not (workspace / "data").exists()


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(workspace):
    with pytest.raises(UserError, match="unknown key 'data.layuot'; did you mean 'layout'"):
        composed("sweep=none", "~data.layout", "data.layuot=messages")


def test_a_package_line_that_is_not_the_first_is_named(workspace, monkeypatch, tmp_path_factory):
    copy = tmp_path_factory.mktemp("conf") / "conf"
    shutil.copytree(ROOT / "conf", copy)
    experiment = copy / "experiment" / "mine.yaml"
    experiment.write_text("# conf/experiment/mine.yaml\n" + (copy / "experiment" / "smoke.yaml").read_text())
    monkeypatch.setattr(compose, "CONF", copy)
    with pytest.raises(UserError, match="mine.yaml: the line '# @package _global_' must be the first of the file"):
        composed("experiment=mine")


@pytest.fixture
def own_conf(workspace, monkeypatch):
    """A copy of conf/ that a test may write into."""
    copy = workspace / "conf"
    shutil.copytree(ROOT / "conf", copy)
    monkeypatch.setattr(compose, "CONF", copy)
    caches = [compose._compose, compose._config_loader]
    for cache in caches:
        cache.cache_clear()
    yield copy
    for cache in caches:
        cache.cache_clear()


REVIEWS = (ROOT / "conf/data/movie_reviews.yaml").read_text()
BOMB = (
    REVIEWS
    + "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", r"conf/data/mine\.yaml:1: is not valid YAML: expected the node content"),
        ("name: a\nname: b\n", r"conf/data/mine\.yaml:2: is not valid YAML: found duplicate key name"),
        (REVIEWS.encode() + b"where: \xff\n", r"conf/data/mine\.yaml:25: is not UTF-8"),
        (REVIEWS + "where: " + "[" * 3000 + "]" * 3000, r"conf/data/mine\.yaml:25: is nested more than 50 levels"),
        (BOMB, r"conf/data/mine\.yaml:\d+: holds more than 100,000 values"),
        (None, r"conf/data/mine\.yaml: cannot be read \(Is a directory\)"),
        (REVIEWS.replace('prompt: "', 'prompt: "${{ price }} '), r"conf/data/mine\.yaml: .*write \\\$\{"),
        ("defaults:\n  - mine\n" + REVIEWS, r"defaults lists of sweep=none, data=mine name each other in a circle"),
        (REVIEWS.replace("name: movie_reviews", "name: yes"), r"'data\.name'.*found true; YAML reads yes.* in quotes"),
    ],
)
def test_a_file_of_conf_that_cannot_be_read_is_named(own_conf, content, message):
    file = own_conf / "data" / "mine.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        composed("sweep=none", "data=mine")


def test_what_the_messages_propose_works(own_conf):
    (own_conf / "data" / "mine.yaml").write_text(
        REVIEWS.replace("name: movie_reviews", 'name: "yes"') + "where: \"text != '\\\\${{ price }}'\"\n"
    )
    _, [config] = composed("sweep=none", "data=mine", r"prompt.system='Is \${{ price }} much?'")
    assert config["data"]["name"] == "yes"
    assert config["data"]["where"] == "text != '${{ price }}'"
    assert config["prompt"]["system"] == "Is ${{ price }} much?"
    _, [config] = composed("sweep=none", "prompt.system='8'", "train.eval_strategy='no'", r"data.csv.delimiter='\t'")
    assert config["prompt"]["system"] == "8"
    assert config["train"]["eval_strategy"] == "no"
    assert config["data"]["csv"]["delimiter"] == "\t"


def test_an_experiment_sets_what_is_in_no_group_and_the_command_line_overrides_it(own_conf):
    given = {"seed": 7, "num_processes": 2, "num_threads": 3, "keep": {"checkpoints": "none"}}
    lines = "".join(f"{name}: {value}\n" for name, value in given.items()).replace("'", "")
    (own_conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}")
    _, [config] = composed("sweep=none", "experiment=mine")
    assert {name: config[name] for name in given} == given
    _, [config] = composed("sweep=none", "experiment=mine", "seed=8")
    assert config["seed"] == 8


def test_a_glob_takes_the_choices_of_a_group(workspace):
    axes, configs = composed("sweep=none", "adapter=glob(*lora,exclude=q*)")
    assert axes == {"adapter": ["lora", "rslora"]}
    assert [config["adapter"].get("use_rslora") for config in configs] == [None, True]


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8")), max_size=4))
def test_quoted_values_are_split_as_hydra_reads_them(values):
    from hydra.core.override_parser.types import Quote, QuotedString

    parts = [f"key={QuotedString(value, Quote.single).with_quotes()}" for value in values]
    assert compose.split_overrides(" ".join(parts)) == parts
    assert [compose._parsed(part).value() for part in parts] == values


def test_seeds_of_a_sweep_are_an_axis(workspace):
    axes, configs = composed("experiment=smoke", "sweep.seeds=3", "seed=7")
    assert axes["seed"] == ["7", "8", "9"]
    assert [config["seed"] for config in configs[:3]] == [7, 8, 9], "the last axis, so that repeats stand together"
    assert "seed" not in composed("experiment=smoke", "sweep.seeds=1")[0]
    with pytest.raises(UserError, match="two ways to say one thing"):
        composed("experiment=smoke", "sweep.seeds=3", "seed=1,2")


@pytest.mark.parametrize(
    ("experiment", "axes"),
    [
        ("demo", {"train.learning_rate": ["1e-4", "2e-4"], "seed": ["1", "2"], "adapter.r": ["4", "8"]}),
        ("dpo", {"eval.labels": ["[bad,good]", "[good,bad]"], "method.beta": ["0.1", "0.2"]}),  # others refer to labels
        ("smoke", {"data.splits": ["{test:0.1}", "{validation:0.2}"], "prompt.system": ["A", "${data.name}"]}),
        ("smoke", {"adapter": ["lora", "dora"], "train.optim": ["sgd", "adamw_torch"]}),
    ],
)
def test_each_point_of_a_sweep_is_what_it_is_alone(workspace, experiment, axes):
    swept = [f"experiment={experiment}", "sweep=none", *(f"{key}={','.join(texts)}" for key, texts in axes.items())]
    configs = composed(*swept)[1]
    assert len(configs) == 2 ** len(axes)
    for point, config in zip(itertools.product(*axes.values()), configs, strict=True):
        alone = [f"{key}={text}" for key, text in zip(axes, point, strict=True)]
        assert composed(f"experiment={experiment}", "sweep=none", *alone)[1] == [config]


def test_hydra_parses_each_value_of_an_axis_once(workspace, monkeypatch):
    parsed = []
    monkeypatch.setattr(compose, "_parsed", lambda text, parse=compose._parsed: parsed.append(text) or parse(text))
    _, configs = composed("sweep=none", "train.learning_rate=range(1,11)", "adapter.r=range(1,11)")
    assert len(configs) == 100
    assert len(parsed) == 3 + 2  # the overrides, then one number of each axis


@pytest.mark.parametrize(
    "text",
    ["0", "12", "-3", "1e-4", "1E+4", "0.00010", "-1.5e3", "00.5", "1.", ".5", "007", "1_000", "+1", "1e", "nan"],
)
def test_a_plain_number_is_what_hydra_reads(text):
    [read] = compose.parse_overrides([f"train.learning_rate={text}"]).values
    number = compose.plain_number(text)
    assert number is None or (type(number), number) == (type(read.value()), read.value())
    assert (number is None) == (text in ["00.5", "1.", ".5", "007", "1_000", "+1", "1e", "nan"])
