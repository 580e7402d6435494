"""The typed config: every section, every key, and the values it may have.

`train` goes to `transformers.TrainingArguments` and `adapter` to a PEFT config; each is checked against that class. All
other sections are the models below.
"""

import datetime
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from temper.data import encodings


class Section(BaseModel):
    """Base class of all sections: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


# --- where data and models come from -------------------------------------------------------------


class OfficialSplits(Section):
    """Temper's split -> the hub's; one that is left out is taken from train by a hash."""

    model_config = ConfigDict(title="for each split")

    train: str
    validation: str | None = None
    test: str | None = None


# The name of one split, or a mapping.
Splits = Annotated[
    Annotated[str, Tag("one")] | Annotated[OfficialSplits, Tag("each")],
    Discriminator(lambda found: "each" if isinstance(found, dict | OfficialSplits) else "one"),
]


class HubSource(Section):
    """A repository on the Hugging Face hub, at a commit, branch or tag. A branch or tag is resolved to its commit once,
    and that is kept in data/revisions.json."""

    kind: Literal["hub"]
    repository: str
    revision: str = "main"
    config: str | None = None
    """The data set's configuration ("subset"), for data only."""
    split: Splits = "train"
    """For data only. A mapping takes the data set's own splits: {train: train, test: test}."""


class FilesSource(Section):
    """Your own files, read in place. `path`: for data a file, a folder, a pattern (`rows/*.jsonl`, `rows/**/*.jsonl`),
    or a list of these; for a model its folder."""

    kind: Literal["files"]
    path: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]


def _names_a_file(member: str) -> str:
    name = member.rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in name or len(name.encode(errors="replace")) > MOST_NAME_BYTES:
        raise ValueError(f"must end in the name of a file, of at most {MOST_NAME_BYTES} bytes")
    return member


MOST_NAME_BYTES = 200  # file systems allow 255, and a step adds a prefix to a name
Member = Annotated[str, AfterValidator(_names_a_file)]


class PackageSource(Section):
    """A file inside a PyPI distribution that is pinned by version and sha256: downloaded, never installed or built.

    `member` is the path inside the distribution; a list goes through nested archives.
    """

    kind: Literal["package"]
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sdist: bool = False
    """true: the source distribution, not the wheel."""
    member: Member | Annotated[list[Member], Field(min_length=1)]


Source = Annotated[HubSource | FilesSource | PackageSource, Field(discriminator="kind")]
SOURCE_KINDS: dict[str, type[Section]] = {"hub": HubSource, "files": FilesSource, "package": PackageSource}


class SplitSources(Section):
    """A source for each split; one that is left out is taken from train by a hash."""

    model_config = ConfigDict(title="for each split")

    train: Source
    validation: Source | None = None
    test: Source | None = None

    @model_validator(mode="after")
    def _one_split_each(self):
        for name in SplitSources.model_fields:
            refuse_official_splits(getattr(self, name), f"source.{name}")
        return self


def refuse_official_splits(source, key: str) -> None:
    """Refuse a hub's splits where one is needed."""
    if isinstance(source, HubSource) and not isinstance(source.split, str):
        raise ValueError(f"'{key}.split' names several splits, and one is needed here: {key}.split=train")


def _form_of_source(source) -> str:
    per_split = isinstance(source, SplitSources) or (
        isinstance(source, dict) and {*source} & {*SplitSources.model_fields}
    )
    return "per_split" if per_split else "one"


# Where a data set is: one source, or one for each split.
RowsSource = Annotated[
    Annotated[Source, Tag("one")] | Annotated[SplitSources, Tag("per_split")], Discriminator(_form_of_source)
]


# --- data ----------------------------------------------------------------------------------------


def _tab(value):
    r"""A tab is hard to type in a shell and to see in a file, so it may be written as ``\\t``."""
    return "\t" if value == "\\t" else value


class Csv(Section):
    """How to read csv files. Names are those of Python's csv module."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1), BeforeValidator(_tab)] = ","
    quotechar: Annotated[str, Field(min_length=1, max_length=1)] | None = '"'
    """null: quotes are ordinary characters."""
    escapechar: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    r"""Character that escapes quotes, line ends, delimiters and itself. Before others it is text. If quotechar is null,
    \n, \t and \r are control characters, as PostgreSQL writes them."""
    fieldnames: list[str] | None = None
    """Column names, if the file has no header line."""


class SplitSizes(Section):
    """Shares of the rows, below 1, for validation and test; train gets the rest. A hash of its prompt assigns a row.

    A split that the data itself has (by `data.source`, or by a column) is as it is there.
    """

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    column: str | None = None
    """Column that names a row's split: train, validation (or valid, val, dev) or test."""
    group_by: str | None = None
    """Column whose value keeps rows together (a document, a user): its hash assigns them, instead of the prompt's."""

    @model_validator(mode="after")
    def _leave_rows_for_training(self):
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave no rows for training")
        return self


class SplitLimits(Section):
    """Most rows to keep in each split (null: all). A hash of the prompt selects them."""

    train: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[int, Field(gt=0)] | None = None
    test: Annotated[int, Field(gt=0)] | None = None


Layout = Literal[
    "text",
    "messages",
    "prompt_completion",
    "instruction",
    "question_answer",
    "sharegpt",
    "preference",
    "scored_responses",
    "unpaired_preference",
    "template",
]


LAYOUTS_OF_PAIRS = ("preference", "scored_responses")


class Data(Section):
    """A data set: where it is, how its rows become conversations, and how it is split."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    source: RowsSource
    """One source, or {train: ..., validation: ..., test: ...}, of which the last two may be left out."""
    license: Annotated[str | None, Field(exclude=True)] = None
    """For model cards, as the hub writes it (apache-2.0, mit, ...). In no key."""
    format: Literal["json", "jsonl", "csv", "parquet", "text"] | None = None
    """null: inferred from the file's extension. text: a file is one row, whose column text is all of it."""
    csv: Csv = Csv()
    encoding: Annotated[str, AfterValidator(encodings.checked)] = "utf-8"
    """Of text files, by Python's name (cp1252, latin-1, utf-16-le, ...). A file's byte order mark comes before it."""
    field: str | None = None
    """If a json file is one object: the field that holds the rows, or the fields from outside to inside, as in SQuAD's
    data.paragraphs.qas. Rows then have the columns of the objects around them, too."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read or makes no conversation ends the step, or is left out and listed in rejected.jsonl."""
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """For skip: a larger share of bad rows is an error. A row counts as often as it has lines."""
    layout: Layout
    """Which columns form the conversation."""
    columns: dict[str, str] = {}
    """Layout's column -> file's column, where the names differ."""
    ignore_fields: list[str] = []
    """Columns, and fields of messages, to drop on purpose (weight, tools, ...)."""
    prompt: str | None = None
    """For layout template: the prompt, as Jinja over the row's columns."""
    completion: str | None = None
    """For layout template: the answer, as Jinja over the row's columns."""
    rejected: str | None = None
    """For layout template: the rejected answer of a preference pair, as Jinja."""
    label: str | None = None
    """For layout template: whether the answer is desirable (method=kto), as a Jinja expression."""
    score_pairs: Literal["best_worst", "all"] = "best_worst"
    """For layout scored_responses: the pairs of a row, its best response against its worst, or each against each that
    has a lower score."""
    rejected_from: Annotated[list[str], Field(min_length=2)] | None = None
    """Labels; the rejected answer is a label other than the row's own, picked by a hash of the row."""
    where: str | None = None
    """Jinja expression over the row's columns. Rows where it is false are left out."""
    splits: SplitSizes = SplitSizes()
    """Shares of the rows for validation and test."""
    limit: SplitLimits = SplitLimits()
    """Most rows to keep in each split."""
    on_overlap: Literal["warn", "drop", "error"] = "warn"
    """For rows of one split that stand, exactly or nearly, in another. drop: train loses them; of validation and test,
    validation does."""

    @model_validator(mode="after")
    def _a_source_per_official_split(self):
        source = self.source
        if isinstance(source, HubSource) and isinstance(source.split, OfficialSplits):
            names = source.split.model_dump(exclude_none=True)
            each = {name: source.model_copy(update={"split": theirs}) for name, theirs in names.items()}
            self.source = SplitSources(**each)
        return self

    @model_validator(mode="after")
    def _one_way_to_split(self):
        if not isinstance(self.source, SplitSources):
            return self
        if self.splits.column is not None:
            raise ValueError("'splits.column' and a source for each split both say what the splits are: leave one out")
        for name in ("validation", "test"):
            default = SplitSizes.model_fields[name].default
            if getattr(self.source, name) is not None and getattr(self.splits, name) != default:
                raise ValueError(
                    f"'splits.{name}' is a share of train, and source.{name} says what it is: leave one out"
                )
        return self

    @model_validator(mode="after")
    def _templates_belong_to_their_layout(self):
        given = self.prompt is not None and self.completion is not None
        if self.layout == "template" and not given:
            raise ValueError(
                "layout 'template' needs both 'prompt' and 'completion' (Jinja templates over the columns)"
            )
        if self.layout != "template" and (self.prompt or self.completion or self.rejected or self.label):
            names = "'prompt', 'completion', 'rejected' and 'label'"
            raise ValueError(f"{names} are for layout 'template', not for '{self.layout}'")
        if self.layout != "scored_responses" and self.score_pairs != "best_worst":
            raise ValueError(f"'score_pairs' is for layout 'scored_responses', not for '{self.layout}'")
        return self

    @model_validator(mode="after")
    def _share_belongs_to_skip(self):
        if self.on_bad_row == "error" and self.max_bad_share != type(self).model_fields["max_bad_share"].default:
            raise ValueError(
                "'max_bad_share' is for bad rows that are left out: set on_bad_row=skip, or leave it out "
                "(~data.max_bad_share)"
            )
        return self

    @model_validator(mode="after")
    def _fields_belong_to_messages(self):
        if self.ignore_fields and self.layout in ("text", "template", "question_answer"):
            raise ValueError(
                f"'ignore_fields' names fields of messages, and layout '{self.layout}' reads none: leave it out "
                "(~data.ignore_fields)"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_rejected_answers(self):
        of_layout = self.layout in LAYOUTS_OF_PAIRS
        if self.rejected_from is not None and (self.rejected is not None or of_layout):
            what = f"layout '{self.layout}'" if of_layout else "'rejected'"
            raise ValueError(f"'rejected_from' and {what} both say what the rejected answer is: leave one out")
        if self.has_labels and (self.rejected is not None or self.rejected_from is not None):
            what = "'label'" if self.label is not None else f"layout '{self.layout}'"
            name = "rejected" if self.rejected is not None else "rejected_from"
            raise ValueError(f"{what} says whether single answers are desirable, '{name}' makes pairs: leave one out")
        return self

    @model_validator(mode="after")
    def _documents_have_no_answers(self):
        if self.layout == "text" and self.rejected_from is not None:
            raise ValueError("'rejected_from' is for answers, and layout 'text' has none: leave it out")
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether each row has a rejected answer beside the chosen one."""
        return self.layout in LAYOUTS_OF_PAIRS or self.rejected is not None or self.rejected_from is not None

    @property
    def has_labels(self) -> bool:
        """Whether each row says if its answer is desirable."""
        return self.layout == "unpaired_preference" or self.label is not None


PartLimits = Annotated[
    SplitLimits | None,
    BeforeValidator(lambda found: {"train": found} if isinstance(found, int) else found),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "object"}, {"type": "null"}]}),
]


class NamedData(Section):
    """A data set of a file of conf/data, or as much of it as a limit says."""

    data: Annotated[Data, WithJsonSchema({"type": "string"})]
    """Name of a file of conf/data, which says all but how much of it is taken."""
    limit: PartLimits = None
    """Most of its rows: a number is for train; a mapping as data.limit. null: as its own file says."""

    @model_validator(mode="after")
    def _limits_of_this_use(self):
        if self.limit is not None:
            self.data.limit = self.data.limit.model_copy(update=self.limit.model_dump(exclude_none=True))
        return self


class MixPart(NamedData):
    """A data set of a mixture."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its training rows is learned in an epoch; of a fraction, a hash of the row picks the rows."""


class Mixture(Section):
    """Several data sets in one: each is formatted and split by itself, and the splits are put together."""

    model_config = ConfigDict(title="a mixture")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    mix: Annotated[list[MixPart], Field(min_length=1)]
    """Each `data`, the name of a file of conf/data; `weight`, how often each of its training rows is learned in an
    epoch (a fraction: some of them, picked by a hash); `limit`, the most training rows, or a mapping as data.limit."""
    on_overlap: Literal["warn", "drop", "error"] = "warn"
    """As in a data set, for rows of one that stand in a split of another."""

    @model_validator(mode="after")
    def _fit_together(self):
        names = [part.data.name for part in self.mix]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"'mix' has '{twice}' twice: give it once, with a weight")
        pairs = [part.data.name for part in self.mix if part.data.has_pairs]
        if pairs and len(pairs) < len(names):
            without = next(name for name in names if name not in pairs)
            raise ValueError(
                f"'mix': {pairs[0]} has preference pairs, and {without} has none: mix them with their like"
            )
        grouped = [part.data.splits.group_by is not None for part in self.mix]
        if any(grouped) and not all(grouped):
            without = names[grouped.index(False)]
            raise ValueError(f"'mix': {without} has no data.splits.group_by, and others have: give one to all, or none")
        return self

    @property
    def has_pairs(self) -> bool:
        return self.mix[0].data.has_pairs


def _form_of_data(data) -> str:
    return "mixed" if isinstance(data, Mixture) or (isinstance(data, dict) and "mix" in data) else "alone"


AnyData = Annotated[
    Annotated[Data, Tag("alone")] | Annotated[Mixture, Tag("mixed")],
    Discriminator(_form_of_data),
]


class Prompt(Section):
    """How a conversation becomes text."""

    apply_chat_template: bool = True
    """true: the model's own chat template; false: `template`."""
    system: str | None = None
    """System message; replaces one in the data."""
    template: str | None = None
    """Jinja over `system` and `prompt`, if apply_chat_template is false."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens count in the loss: those of the assistant's turns, of the last of them, or all."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template, for instance enable_thinking: false."""
    allow_special_text: bool = False
    """true: texts that spell control tokens (`<|im_end|>`) become control tokens; false: they are text."""
    date: str = "2024-07-26"
    """YYYY-MM-DD: the date given to a chat template that asks for today's."""

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
        if not self.apply_chat_template and self.chat_template_kwargs:
            raise ValueError("'chat_template_kwargs' is for apply_chat_template: true: leave it out")
        taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(self.chat_template_kwargs)
        if taken:
            raise ValueError(f"'chat_template_kwargs' cannot set '{taken.pop()}', which comes from the rows")
        if not self.apply_chat_template and self.date != Prompt.model_fields["date"].default:
            raise ValueError("'date' is for apply_chat_template: true; a prompt.template cannot ask for it")
        if not self.apply_chat_template and self.template is None:
            raise ValueError("apply_chat_template: false needs a 'template', for instance '{{ prompt }}\\n'")
        return self


# A share of the rows of a split.
Share = Annotated[float, Field(ge=0, le=1)]


class MaxShare(Section):
    """What tokenizing may do to so large a share of the rows of each split; more is an error before any training.

    audit.json counts each. null: no limit.
    """

    dropped: Share | None = 0.1
    """Left out: too long for max_length, an answer that holds an end token, pairs whose answers are the same tokens."""
    truncated: Share | None = 0.1
    """Cut by max_length_policy truncate."""
    doubled_begin: Share | None = 0.0
    """Two begin tokens in a row."""
    doubled_end: Share | None = 0.0
    """A token that ends answers, twice in a row."""
    end_spelled: Share | None = 0.1
    """An answer ends with the text of an end token, which would be learned as text before the token itself."""
    special_text: Share | None = None
    """A text spells a control token, and is read as text."""
    special_text_allowed: Share | None = None
    """A text spells a control token, and is read as that (prompt.allow_special_text)."""
    without_reasoning: Share | None = None
    """An empty block of reasoning is learned."""
    only_last_answer_learned: Share | None = None
    """The template shows earlier answers otherwise, and only the last one of a conversation is used."""


class Tokenize(Section):
    """Length limit of a row in tokens, and what happens to longer rows.

    The limit is on prompt plus answer for a causal model, and on each of the two for an encoder-decoder.
    """

    max_length: Annotated[int, Field(gt=1)] = 1024
    """Most tokens in a row."""
    max_length_policy: Literal["drop", "truncate", "split", "error"] | None = None
    """What becomes of longer rows. null: split for documents (data.layout=text), which go on in another row; else
    drop."""
    max_share: MaxShare = MaxShare()


# --- model, method, training ---------------------------------------------------------------------


class ModelLoad(Section):
    """Arguments of `from_pretrained`; ``fastest`` is resolved on the machine that trains."""

    dtype: Literal["fastest", "float32", "bfloat16", "float16"] = "fastest"
    attn_implementation: Literal["fastest", "eager", "sdpa", "flash_attention_2"] = "fastest"


class Quantization(Section):
    """How the frozen base is stored while an adapter is trained. Names are those of transformers.BitsAndBytesConfig."""

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
    license: Annotated[str | None, Field(exclude=True)] = None
    """For model cards, as the hub writes it (apache-2.0, mit, ...). In no key."""

    @model_validator(mode="after")
    def _no_split(self):
        for name in ("config", "split"):
            if getattr(self.source, name, None) not in (None, HubSource.model_fields[name].default):
                raise ValueError(f"'source.{name}' is for data; a model has none: leave it out (~model.source.{name})")
        return self


class DocumentsFirst(NamedData):
    """Continued pretraining on documents (data.layout=text) before fine-tuning, given as differences from the run's
    config."""

    tokenize: dict[str, Any] = {}
    train: dict[str, Any] = {}
    adapter: dict[str, Any] = {}

    @model_validator(mode="after")
    def _of_documents(self):
        if self.data.layout != "text":
            raise ValueError(f"'data' is for documents (layout text), and {self.data.name} has {self.data.layout}")
        return self


class Sft(Section):
    """Supervised fine-tuning: learn the answers, or documents."""

    name: Literal["sft"]
    first: DocumentsFirst | None = None
    """Train on documents first. null: start from the model as it is."""


class SftFirst(Section):
    """Supervised fine-tuning before preference optimization, given as differences from the run's config."""

    train: dict[str, Any] = {}
    adapter: dict[str, Any] = {}


def _drawing_is_for_samples(section):
    """Without sampling, the settings of sampling do nothing."""
    for name in ("temperature", "top_p"):
        if not section.do_sample and getattr(section, name) != 1:
            raise ValueError(f"'{name}' has no effect without do_sample=true: add it, or leave {name} out")
    return section


class OwnAnswers(Section):
    """How the model generates answers; wrong ones become the rejected answers. Names are those of `eval`."""

    batch_size: Annotated[int, Field(gt=0)] = 32
    max_new_tokens: Annotated[int, Field(gt=0, le=100_000)] = 64
    do_sample: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    _drawing = model_validator(mode="after")(_drawing_is_for_samples)


class OfPairs(Section):
    """Preference optimization on pairs of a chosen and a rejected answer."""

    sft: SftFirst | None = None
    """Fine-tune on the chosen answers first. null: start from the model as it is."""
    own_answers: OwnAnswers | None = None
    """Sample the rejected answers from the model. null: take those of the data."""


class Dpo(OfPairs):
    """Direct preference optimization: learn to prefer the chosen answer over the rejected one. Names are TRL's."""

    name: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Larger values keep the model closer to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """For loss_type robust: share of pairs with chosen and rejected swapped."""

    @model_validator(mode="after")
    def _smoothing_is_for_robust(self):
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} is for loss_type 'robust'; '{self.loss_type}' ignores it"
            )
        return self


class Orpo(OfPairs):
    """Odds ratio preference optimization: fine-tune on the chosen answer, and make it likelier than the rejected one.
    Needs no reference. Names are TRL's."""

    name: Literal["orpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds ratio beside fine-tuning; lambda in the paper."""


class Simpo(OfPairs):
    """Simple preference optimization: prefer the answer that is likelier per token, by a margin. Needs no reference.
    Names are TRL's."""

    name: Literal["simpo"]
    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the reward, which is beta times the answer's mean log-probability per token."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 1.0
    """Margin by which the chosen answer's reward is to exceed that of the rejected one."""
    cpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of fine-tuning on the chosen answer beside that (CPO-SimPO). 0: SimPO itself."""


class Kto(Section):
    """Kahneman-Tversky optimization: raise desirable answers and lower undesirable ones, which need not be pairs.
    Names are TRL's."""

    name: Literal["kto"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Larger values keep the model closer to the reference."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the desirable answers, for where there are more of one kind."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the undesirable answers."""
    sft: SftFirst | None = None
    """Of pairs, fine-tune on the chosen answers first. null: start from the model as it is."""


Method = Annotated[Sft | Dpo | Orpo | Simpo | Kto, Field(discriminator="name")]
METHODS: dict[str, type[Section]] = {"sft": Sft, "dpo": Dpo, "orpo": Orpo, "simpo": Simpo, "kto": Kto}
WITH_REFERENCE = ("dpo", "kto")  # methods that compare with the model that training starts from


class Merge(Section):
    """Which runs are written as merged models, in which precision, and the base that a QLoRA adapter is merged into.
    Every run is evaluated as its merged model, which is made in memory where no folder is wanted."""

    runs: Literal["chosen", "tied", "all", "none"] = "chosen"
    """Runs whose merged model is written to results/merged: the one that the sweep chooses; also those that cannot be
    told from the best; all; none. It changes no figure. `temper merge --run RUN` writes one later."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dequantized_base: bool | None = None
    """For QLoRA. true: merge into the dequantized base; false: into the original; null: into that of the two whose
    merged model is nearer to the trained network."""


# --- evaluation, tracking, sweep -----------------------------------------------------------------


class Probe(Section):
    """A general text by which forgetting is measured: what the tuned model has more of bits per byte than the untouched
    one. Of no source, nothing is measured."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "probe"
    """The text's folder in data/raw."""
    source: Source | None = None
    format: Literal["text", "json", "jsonl", "csv", "parquet"] | None = None
    """null: inferred from the file's extension. In a text, blank lines separate the passages."""
    csv: Csv = Csv()
    field: str | None = None
    """If a json file is one object: the field that holds the rows, as data.field."""
    encoding: Annotated[str, AfterValidator(encodings.checked)] = "utf-8"
    """As data.encoding."""
    text: str | None = None
    """For rows: their text, as Jinja over the columns."""
    passage: str | None = None
    """For rows: Jinja over the columns. Rows in succession for which it is the same are one passage. null: each is."""
    limit: Annotated[int, Field(ge=2)] | None = 64
    """Most passages. A hash of their text selects them."""

    @model_validator(mode="after")
    def _no_settings_of_nothing(self):
        for name in type(self).model_fields if self.source is None else ():
            if name != "source" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is for a probe, and there is none: give its source, or leave {name} out")
        return self

    @model_validator(mode="after")
    def _one_text(self):
        refuse_official_splits(self.source, "source")
        return self


class Gate(Section):
    """Bounds that the chosen run of a sweep must keep, else the command ends with exit code 1."""

    forgetting: float | None = None
    """Most bits per byte of the probe that it may have more than the untouched model."""
    gain: float | None = None
    """Least gain over the untouched model in the ranking metric, on the test split where that was opened."""

    @model_validator(mode="after")
    def _bounds_something(self):
        if self.forgetting is None and self.gain is None:
            raise ValueError("has no bound: give 'forgetting' or 'gain', or leave it out (eval.gate=null)")
        return self


class Published(Section):
    """A figure from the literature, shown in the reports beside the run's own."""

    name: str
    metric: str
    value: float
    source: str


class OwnMetric(Section):
    """A figure of your own, the mean over rows, higher is better: exactly one of a Python function, a regular
    expression and a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=60)] | None = None
    """Its name in files and pages. null: the function's."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] | None = None
    """module:function of (prediction, reference, row, **arguments), which returns a number, or a dictionary of them."""
    arguments: dict[str, Any] = {}
    """Further arguments of the function."""
    files: list[Annotated[str, Field(min_length=1)]] = []
    """Files that the function reads: an edit to one evaluates again."""
    regex: str | None = None
    """Whether this regular expression (Python's) is found in the answer; ^ and $ are its ends."""
    json_schema: dict[str, Any] | Annotated[str, Field(min_length=1)] | None = None
    """Whether the answer is JSON and valid under this JSON Schema, or the one in this file."""

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = [name for name in ("function", "regex", "json_schema") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"needs one of 'function', 'regex' and 'json_schema' (found {' and '.join(kinds) or 'none'})"
            )
        if kinds != ["function"] and (self.arguments or self.files):
            raise ValueError(f"'arguments' and 'files' are for 'function': leave them out beside '{kinds[0]}'")
        if self.function and self.name is None:
            self.name = self.function.rpartition(":")[2]
        if self.name is None:
            raise ValueError(f"'name' is missing: what the figure of this '{kinds[0]}' is called")
        return self

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value

    @field_validator("arguments", "json_schema")
    @classmethod
    def _is_json(cls, value):
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("must hold finite numbers only") from None
        return value


def _named_function(value):
    """``my_module:function`` alone is a metric, too."""
    return {"function": value} if isinstance(value, str) else value


class Harness(Section):
    """Tasks of EleutherAI's lm-eval, for the untouched model and the chosen run. Names are those of its own options."""

    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Names of tasks, groups or tags."""
    include_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder of your own tasks."""
    limit: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Rows of each task: the first so many, or this share of them. null: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in each prompt. null: as many as the task says."""
    batch_size: Annotated[int, Field(gt=0)] = 8


class Eval(Section):
    """How a model is evaluated, on which split."""

    task: Literal["labels", "tags", "text", "documents"]
    labels: list[str] | None = None
    """For task labels: all possible answers."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """For task tags: what separates them."""
    metric: str | None = None
    """Metric that ranks the runs. null: the task's default."""
    metrics: list[Annotated[OwnMetric, BeforeValidator(_named_function, json_schema_input_type=OwnMetric | str)]] = []
    """Figures of your own beside the task's: my_module:function, a regular expression or a JSON schema."""
    split: Literal["validation", "test"] = "validation"
    """Split that ranks the runs. With `test`, for data that can spare no rows for validation, the choice flatters the
    figure of the chosen run."""
    test: Literal["chosen", "tied", "all", "none"] = "chosen"
    """Runs that are then judged on the test split, beside the untouched model: the chosen one; also those that cannot
    be told from the best; all; none."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    max_new_tokens: Annotated[int, Field(gt=0, le=100_000)] = 64
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples: Annotated[int, Field(ge=0)] = 20
    """Number of rows shown side by side in the report."""
    published: list[Published] = []
    suspects: Annotated[int, Field(ge=0)] = 50
    """Rows to list as suspicious, likely mislabelled ones: of training and validation those that the chosen run trusts
    the least. 0: none. Task documents has none."""
    gate: Gate | None = None
    """Bounds that the chosen run must keep, else the command ends with exit code 1."""
    harness: Harness | None = None
    """Tasks of lm-eval, which is installed by itself."""

    @model_validator(mode="after")
    def _settings_belong_to_their_task(self):
        if self.task == "labels" and (not self.labels or len(self.labels) < 2):
            raise ValueError("task 'labels' needs the list 'labels' with at least two of them")
        if self.task != "labels" and self.labels is not None:
            raise ValueError(f"'labels' is for task 'labels'; '{self.task}' reads none: leave it out (~eval.labels)")
        if self.task != "tags" and self.separator != ",":
            raise ValueError(f"'separator' is for task 'tags'; '{self.task}' has none: leave it out (~eval.separator)")
        if self.task == "documents":
            self._refuse_answers()
        return self

    def _refuse_answers(self) -> None:
        """Documents are scored, and no answers are asked for."""
        for name in ("metrics", "max_new_tokens", "do_sample"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is for answers, and task 'documents' asks for none: leave it out")

    _drawing = model_validator(mode="after")(_drawing_is_for_samples)


MLFLOW_NAME = 256  # characters that MLflow stores of a name


def _not_blank(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be blank")
    return name


def _model_name_of_mlflow(name: str) -> str:
    if re.search("[/:]", name) or name in (".", "..") or name.startswith("..") or not name.strip():
        raise ValueError("MLflow takes no such name for a model: write one without / and :, not blank and not . or ..")
    return name


class Tracking(Section):
    """MLflow, and what is beside it. Not part of any key: tracking shows results and never changes them."""

    enabled: bool = True
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None
    """null: SQLite at results/mlflow.db. env: each job reads the variable MLFLOW_TRACKING_URI; it is never stored."""
    experiment_name: Annotated[str, Field(max_length=MLFLOW_NAME), AfterValidator(_not_blank)] = "temper"
    registered_model_name: (
        Annotated[str, Field(max_length=MLFLOW_NAME), AfterValidator(_model_name_of_mlflow)] | None
    ) = None
    """Name of the best run's model in the registry. null: the data set's name."""
    flush_seconds: Annotated[float, Field(gt=0)] = 5.0
    system_metrics: bool = False
    """While a training runs, send how busy its whole machine is (processors, memory, disk, network, GPUs) with each
    flush. GPUs need the package nvidia-ml-py."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Also write curves and figures for these: results/tensorboard/, and results/wandb/ for `wandb sync`."""
    energy: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = None
    """Estimate the energy of trainings by the package codecarbon, and its CO2 by the mix of this country, in three
    letters: DEU, FRA, USA."""


class Notify(Section):
    """A notice when a sweep ends. Part of no key."""

    command: Annotated[str, Field(min_length=1)] | None = None
    """Run by the shell when the sweep has ended, well or not: a line in $TEMPER_TEXT, `finished`, `failed` or
    `interrupted` in $TEMPER_STATUS, JSON on its input."""


class Keep(Section):
    """What is kept to continue from, when a training is complete. Part of no key."""

    checkpoints: Literal["last", "none"] = "last"
    """Of the states in results/.state: the last one of each training, from which a longer one continues; or none, so
    that a longer one starts at the beginning."""


class Sweep(Section):
    """Swept keys and their values, in Hydra's grammar: ``1e-4,3e-4``, ``range(1,4)`` or ``choice(a,b)``; for a strategy
    that draws also ``interval(0,0.1)``, ``int(interval(4,64))`` and ``tag(log, interval(1e-5,1e-2))``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    axes: dict[str, Any] = {}
    strategy: Literal["grid", "random", "halving", "tpe"] = "grid"
    """All combinations of the values; some that are drawn at random; successive halving, which trains all a little and
    the better ones on; or Optuna's TPE, which draws where those before were good (docs/search.md)."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of points that are drawn. The first 16 of 32 are those of 16, so a sweep can be extended. For strategy
    halving null takes all combinations."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Where points are drawn: draw others."""
    eta: Annotated[int, Field(ge=2, le=100)] = 2
    """With rungs: one of so many runs is trained on to the next rung."""
    rungs: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Where runs are ranked, and most of them end: epochs (train.num_train_epochs), or optimizer steps where
    train.max_steps is set. For strategy halving null takes the values of an axis of these, or else the config's one,
    divided by eta up to three times; for tpe null trains every point to its end."""
    points_per_round: Annotated[int, Field(ge=1)] = 4
    """For strategy tpe: points that are asked for at once, and run side by side. The first round has twice as many, and
    is drawn at random."""
    seeds: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How often each point is trained, with the seeds from `seed` on: repeats, which the comparison pools, and by whose
    mean a search goes on."""
    choose: Literal["best", "cheapest_of_tied"] = "best"
    """Which run is the sweep's choice: the best one, or of those that cannot be told from it the one whose training
    took the fewest operations."""

    @model_validator(mode="after")
    def _of_its_strategy(self):
        if self.strategy in ("random", "tpe") and self.n is None:
            raise ValueError(f"strategy '{self.strategy}' needs 'n', the number of points")
        for name, strategies in STRATEGIES_OF.items():
            if self.strategy not in strategies and getattr(self, name) != type(self).model_fields[name].default:
                of = " and ".join(f"'{one}'" for one in strategies)
                raise ValueError(f"'{name}' is for strategy {of}, and this is '{self.strategy}': leave it out")
        if self.strategy == "tpe" and self.rungs is None and self.eta != type(self).model_fields["eta"].default:
            raise ValueError("'eta' does nothing without 'rungs', where strategy 'tpe' gives runs up")
        if self.rungs and sorted({*self.rungs}) != self.rungs:
            raise ValueError("'rungs' must rise")
        return self


# Which strategies a key of `sweep` is for.
STRATEGIES_OF = {
    "n": ("random", "halving", "tpe"),
    "sampler_seed": ("random", "halving", "tpe"),
    "eta": ("halving", "tpe"),
    "rungs": ("halving", "tpe"),
    "points_per_round": ("tpe",),
}


Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Threads of one training or evaluation on a CPU. They decide how sums are split, and so the last bits of a result.
NumThreads = Annotated[int, Field(gt=0, le=1024)]
# Processes of one training, each on a device of its own. The batch of an optimizer step is theirs together.
NumProcesses = Annotated[int, Field(gt=0, le=64)]


class Config(Section):
    """The whole config of one run."""

    data: AnyData
    model: Model
    prompt: Prompt
    tokenize: Tokenize
    method: Method
    quantization: Quantization
    adapter: dict[str, Any]
    train: dict[str, Any]
    merge: Merge
    eval: Eval
    probe: Probe = Probe()
    tracking: Tracking
    keep: Keep = Keep()
    notify: Notify = Notify()
    sweep: Sweep
    seed: Seed
    num_threads: NumThreads = 1
    num_processes: NumProcesses = 1
