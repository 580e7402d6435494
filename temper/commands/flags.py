"""The arguments that several commands have."""


def of_a_sweep(parser) -> None:
    """Add what says which sweep a command is about."""
    parser.add_argument("--experiment", help="a file of conf/experiment")
    parser.add_argument("--sweep", help="a file of conf/sweep; default: the experiment's own")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides; a swept value (key=a,b) becomes an axis")


def of_a_run(parser) -> None:
    """Add what says which finished run a command is about."""
    parser.add_argument("--run", required=True, help="name, key or folder of a run, or best")
    parser.add_argument("--sweep", help="with --run best: the sweep it is the best of")
