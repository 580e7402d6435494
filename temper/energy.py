"""What trainings cost in energy, as codecarbon estimates it (`tracking.energy`).

A thread of codecarbon's looks every 15 seconds at what the training's process and its GPUs draw, where the machine says
so (RAPL, NVML), and else at the load and what such a processor draws at most. Nothing is asked over a network. The
figures are in `provenance.json` of the adapter, in no key, and on the sweep's page.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from temper.errors import UserError, suggest
from temper.files import known_json
from temper.folders import PROVENANCE

log = logging.getLogger("temper")
FACT = "energy"  # of provenance.json


def check(tracking: dict) -> None:
    """Refuse, before any job, what cannot be estimated.

    Raises:
        UserError: codecarbon is not installed, or does not know the country.
    """
    country = tracking.get("energy")
    if not country:
        return
    if importlib.util.find_spec("codecarbon") is None:
        raise UserError("tracking.energy: codecarbon is not installed: pip install codecarbon, or leave it out")
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        raise UserError(f"tracking.energy: unknown country '{country}' of codecarbon's; {suggest(country, known)}")


@contextlib.contextmanager
def measured(settings: dict) -> Iterator[dict]:
    """Estimate what runs inside, where it is a training and is to be estimated.

    Args:
        settings: the job's settings.

    Yields:
        facts for provenance.json, which are there afterwards; none where nothing is estimated, or where it failed.
    """
    facts: dict = {}
    country = ((settings.get("follow") or {}).get("tracking") or {}).get("energy")
    tracker = _started(country) if country else None
    yield facts
    if country and tracker is not None:
        facts |= _ended(tracker, country)


def _started(country: str):
    try:
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            tracking_mode="process",
            allow_multiple_runs=True,
            save_to_file=False,
            log_level="critical",
        )
        tracker.start()
    except Exception as error:  # an estimate stops no training
        log.info("energy: %s; training goes on", error)
        return None
    return tracker


def _ended(tracker, country: str) -> dict:
    try:
        grams = tracker.stop()
        found = tracker.final_emissions_data
        spent = {"kwh": found.energy_consumed, "cpu_kwh": found.cpu_energy, "gpu_kwh": found.gpu_energy}
        return {FACT: {**spent, "memory_kwh": found.ram_energy, "co2_grams": 1000 * grams, "country": country}}
    except Exception as error:  # codecarbon says what is wrong by having measured nothing
        log.info("energy: not estimated (%s)", error)
        return {}


def spent(reports: Iterable[str]) -> dict | None:
    """What the trainings behind some reports took together, each part that runs share once.

    Returns:
        {"kwh", "co2_grams", "country", "trainings": how many were estimated, "of": of how many}; None: none was.
    """
    folders: dict[str, dict] = {}
    todo = [known_json(Path(report) / PROVENANCE).get("inputs", {}).get("adapter") for report in reports]
    while todo:
        folder = todo.pop()
        if folder and folder not in folders:
            folders[folder] = known_json(Path(folder) / PROVENANCE)
            todo.append(folders[folder].get("inputs", {}).get("previous"))
    found = [facts[FACT] for facts in folders.values() if FACT in facts]
    if not found:
        return None
    sums = {name: sum(one[name] for one in found) for name in ("kwh", "co2_grams")}
    countries = ", ".join(sorted({one["country"] for one in found}))
    return {**sums, "country": countries, "trainings": len(found), "of": len(folders)}
