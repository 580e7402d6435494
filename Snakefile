"""Temper: raw data -> prompts -> splits -> adapter -> merged model -> report -> comparison.

    snakemake --cores all --config experiment=demo
    snakemake --cores 2 --config experiment=smoke overrides="train.learning_rate=1e-4,3e-4 adapter.r=8"

    fetch_data          ->  data/raw/<data>/pin-<key>.json
    fetch_model         ->  results/models/
    format_prompts      raw                                     ->  results/prompts/
    mix_prompts         prompts of each data set                ->  results/mixtures/     (data.mix)
    tokenize_splits     prompts, model                          ->  results/splits/
    sample_answers      splits, model                           ->  results/pairs/        (method.own_answers)
    reference_logprobs  splits, model                           ->  results/references/   (method=dpo, kto)
    train_adapter       splits, model, references               ->  results/adapters/
    evaluate_model      model, adapter, splits, base_report     ->  results/reports/      (evaluate_base: model, splits;
                                                                                           both: probe, if there is one)
    rank_runs           validation reports                      ->  results/rankings/     (which runs to test)
    score_rows          model, adapter, splits, prompts, raw    ->  results/suspects/     (of the chosen run)
    run_harness         model, adapter, splits, base_harness    ->  results/harness/      (of the chosen run; eval.harness)
    merge_adapter       model, adapter, splits                  ->  results/merged/       (of the chosen run; merge.runs)
    compare_runs        reports, suspicious rows, harness       ->  results/sweeps/

Every path below results/ ends in a key that hashes everything it was made from (see temper/planning/plan.py), so a
path that exists is up to date, and nothing is made twice. The rules hold no logic: the plan says what to make. A job
reads its config from the plan ($TEMPER_PLAN), so command lines do not grow with the sweep. Because names end in keys,
a name chosen by a user never selects the rule.

Outputs are marked `update`, so that Snakemake never deletes one: a step writes its folder by one rename, and keeps a
complete folder, also one made by a second command at the same time or by the orphan of a killed one.
"""

from snakemake.utils import min_version

from temper import workflow as temper

min_version("9.19")  # the first that finds profiles/default/profile.yaml

# A bad config ends here, in one line, before any job.
PLAN = temper.load_plan(config, workflow)
SWEEP = PLAN.comparison.path

# (stage, input's name) -> function that gives a job's path for that input, or nothing if the job has no such input.
path_of = temper.inputs(PLAN, workflow)
NEEDS = temper.Resources(PLAN, workflow)  # memory and time of each job

# A step's exit code is its job's, for all that its log goes through a pipe (a prefix replaces Snakemake's own, which says
# so). On a signal the shell waits for its step, and the log is written to its last line.
# `run` is `python -m`, in a process that has the libraries imported if there is one (see temper/forks/).
shell.prefix(
    "set -euo pipefail; trap : INT TERM HUP; log_to() {{ trap '' INT TERM HUP; exec tee \"$1\"; }}; "
    'run() {{ if [ -S "${{TEMPER_FORKS:-}}/$OMP_NUM_THREADS" ]; then exec python -SP -m temper.forks.client "$@"; '
    'else exec python -m "$@"; fi; }}; '
)


# Shown by `snakemake --report`. In a rule, `temper.page` marks outputs whose pages are in that report.
report: "report/workflow.rst"


wildcard_constraints:
    name="[^/]+",


# They run where Snakemake runs, whatever --retries says: more memory is no help, and a step tries again by itself what the
# network failed, but not what it refuses.
localrules:
    all,
    fetch_data,
    fetch_model,
    format_prompts,
    mix_prompts,
    rank_runs,
    compare_runs,


rule all:
    "The comparison of all runs of the sweep."
    input:
        PLAN.leaderboard,
        temper.complete(PLAN, workflow),


rule fetch_data:
    "Raw data, as pinned; the pin file says what was fetched."
    output:
        update("data/raw/{name}.json"),
    log:
        "results/logs/fetch_data/{name}.log",
    wildcard_constraints:
        name="[^/]+/pin-[^/]+",
    retries: 0
    shell:
        "python -m steps.fetch_data"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule fetch_model:
    "The base model, in Hugging Face layout."
    input:
        source=path_of("fetch_model", "source"),  # always empty; looking it up is what finds incomplete folders
    output:
        update(directory("results/models/{name}")),
    log:
        "results/logs/fetch_model/{name}.log",
    retries: 0
    shell:
        "run steps.fetch_model"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule format_prompts:
    "Raw rows to conversations, assigned to train, validation and test."
    input:
        raw=path_of("format_prompts", "raw"),
    output:
        temper.page(PLAN, "format_prompts", directory("results/prompts/{name}")),
    log:
        "results/logs/format_prompts/{name}.log",
    retries: 0
    threads: temper.reading_threads(PLAN, "format_prompts", workflow)
    shell:
        "RAYON_NUM_THREADS={threads} python -m steps.format_prompts"
        " --raw {input.raw:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule mix_prompts:
    "The splits of several data sets put together, each as often as its weight says."
    input:
        prompts=temper.numbered_inputs(PLAN, "mix_prompts", path_of),
    output:
        temper.page(PLAN, "mix_prompts", directory("results/mixtures/{name}")),
    log:
        "results/logs/mix_prompts/{name}.log",
    retries: 0
    threads: temper.reading_threads(PLAN, "mix_prompts", workflow)
    shell:
        "RAYON_NUM_THREADS={threads} python -m steps.mix_prompts"
        " --prompts {input.prompts:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule tokenize_splits:
    "Conversations to token ids and labels, with an audit of what is learned."
    input:
        prompts=path_of("tokenize_splits", "prompts"),
        model=path_of("tokenize_splits", "model"),
    output:
        temper.page(PLAN, "tokenize_splits", directory("results/splits/{name}")),
    log:
        "results/logs/tokenize_splits/{name}.log",
    threads: lambda _: temper.tokenizing_threads(PLAN, workflow)
    resources:
        **NEEDS.of("tokenize_splits"),
    shell:
        "RAYON_NUM_THREADS={threads} run steps.tokenize_splits"
        " --prompts {input.prompts:q}"
        " --model {input.model:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule sample_answers:
    "On-policy preference pairs: what the model itself answers wrongly is rejected."
    input:
        splits=path_of("sample_answers", "splits"),
        model=path_of("sample_answers", "model"),
    output:
        update(directory("results/pairs/{name}")),
    log:
        "results/logs/sample_answers/{name}.log",
    priority: 3  # all trainings of the sweep wait for it
    threads: temper.threads_of(PLAN, "sample_answers")
    resources:
        **NEEDS.of("sample_answers"),
        gpu=temper.gpus_of(PLAN, "sample_answers"),
    shell:
        "run steps.sample_answers"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule reference_logprobs:
    "How likely the model finds the answers that preference optimization compares, before it is trained."
    input:
        splits=path_of("reference_logprobs", "splits"),
        model=path_of("reference_logprobs", "model"),
    output:
        update(directory("results/references/{name}")),
    log:
        "results/logs/reference_logprobs/{name}.log",
    priority: 3  # all trainings of the sweep wait for it
    threads: temper.threads_of(PLAN, "reference_logprobs")
    resources:
        **NEEDS.of("reference_logprobs"),
        gpu=temper.gpus_of(PLAN, "reference_logprobs"),
    shell:
        "run steps.reference_logprobs"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule train_adapter:
    "One training, or one epoch of a trunk that several runs share."
    input:
        splits=path_of("train_adapter", "splits"),
        model=path_of("train_adapter", "model"),
        references=path_of("train_adapter", "references"),
        previous=path_of("train_adapter", "previous"),
    output:
        update(directory("results/adapters/{name}")),
    log:
        "results/logs/train_adapter/{name}.log",
    priority: temper.report_priority(PLAN, "train_adapter", workflow)
    threads: temper.threads_of(PLAN, "train_adapter")
    resources:
        **NEEDS.of("train_adapter"),
        gpu=temper.gpus_of(PLAN, "train_adapter"),
    params:
        references=temper.flags_of(PLAN, "train_adapter", "references"),
    shell:
        "run steps.train_adapter"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        " {params.references}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule merge_adapter:
    "Adapter and base model to one model that plain transformers loads."
    input:
        model=path_of("merge_adapter", "model"),
        adapter=path_of("merge_adapter", "adapter"),
        splits=path_of("merge_adapter", "splits"),
    output:
        update(directory("results/merged/{name}")),
    log:
        "results/logs/merge_adapter/{name}.log",
    priority: temper.report_priority(PLAN, "merge_adapter", workflow)
    resources:
        **NEEDS.of("merge_adapter"),
        gpu=temper.gpus_of(PLAN, "merge_adapter"),
    shell:
        "run steps.merge_adapter"
        " --model {input.model:q}"
        " --adapter {input.adapter:q}"
        " --splits {input.splits:q}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule evaluate_base:
    "The untouched model on one split: what every run is compared with."
    input:
        model=path_of("evaluate_model", "model"),
        splits=path_of("evaluate_model", "splits"),
        probe=path_of("evaluate_model", "probe"),
    output:
        temper.page(PLAN, "evaluate_model", directory("results/reports/{name}")),
    log:
        "results/logs/evaluate_model/{name}.log",
    wildcard_constraints:
        name=temper.one_of(PLAN.untouched),
    priority: 3  # cheap, and the first job to notice labels that do not fit the data
    threads: temper.threads_of(PLAN, "evaluate_model")
    resources:
        **NEEDS.of("evaluate_model"),
        gpu=temper.gpus_of(PLAN, "evaluate_model"),
    params:
        probe=temper.flags_of(PLAN, "evaluate_model", "probe"),
    shell:
        "run steps.evaluate_model"
        " --model {input.model:q}"
        " --splits {input.splits:q}"
        " {params.probe}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule evaluate_model:
    "A tuned model on one split, merged in memory, beside the untouched one."
    input:
        model=path_of("evaluate_model", "model"),
        splits=path_of("evaluate_model", "splits"),
        adapter=path_of("evaluate_model", "adapter"),
        base_report=path_of("evaluate_model", "base_report"),
        references=path_of("evaluate_model", "references"),
        start_report=path_of("evaluate_model", "start_report"),
        first_report=path_of("evaluate_model", "first_report"),
        probe=path_of("evaluate_model", "probe"),
    output:
        temper.page(PLAN, "evaluate_model", directory("results/reports/{name}")),
    log:
        "results/logs/evaluate_model/{name}.log",
    wildcard_constraints:
        name=temper.none_of(PLAN.untouched),
    priority: temper.report_priority(PLAN, "evaluate_model", workflow)
    threads: temper.threads_of(PLAN, "evaluate_model")
    resources:
        **NEEDS.of("evaluate_model"),
        gpu=temper.gpus_of(PLAN, "evaluate_model"),
    params:
        # Also an untouched model may come here, which a search asked for after this was read.
        optional=temper.flags_of(
            PLAN,
            "evaluate_model",
            "adapter",
            "base_report",
            "references",
            "start_report",
            "first_report",
            "probe",
        ),
    shell:
        "run steps.evaluate_model"
        " --model {input.model:q}"
        " --splits {input.splits:q}"
        " {params.optional}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


checkpoint rank_runs:
    "The runs by their validation reports: which are judged on the test split, and which runs a search adds."
    input:
        reports=temper.ranked_reports(PLAN, path_of),
    output:
        update(directory("results/rankings/{name}")),
    log:
        "results/logs/rank_runs/{name}.log",
    retries: 0
    shell:
        "run steps.rank_runs"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule score_rows:
    "Rows of training and validation whose answers are likely wrong, by the chosen run; off with eval.suspects=0."
    input:
        model=path_of("score_rows", "model"),
        adapter=path_of("score_rows", "adapter"),
        splits=path_of("score_rows", "splits"),
        prompts=path_of("score_rows", "prompts"),
        raw=path_of("score_rows", "raw"),
    output:
        update(directory("results/suspects/{name}")),
    log:
        "results/logs/score_rows/{name}.log",
    threads: temper.threads_of(PLAN, "score_rows")
    resources:
        **NEEDS.of("score_rows"),
        gpu=temper.gpus_of(PLAN, "score_rows"),
    params:
        raw=temper.flags_of(PLAN, "score_rows", "raw"),
    shell:
        "run steps.score_rows"
        " --model {input.model:q}"
        " --adapter {input.adapter:q}"
        " --splits {input.splits:q}"
        " --prompts {input.prompts:q}"
        " {params.raw}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule run_harness:
    "Tasks of lm-eval, for the untouched model and the chosen run (eval.harness)."
    input:
        model=path_of("run_harness", "model"),
        adapter=path_of("run_harness", "adapter"),
        splits=path_of("run_harness", "splits"),
        base_harness=path_of("run_harness", "base_harness"),
    output:
        update(directory("results/harness/{name}")),
    log:
        "results/logs/run_harness/{name}.log",
    threads: temper.threads_of(PLAN, "run_harness")
    resources:
        **NEEDS.of("run_harness"),
        gpu=temper.gpus_of(PLAN, "run_harness"),
    params:
        tuned=temper.flags_of(PLAN, "run_harness", "adapter", "splits", "base_harness"),
    shell:
        "run steps.run_harness"
        " --model {input.model:q}"
        " {params.tuned}"
        ' --plan "$TEMPER_PLAN"'
        " --output {output:q}"
        " 2>&1 | log_to {log:q}"


rule compare_runs:
    "Leaderboard and page of the sweep; completes MLflow and names the champion."
    input:
        reports=temper.compared(PLAN, workflow, checkpoints),
        base_harness=PLAN.base_harness,  # needed whichever run is chosen, so it may be made before
    output:
        temper.page(PLAN, "compare_runs", f"{SWEEP}/leaderboard.csv"),
        update(f"{SWEEP}/leaderboard.json"),
        temper.page(PLAN, "compare_runs", f"{SWEEP}/report.html"),
        update(PLAN.complete),
    log:
        PLAN.comparison.log,
    retries: 0
    params:
        folder=lambda _: SWEEP,
        key=lambda _: PLAN.comparison.key,  # its path holds no key, but an edit to its code must rerun it
    shell:
        "run steps.compare_runs"
        ' --plan "$TEMPER_PLAN"'
        " --output {params.folder:q}"
        " 2>&1 | log_to {log:q}"


onstart:
    temper.on_start(PLAN, workflow)


onsuccess:
    temper.on_success(PLAN)


onerror:
    temper.on_error(PLAN)
