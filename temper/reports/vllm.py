"""How vLLM serves a published model: its command, for the model card."""

from pathlib import Path

from temper.errors import visible
from temper.files import read_json
from temper.runs.offered import is_plain_lora

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; 16 by default


def command(adapter: Path | None, repository: str, base: str | None, commit: str | None) -> str | None:
    """The command; None where vLLM cannot load the adapter.

    Args:
        adapter: its folder; None: the repository is a whole model.
        base: the base model's name on the hub, at a commit of it.
    """
    if adapter is None:
        return visible(f"vllm serve {repository}")
    if base is None or not is_plain_lora(adapter):
        return None
    config = read_json(adapter / "adapter_config.json")
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    if rank > RANKS[-1]:
        return None
    at = f" --revision {commit}" if commit else ""
    name = repository.rpartition("/")[2]
    return visible(
        f"vllm serve {base}{at} --tokenizer {repository} \\\n"
        f"    --enable-lora --max-lora-rank {next(most for most in RANKS if rank <= most)} "
        f"--lora-modules {name}={repository}"
    )
