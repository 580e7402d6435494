"""Send finished folders of results/ to a store, from which another machine fetches them with `temper pull`.

    temper push s3://bucket/reviews
    temper push /mnt/shared/reviews --folders adapters,reports

Sent is what is complete, has a key in its name, and is not in the store: prompts, splits, models, adapters, reports and
so on. A folder is one object, which is there once it is whole, and never replaced. Raw data, checkpoints and the folder
of the sweep stay here: the first comes from its source, and the last is made of the reports in seconds. Credentials are
those of `aws`; AWS_ENDPOINT_URL names another S3 than Amazon's.
"""

from temper.commands import flags
from temper.errors import visible
from temper.folders import fault
from temper.runs import store as stores
from temper.units import size


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_store(parser)


def run(arguments) -> None:
    """Send what the store does not have."""
    kinds = stores.kinds_of(arguments.folders)
    store = stores.Store(arguments.store)
    there, sent, total, known = store.folders(), 0, 0, 0
    for folder in stores.own_folders(kinds):
        if folder in there:
            known += 1
        elif wrong := fault(folder):
            print(visible(f"left out: {folder} is not whole ({wrong})"))
        else:
            number = store.put(folder)
            sent, total = sent + 1, total + number
            print(visible(f"sent {folder} ({size(number)})"), flush=True)
    print(f"sent {sent} folder(s), {size(total)}; {known} were there before")
