"""Temper: raw data -> prompts -> splits -> adapter -> merged model -> report -> comparison.

    snakemake --cores all --config experiment=demo
    snakemake --cores 2 --config experiment=smoke overrides="train.learning_rate=1e-4,3e-4 adapter.r=8"

Every path below results/ ends in a key that hashes whatever made it (see steps/lib/plan.py), so a path
that exists is right, and nothing is made twice. The rules hold no logic: what to make is in the plan.

Outputs are marked `update`, so that Snakemake never deletes one: a step writes its folder whole, by one rename, and
leaves alone what is complete, be it by a second command at the same time or by the orphan of a killed one.
"""

from snakemake.utils import min_version

from steps.lib import workflow as temper

min_version("9.0")

PLAN = temper.load_plan(config)  # a bad config ends here, in one line, before any job


wildcard_constraints:
    name="[^/]+",


localrules:
    all,
    fetch_data,
    fetch_model,
    format_prompts,
    compare_runs,


rule all:
    "The comparison of all runs of the sweep."
    input:
        PLAN.leaderboard,
        temper.complete(PLAN, workflow),


rule fetch_data:
    "Raw data, as pinned; the pin file says what was fetched."
    output:
        update("data/raw/{data}/pin-{key}.json"),
    params:
        config=temper.config_of(PLAN, "fetch_data"),
    log:
        "results/logs/fetch_data/{data}-{key}.log",
    shell:
        "python -m steps.fetch_data"
        " --config {params.config:q}"
        " --output {output:q}"
        " --log {log:q}"


rule fetch_model:
    "The base model, in Hugging Face layout."
    output:
        update(directory("results/models/{name}")),
    params:
        config=temper.config_of(PLAN, "fetch_model"),
    log:
        "results/logs/fetch_model/{name}.log",
    shell:
        "python -m steps.fetch_model"
        " --config {params.config:q}"
        " --output {output:q}"
        " --log {log:q}"


rule format_prompts:
    "Raw rows to conversations, assigned to train, validation and test."
    input:
        unpack(temper.inputs_of(PLAN, "format_prompts")),
    output:
        update(directory("results/prompts/{name}")),
    params:
        config=temper.config_of(PLAN, "format_prompts"),
    log:
        "results/logs/format_prompts/{name}.log",
    shell:
        "python -m steps.format_prompts"
        " --raw {input.raw:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule tokenize_splits:
    "Conversations to token ids and labels, with an audit of what is learned."
    input:
        unpack(temper.inputs_of(PLAN, "tokenize_splits")),
    output:
        update(directory("results/splits/{name}")),
    params:
        config=temper.config_of(PLAN, "tokenize_splits"),
    log:
        "results/logs/tokenize_splits/{name}.log",
    threads: temper.tokenizing_threads(PLAN, workflow.cores)
    shell:
        "RAYON_NUM_THREADS={threads} python -m steps.tokenize_splits"
        " --prompts {input.prompts:q}"
        " --model {input.model:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule sample_answers:
    "On-policy preference pairs: what the model itself answers wrongly is rejected."
    input:
        unpack(temper.inputs_of(PLAN, "sample_answers")),
    output:
        update(directory("results/pairs/{name}")),
    params:
        config=temper.config_of(PLAN, "sample_answers"),
    log:
        "results/logs/sample_answers/{name}.log",
    priority: 2  # all trainings of the sweep wait for it
    threads: temper.threads_of(PLAN, "sample_answers")
    resources:
        gpu=temper.gpus_per_job(),
    shell:
        "python -m steps.sample_answers"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule reference_logprobs:
    "How likely the model finds both answers of each preference pair before it is trained."
    input:
        unpack(temper.inputs_of(PLAN, "reference_logprobs")),
    output:
        update(directory("results/references/{name}")),
    params:
        config=temper.config_of(PLAN, "reference_logprobs"),
    log:
        "results/logs/reference_logprobs/{name}.log",
    priority: 2  # all trainings of the sweep wait for it
    threads: temper.threads_of(PLAN, "reference_logprobs")
    resources:
        gpu=temper.gpus_per_job(),
    shell:
        "python -m steps.reference_logprobs"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule train_adapter:
    "One training, or one epoch of a trunk that several runs share."
    input:
        unpack(temper.inputs_of(PLAN, "train_adapter")),
    output:
        update(directory("results/adapters/{name}")),
    params:
        config=temper.config_of(PLAN, "train_adapter"),
        references=temper.flags_of(PLAN, "train_adapter", "references"),
    log:
        "results/logs/train_adapter/{name}.log",
    benchmark:
        "results/logs/train_adapter/{name}.benchmark.tsv"
    priority: 1  # trainings are the longest chain: what else is ready fills the cores at the end
    threads: temper.threads_of(PLAN, "train_adapter")
    resources:
        gpu=temper.gpus_per_job(),
    shell:
        "python -m steps.train_adapter"
        " --splits {input.splits:q}"
        " --model {input.model:q}"
        " {params.references}"
        " --config {params.config:q}"
        " --plan \"$TEMPER_PLAN\""
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule merge_adapter:
    "Adapter and base model to one model that plain transformers loads."
    input:
        unpack(temper.inputs_of(PLAN, "merge_adapter")),
    output:
        update(directory("results/merged/{name}")),
    params:
        config=temper.config_of(PLAN, "merge_adapter"),
    log:
        "results/logs/merge_adapter/{name}.log",
    shell:
        "python -m steps.merge_adapter"
        " --model {input.model:q}"
        " --adapter {input.adapter:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule evaluate_base:
    "The untouched model on the test split: what every run is compared with."
    input:
        unpack(temper.inputs_of(PLAN, "evaluate_model", prefix="base-")),
    output:
        update(directory("results/reports/base-{name}")),
    params:
        config=temper.config_of(PLAN, "evaluate_model", prefix="base-"),
    log:
        "results/logs/evaluate_model/base-{name}.log",
    priority: 2  # cheap, and the first to trip over labels that do not fit the data
    threads: temper.threads_of(PLAN, "evaluate_model", prefix="base-")
    resources:
        gpu=temper.gpus_per_job(),
    shell:
        "python -m steps.evaluate_model"
        " --model {input.model:q}"
        " --splits {input.splits:q}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule evaluate_model:
    "A tuned model on the test split, beside the untouched one."
    input:
        unpack(temper.inputs_of(PLAN, "evaluate_model")),
    output:
        update(directory("results/reports/{name}")),
    params:
        config=temper.config_of(PLAN, "evaluate_model"),
        references=temper.flags_of(PLAN, "evaluate_model", "references", "start_report"),
    log:
        "results/logs/evaluate_model/{name}.log",
    wildcard_constraints:
        name="(?!base-)[^/]+",
    threads: temper.threads_of(PLAN, "evaluate_model")
    resources:
        gpu=temper.gpus_per_job(),
    shell:
        "python -m steps.evaluate_model"
        " --model {input.model:q}"
        " --splits {input.splits:q}"
        " --adapter {input.adapter:q}"
        " --base-report {input.base_report:q}"
        " {params.references}"
        " --config {params.config:q}"
        " --output {output:q}"
        " 2>&1 | tee {log:q}"


rule compare_runs:
    "Leaderboard and page of the sweep; completes MLflow and names the champion."
    input:
        reports=temper.reports(PLAN),
    output:
        "results/sweeps/{name}/leaderboard.csv",
        "results/sweeps/{name}/leaderboard.json",
        "results/sweeps/{name}/report.html",
        "results/sweeps/{name}/provenance.json",
    params:
        config=temper.config_of(PLAN, "compare_runs"),
        key=temper.key_of(PLAN, "compare_runs"),  # its path has none, and an edit to its code is a reason to rerun
        folder="results/sweeps/{name}",
    log:
        "results/logs/compare_runs/{name}.log",
    shell:
        "python -m steps.compare_runs"
        " --config {params.config:q}"
        " --plan \"$TEMPER_PLAN\""
        " --output {params.folder:q}"
        " 2>&1 | tee {log:q}"


onstart:
    temper.on_start(PLAN, workflow.cores)


onsuccess:
    temper.on_success(PLAN)


onerror:
    temper.on_error(PLAN)
