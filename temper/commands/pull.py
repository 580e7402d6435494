"""Fetch the folders of a sweep that a store has and this machine has not, so that snakemake makes only the others.

    temper pull s3://bucket/reviews --experiment demo
    temper pull /mnt/shared/reviews --experiment demo train.learning_rate=1e-4,3e-4 --folders adapters,reports

The sweep is named as for `temper plan`, and everything with one of its keys is the same on all machines. A folder
appears here complete, after the sha256 of each file was compared with the one that `temper push` took. What is here
already is kept. Credentials are those of `aws`; AWS_ENDPOINT_URL names another S3 than Amazon's.
"""

from pathlib import Path

from temper.commands import flags
from temper.commands.plan import jobs_to_do
from temper.errors import UserError, visible
from temper.planning import planner
from temper.runs import store as stores
from temper.units import size


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_store(parser)
    flags.of_a_sweep(parser)


def run(arguments) -> None:
    """Fetch what is missing here."""
    kinds = stores.kinds_of(arguments.folders)
    asked = (arguments.experiment, arguments.sweep, arguments.overrides, arguments.config_dir)
    plan = planner.build(*asked)
    store = stores.Store(arguments.store)
    there, count, total = store.folders(), 0, 0
    if not there:
        raise UserError(f"{arguments.store}: has no folder of results/; check the address, or send some (temper push)")
    while True:
        wanted = [Path(job.path) for job in plan.jobs.values() if Path(job.path) in there and not plan.is_made(job)]
        wanted = [folder for folder in wanted if folder.parent.name in kinds]
        for folder in wanted:
            store.get(folder)
            count, total = count + 1, total + there[folder]
            print(visible(f"fetched {folder} ({size(there[folder])})"), flush=True)
        if not (wanted and plan.coming):
            break
        plan = planner.build(*asked)  # a search goes on by the rankings that came
    print(f"fetched {count} folder(s), {size(total)}")
    print(jobs_to_do(plan))
