"""Config that cannot be: keys, values, choices, sweeps, YAML files."""

import json

from tests.bad_inputs import Bad, World


def _plan(name: str, says: str, *overrides: str) -> Bad:
    return Bad(name, says, "plan", lambda world: ["--experiment", "smoke", *overrides])


def _of_file(name: str, says: str, file: str, *overrides: str) -> Bad:
    """A plan for a file of rows that is there."""

    def arguments(world: World) -> list[str]:
        world.write(file, "")
        return ["--experiment", "smoke", *overrides]

    return Bad(name, says, "plan", arguments)


def _file(name: str, says: str, content: str | bytes) -> Bad:
    """A stage's config file."""

    def arguments(world: World) -> list[str]:
        world.write("stage.yaml", content)
        return ["--output", "model", "--config", "stage.yaml"]

    return Bad(name, says, "fetch_model", arguments)


def _text(name: str, says: str, text: str) -> Bad:
    """A stage's config as JSON text."""
    return Bad(name, says, "fetch_model", lambda world: ["--output", "model", "--config", text])


def _by_hand(name: str, says: str, *arguments: str) -> Bad:
    return Bad(name, says, "fetch_model", lambda world: ["--output", "model", *arguments])


NINE_TIMES_NINE = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
OF_A_PACKAGE = {"kind": "package", "requirement": "x==1", "sha256": "0" * 64}

_FILE = ("data.source.kind=files", "data.source.path=x.jsonl", "~data.format")
_OF_CSV = ("data.source.kind=files", "data.source.path=x.csv")
_HUB = ("data.source.kind=hub", "data.source.repository=acme/it")
_HUB_MODEL = ("model.source.kind=hub", "model.source.repository=acme/it")
_OWN = "method.own_answers={do_sample: false, top_p: 0.5}"

_DOCUMENTS = ("data=editorials", "prompt.system=null", "~data.limit")

CASES = [
    # raw text
    _plan("answers of documents", r"'eval\.task': labels judges answers, .* set eval=documents", *_DOCUMENTS),
    _plan("documents of answers", r"'eval\.task': documents is for raw text", "eval=documents"),
    _plan(
        "documents with a system message",
        r"'prompt\.system' is for messages, .* set it to null",
        "data=editorials",
        "eval=documents",
    ),
    _plan(
        "documents and a part of their prompts",
        r"'prompt\.loss_on' is for messages, .* set it to assistant",
        *_DOCUMENTS,
        "eval=documents",
        "prompt.loss_on=all",
    ),
    _plan("preferences of documents", r"method=kto", *_DOCUMENTS, "eval=documents", "method=kto"),
    _plan(
        "a metric of answers for documents",
        r"'eval\.metrics?'.*|'metrics' is for answers",
        *_DOCUMENTS,
        "eval=documents",
        "eval.metrics=[{name: short, regex: a}]",
    ),
    _plan(
        "the best checkpoint by answers of documents",
        r"'train\.metric_for_best_model': validation of task 'documents' has no 'bits_per_byte'",
        *_DOCUMENTS,
        "eval=documents",
        "train.metric_for_best_model=bits_per_byte",
        "train.load_best_model_at_end=true",
    ),
    _plan("first on answers", r"'method\.first'.*layout text", "method.first={data: movie_reviews}"),
    _plan("first on nothing", r"method\.first\.data: nosuch", "method.first={data: nosuch}"),
    _plan(
        "first with an unknown option",
        r"'method\.first'.*lerning_rate",
        "method.first={data: editorials, train: {lerning_rate: 1}}",
    ),
    _plan(
        "first with an unknown option of tokenizing",
        r"'method\.first\.tokenize\.max_len'",
        "method.first={data: editorials, tokenize: {max_len: 9}}",
    ),
    _of_file(
        "options of documents that come first",
        r"x\.jsonl: data\.field=a is for json files",
        "x.jsonl",
        "method.first={data: {name: x, source: {kind: files, path: x.jsonl}, layout: text, field: a}}",
    ),
    _plan(
        "a probe that is learned first",
        r"'probe\.name': editorials is the name of the data",
        "probe=editorials",
        "method.first={data: editorials}",
    ),
    # keys and values
    _plan("unknown key", r"train\.lerning_rate.*did you mean 'learning_rate'", "train.lerning_rate=1e-3"),
    _plan("unknown section", r"unknown key 'hydra'", "hydra.run.dir=x"),
    _plan("a key below a value", r"'seed'.*valid integer \(found \{\"x\": 1\}\)", "seed.x=1"),
    _plan("no key", r"has no key", "=3"),
    _plan("no value", r"'adapter\.r'.*valid integer", "adapter.r="),
    _plan("a text for a number", r"'train\.learning_rate'", "train.learning_rate=fast"),
    _plan("a truth value for a text", r"'data\.name'.*in quotes", "data.name=true"),
    _plan("a number for a text", r"'prompt\.system'.*in quotes to make it a text", "prompt.system=8"),
    _plan("a truth value for a choice", r"must be one of no, steps, epoch.*in quotes", "train.eval_strategy=false"),
    _plan("no finite number", r"finite", "train.learning_rate=nan"),
    _plan("a negative seed", r"'seed'", "seed=-1"),
    _plan("a seed beyond 32 bits", r"'seed'", "seed=4294967296"),
    _plan("a delimiter of two characters", r"'data\.csv\.delimiter'", "data.csv.delimiter=';;'"),
    _plan("splits that leave nothing", r"leave no rows for training", "data.splits={validation:0.5,test:0.5}"),
    # options that the chosen kind never reads
    _of_file(
        "csv options of json lines",
        r"config: .*x\.jsonl: data\.csv\.delimiter=.* and this is jsonl: .*~data\.csv",
        "x.jsonl",
        *_FILE,
    ),
    _of_file(
        "data.field of csv", r"config: .*x\.csv: data\.field=rows is for json", "x.csv", *_OF_CSV, "data.field=rows"
    ),
    _plan("csv rows of the hub", r"'data\.format': csv .*kept as jsonl", *_HUB),
    _plan("csv options of the hub", r"acme/it\.jsonl: data\.csv\.delimiter=.* this is jsonl", *_HUB, "~data.format"),
    _plan("an encoding of the hub", r"'data\.encoding': cp1252 .*UTF-8", *_HUB, "~data.format", "data.encoding=cp1252"),
    _plan("an unknown encoding", r"'data\.encoding': .*did you mean 'cp1252'", "data.encoding=cp125"),
    _plan("a share of bad rows", r"'max_bad_share' is for bad rows that are left out", "data.max_bad_share=0.1"),
    _plan("fields of messages in a template", r"layout 'template' reads none", "data.ignore_fields=[weight]"),
    _plan("a model's split", r"'model': 'source\.split' is for data", *_HUB_MODEL, "model.source.split=test"),
    _plan("a model's configuration", r"'source\.config' is for data", *_HUB_MODEL, "model.source.config=en"),
    _plan("4 bits without them", r"'bnb_4bit_quant_type' is for load_in_4bit", "quantization.bnb_4bit_quant_type=fp4"),
    _plan(
        "a temperature of the likeliest", r"'eval': 'temperature' has no effect without do_sample", "eval.temperature=2"
    ),
    _plan("a nucleus of the likeliest", r"'method\.own_answers': 'top_p' has no effect", "method=dpo", _OWN),
    _plan(
        "prompts of preferences", r"'prompt\.loss_on': all is for method=sft", "experiment=dpo", "prompt.loss_on=all"
    ),
    _plan("labels of a text", r"'labels' is for task 'labels'.*~eval\.labels", "eval.task=text"),
    _plan("a separator of labels", r"'separator' is for task 'tags'.*~eval\.separator", "eval.separator=';'"),
    # the grammar of overrides
    _plan("unbalanced bracket", r"override 'adapter\.target_modules=\[a'", "adapter.target_modules=[a"),
    _plan("blanks without quotes", r"in quotes, and all in others for the shell: \"key='a b'\"", "a b=3"),
    _plan("a value that ends with a comma", r"override 'adapter\.r=1,'", "adapter.r=1,"),
    _plan("an interpolation of nothing", r"'prompt\.system'.*write \\\$\{", "prompt.system=${nope}"),
    _plan("a brace that is no interpolation", r"write \\\$\{", "prompt.system='Is ${{ price }} much?'"),
    _plan("a variable that is not set", r"'seed'.*NOT_SET_ANYWHERE", "seed=${oc.env:NOT_SET_ANYWHERE}"),
    _plan("3,000 brackets", r"more than 40 brackets within brackets", "seed=" + "[" * 3000 + "]" * 3000),
    _plan("a package", r"packages \(@\.\.\.\) are not supported", "data@foo=english_quotes"),
    _plan("to delete a key that is not there", r"there is no such key", "~train.nothing"),
    _plan("to delete a group", r"cannot be left out", "~train"),
    _plan("to delete and to sweep", r"~ takes a key out", "~train.learning_rate=1,2"),
    # choices
    _plan(
        "a source and one for each split",
        r"'data\.source' has both 'kind', .*, and 'train', .*: leave one out",
        "data.source.train={kind: files, path: x.jsonl}",
    ),
    _plan(
        "a share of a split that has a source",
        r"'splits\.test' is a share of train, and source\.test says what it is: leave one out",
        "~data.source",
        "data.source={train: {kind: files, path: x.jsonl}, test: {kind: files, path: y.jsonl}}",
    ),
    _plan(
        "no source for train",
        r"'data\.source\.train' is missing",
        "~data.source",
        "data.source={test: {kind: files, path: x.jsonl}}",
    ),
    _plan("unknown choice", r"conf/data/nothing\.yaml does not exist", "data=nothing"),
    _plan("a choice above conf", r"does not exist", "data=../../../etc/passwd"),
    _plan("a choice of 5,000 letters", r"does not exist", "data=" + "a" * 5000),
    _plan("unknown experiment", r"conf/experiment/none\.yaml does not exist", "experiment=none"),
    # sweeps
    _plan("an axis without values", r"choice\(\)", "adapter.r=choice()"),
    _plan("a glob without matches", r"has no values", "adapter=glob(nothing*)"),
    _plan("an interval", r"is an interval, .*sweep.strategy=random sweep.n=16", "train.learning_rate=interval(0,1)"),
    _plan("a shuffled axis", r"shuffle", "seed=shuffle(1,2,3)"),
    _plan("a billion values", r"more than 10,000 values", "seed=range(0,1000000000)"),
    _plan("a billion values, sorted", r"more than 10,000 values", "seed=sort(range(0,1000000000))"),
    _plan(
        "ten million points",
        r"make 20,000,000 runs; a plan takes 10,000",
        "seed=range(0,10000)",
        "adapter.r=range(1,1001)",
    ),
    _plan("a sweep of experiments", r"cannot be an axis", "experiment=smoke,demo"),
    _plan("a sweep of sweeps", r"cannot be an axis", "sweep=none,smoke"),
    _plan("a sweep of tracking", r"cannot be an axis", "tracking.enabled=true,false"),
    _plan("a sweep of the ranking metric", r"cannot be an axis", "eval.metric=accuracy,f1"),
    _plan("axes that are no mapping", r"'sweep\.axes' must map", "sweep.axes=3"),
    _plan("an axis that changes nothing", r"leave one out", "train.max_steps=10", "train.num_train_epochs=1,2"),
    # YAML files
    _file("no YAML", r"stage\.yaml:1: is not valid YAML", "a: ["),
    _file("a tab", r"stage\.yaml:2: is not valid YAML", "a:\n\tb: 1"),
    _file("a key twice", r"stage\.yaml:2: .*duplicate key", "model: 1\nmodel: 2\n"),
    _file("YAML in Latin-1", r"stage\.yaml:2: is not UTF-8", b"model:\n  name: M\xfcller\n"),
    _file("YAML in UTF-16", r"is not UTF-8", "model: {}\n".encode("utf-16")),
    _file("a NUL character", r"stage\.yaml: is not valid YAML", b"model: \x00\n"),
    _file("two documents", r"stage\.yaml:2: is not valid YAML", "a: 1\n---\nb: 1\n"),
    _file("a Python object", r"stage\.yaml:1: .*tag", "model: !!python/object/apply:os.system ['ls']\n"),
    _file("5,000 brackets in YAML", r"nested more than 50 levels", "model: " + "[" * 5000 + "]" * 5000),
    _file("a billion values by aliases", r"more than 100,000 values", NINE_TIMES_NINE),
    _file("a list for a config", r"holds no config", "- model\n"),
    _file("an empty file", r"'model' is missing|'model\.source' is missing", ""),
    _text("no JSON text", r"--config: not JSON", "{model"),
    _text("deep JSON text", r"--config: not JSON", '{"model":' + "[" * 100_000),
    _text("an unknown section in JSON", r"'model' is missing|unknown", json.dumps({"modle": {}})),
    _text("an unknown kind of source", r"kind", json.dumps({"model": {"source": {"kind": "ftp", "path": "x"}}})),
    _text("a source without member", r"member", json.dumps({"model": {"source": OF_A_PACKAGE}})),
    _by_hand("a config file that is not there", r"no such file", "--config", "x"),
    _by_hand("config and overrides", r"exclude each other", "--config={}", "seed=1"),
    _by_hand("a swept value by hand", r"one run, but seed is swept", "seed=1,2"),
]
