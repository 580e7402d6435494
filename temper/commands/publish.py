r"""Push a run's adapter, or its merged model, to the Hugging Face hub, with a model card.

    temper publish --run best --sweep demo --repository me/reviews --merged --dry-run /tmp/look
    temper publish --run best --sweep demo --repository me/reviews --merged
    make publish RUN=best REPOSITORY=me/reviews ARGS=--merged

Without `--merged` it is the adapter: a few megabytes that others put on the base model, which therefore has to be on
the hub, too. When the run had it from elsewhere (a folder, a PyPI package), `--base-model` says where on the hub it
is. The repository is new and private unless `--exist-ok` and `--public` say otherwise. The card (README.md) is made
from the run: figures of tuned and untouched model with intervals, code to use it, data, hyperparameters, config,
package versions, licences of base and data as conf/ has them. What it is for you say yourself (`--intended-use`). A
receipt (receipt.json) with the sha256 of all that the stages wrote goes along. Read the card first: `--dry-run FOLDER`
writes there what would be pushed. The token is that of `hf auth login`, or HF_TOKEN.

Reads results/; writes to the hub only (HF_ENDPOINT: another one than huggingface.co).
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from temper.commands import flags
from temper.errors import UserError, words
from temper.files import json_text, read_json
from temper.hashing import file_sha256
from temper.model import serving
from temper.model.adapters import is_adapter, put_on
from temper.model.layout import model_files
from temper.model.loading import check_weights, load_model, load_tokenizer
from temper.reports import model_card
from temper.runs import find as runs
from temper.runs import prompting, receipt
from temper.runs.merged import merged_folder
from temper.sources.hub import HUB_TIMEOUT

LOGIN = "make one at https://huggingface.co/settings/tokens (write access), then `hf auth login`, or set HF_TOKEN"


def arguments(parser) -> None:
    """Add the arguments of this command."""
    flags.of_a_run(parser)
    parser.add_argument("--repository", required=True, help="user/name on the hub")
    parser.add_argument("--merged", action="store_true", help="the merged model; default: the adapter")
    parser.add_argument("--base-model", help="the base model's name on the hub, when the run had it from elsewhere")
    parser.add_argument("--license", help="for the card, as the hub writes it: apache-2.0, mit, ...")
    parser.add_argument("--intended-use", metavar="FILE", help="a text for the card: what it is for, and what not")
    parser.add_argument("--public", action="store_true", help="everyone may see it; default: private")
    parser.add_argument("--exist-ok", action="store_true", help="add a commit to a repository that is there")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write there what would be pushed, and push nothing")


def run(arguments) -> None:
    """Push, or write, what the arguments ask for."""
    _check_name("--repository", arguments.repository)
    if arguments.repository.count("/") != 1:
        raise UserError(f"--repository {arguments.repository}: write user/name")
    if arguments.base_model is not None:
        _check_name("--base-model", arguments.base_model)
    intended = flags.text_of("--intended-use", arguments.intended_use)
    run = runs.find(arguments.run, arguments.sweep)
    if arguments.dry_run:
        flags.refuse_used(Path(arguments.dry_run), "--dry-run ", "name a new folder")
    else:
        _check_token()
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "files"
        files.mkdir()
        collect(run, arguments, files, intended)
        if arguments.dry_run:
            _write(files, Path(arguments.dry_run))
        else:
            _push(files, run, arguments)


def _check_name(flag: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: {str(error).rstrip('.')}") from None


def _check_token() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or use --dry-run FOLDER")
    if not get_token():
        raise UserError(f"no token for the hub: {LOGIN}; --dry-run FOLDER needs none")


# --- what is pushed ------------------------------------------------------------------------------


def collect(run: runs.FinishedRun, arguments, files: Path, intended: str | None = None) -> None:
    """Fill the empty folder `files` with the repository's: card, receipt, tokenizer, config, weights (as links).

    Raises:
        UserError: a part of the run is not there any more, or nobody could load its adapter.
    """
    adapter = run.part("train_adapter", "so there is nothing to publish")
    merged = arguments.merged or not is_adapter(adapter)
    base = (model_card.untouched_origin if merged else model_card.base_origin)(run, arguments.base_model)
    _add_merged(run, files) if merged else _add_adapter(run, adapter, base, files)
    sum_of_receipt = None
    if run.judged:
        (files / receipt.FILE).write_text(json_text(receipt.public_receipt(run).model_dump()), encoding="utf-8")
        sum_of_receipt = file_sha256(files / receipt.FILE)
    told = {"license": arguments.license, "intended": intended, "receipt": sum_of_receipt}
    card = model_card.model_card(run, model_card.Card(arguments.repository, base, merged, **told))
    (files / "README.md").write_text(card, encoding="utf-8")


def _add_merged(run: runs.FinishedRun, files: Path) -> None:
    """The merged model, and a tokenizer that asks as the training did. No file of Temper's own goes along."""
    folder = merged_folder(run, "and it is part of what --merged publishes")
    runs.refuse_bundled(folder, "publish the adapter, without --merged")
    check_weights(folder)
    load_tokenizer(folder)
    serving.check(folder, folder, leaves=True)
    _add_tokenizer(run, folder, folder, files)
    names = model_files([path.name for path in folder.iterdir()], str(folder))
    _link([folder / name for name in names if name not in ("provenance.json", "README.md")], files)


def _add_adapter(run: runs.FinishedRun, adapter: Path, base: model_card.Origin, files: Path) -> None:
    """The adapter, with the base model's name on the hub in its config, and the base model's tokenizer."""
    if base.repository is None:
        raise UserError(
            f"--run {run.name}: its base model is {base.text}, which is not on the hub, so nobody could load the "
            "adapter: publish with --merged, or say where the model is on the hub with --base-model user/name"
        )
    put_on(load_model(runs.base_folder(run), run.load), adapter)  # that they fit, before others find out
    serving.refuse_other_base(adapter, runs.base_folder(run))
    _add_tokenizer(run, runs.base_folder(run), adapter, files)
    config = read_json(adapter / "adapter_config.json")
    config |= {"base_model_name_or_path": base.repository, "revision": base.commit}
    (files / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _link([path for path in adapter.glob("adapter_model*") if path.is_file()], files)


def _add_tokenizer(run: runs.FinishedRun, model: Path, recorded_in: Path, files: Path) -> None:
    """The tokenizer that goes along, with the sums of what is published."""
    tokenizer = prompting.tokenizer_to_ship(model, run.prompt)
    tokenizer.save_pretrained(files)
    serving.write(files, {**serving.read(recorded_in), **serving.of_folder(model, tokenizer)})


def _link(paths: list[Path], files: Path) -> None:
    """Links, for weights are large. What is there already is the run's own, and stays."""
    for path in paths:
        if not (files / path.name).exists():
            (files / path.name).symlink_to(path.resolve())


def _write(files: Path, folder: Path) -> None:
    shutil.copytree(files, folder, dirs_exist_ok=True)
    for path in _all_files(folder):
        print(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}")
    print(f"nothing was pushed; this would be: {folder}")


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- pushing -------------------------------------------------------------------------------------


def _push(files: Path, run: runs.FinishedRun, arguments) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, api = arguments.repository, HfApi()
    with _hub_errors(repository):
        exists = _exists(api, repository)
        if exists and not arguments.exist_ok:
            raise UserError(
                f"--repository {repository}: is there already; --exist-ok pushes a new commit to it, or name another"
            )
        if exists and arguments.public:
            raise UserError(f"--public: {repository} is there already; change who may see it on its settings page")
        if not exists:
            api.create_repo(repository, private=not arguments.public)
        commit = api.upload_folder(repo_id=repository, folder_path=files, commit_message=f"Temper run {run.name}")
    who = "as visible as before" if exists else "public" if arguments.public else "private"
    print(f"pushed {len(_all_files(files))} files to {commit.repo_url} ({who})")


def _exists(api, repository: str) -> bool:
    """Asked first, with a short wait: no network must be an error soon."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.repo_info(repository, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:  # the hub says so of a bad token too
            api.whoami()
        return False
    return True


@contextlib.contextmanager
def _hub_errors(repository: str):
    """Turn what the hub refuses into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError) as raised:
        # a RuntimeError is that of an upload's thread
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            raise UserError(f"--repository {repository}: {_refusal(error.response.status_code, error)}") from None
        if not isinstance(error, HTTPError | OSError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--repository {repository}: the hub cannot be reached ({reason[:200]}); no network? "
            "--dry-run FOLDER writes what would be pushed"
        ) from None


def _refusal(status: int, error) -> str:
    if status == 401:
        return f"the hub does not accept the token: {LOGIN}"
    if status == 403:
        return "the token may not write there: use your own user name or organisation, and a write token"
    return f"the hub refuses ({status}: {words(getattr(error, 'server_message', None) or error)})"
