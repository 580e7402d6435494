"""The arguments that several commands have."""


def of_a_sweep(parser) -> None:
    """Add what says which sweep a command is about."""
    experiment = parser.add_argument("--experiment", help="a file of conf/experiment")
    experiment.completer = _choices("experiment")
    sweep = parser.add_argument("--sweep", help="a file of conf/sweep; default: the experiment's own")
    sweep.completer = _choices("sweep")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="configs of your own, searched before conf/: or TEMPER_CONF"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides; a swept value (key=a,b) becomes an axis")


def _choices(group: str):
    """For the shell's completion: the files of a group in conf/."""

    def names(**_) -> list[str]:
        from temper.config.compose import groups

        return groups()[group]

    return names


def of_a_run(parser) -> None:
    """Add what says which finished run a command is about."""
    parser.add_argument("--run", required=True, help="name, key or folder of a run, or best")
    parser.add_argument("--sweep", help="with --run best: the sweep it is the best of")
