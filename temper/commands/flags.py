"""Arguments shared by several commands."""


def of_a_sweep(parser) -> None:
    """Add the arguments that select a sweep."""
    experiment = parser.add_argument("--experiment", help="a file of conf/experiment")
    experiment.completer = _choices("experiment")
    sweep = parser.add_argument("--sweep", help="a file of conf/sweep; default: the experiment's own")
    sweep.completer = _choices("sweep")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="your own configs, searched before conf/; TEMPER_CONF does the same"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides; a swept value (key=a,b) becomes an axis")


def _choices(group: str):
    """Completions for the shell: the choices of a group in conf/."""

    def names(**_) -> list[str]:
        from temper.config.compose import groups

        return groups()[group]

    return names


def of_a_run(parser) -> None:
    """Add the arguments that select a finished run."""
    parser.add_argument("--run", required=True, help="name, key or folder of a run, or best")
    parser.add_argument("--sweep", help="with --run best: the sweep whose best run is meant")
