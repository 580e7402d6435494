"""How vLLM serves a published model: its command, for the model card."""

from pathlib import Path
from shlex import quote

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
        return f"vllm serve {quote(repository)}"
    if base is None or not is_plain_lora(adapter):
        return None
    config = read_json(adapter / "adapter_config.json")
    largest = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    rank = next((most for most in RANKS if largest <= most), None)
    if rank is None:
        return None
    at = f" --revision {quote(commit)}" if commit else ""
    named = f"{repository.rpartition('/')[2]}={repository}"
    return (
        f"vllm serve {quote(base)}{at} --tokenizer {quote(repository)} \\\n"
        f"    --enable-lora --max-lora-rank {rank} --lora-modules {quote(named)}"
    )
