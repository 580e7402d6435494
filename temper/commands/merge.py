"""Write a run's merged model: adapter and base in one folder, which any program that reads Hugging Face's layout loads.

    temper merge --run best --sweep demo
    temper merge --run 09da7523a6

A sweep writes the merged model of the run that it chooses; merge.runs says of which others. All are evaluated as merged
models, so a folder that is made later answers as the report says, to the bit. Says the folder.
"""

from temper.commands import flags
from temper.runs import find as runs
from temper.runs.merged import merged_folder


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)


def run(arguments) -> None:
    """Merge, unless the folder is there."""
    print(merged_folder(runs.find(arguments.run, arguments.sweep), "and it is part of the merged model"))
