"""What the page asks and what it is told, as the OpenAPI document shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

__all__ = [
    "Answers", "Apply", "Ask", "BundleFacts", "ChangeRow", "Classified", "Classify", "Compare", "Edit", "Exit", "Items",
    "Job", "LedgerLine", "MeasuredFact", "Method", "ModelFacts", "Open", "OpenBundle", "Page", "Point", "Progress",
    "Recommend", "Said", "Saved", "SettingField", "SlimFacts", "State", "Table", "Title", "Undo",
]  # fmt: skip

# ---------------------------------------------------------------- what is asked


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


Word = Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Name = Annotated[StrictStr | None, Field(max_length=100, description="Of the new folder; default: made up.")]


class Open(_Body):
    """A model to work on."""

    model: Annotated[StrictStr, Field(description="One of /api/models.")]


class Ask(_Body):
    """A text to continue."""

    text: Annotated[StrictStr, Field(max_length=20_000)]
    change: Annotated[StrictStr | None, Field(description="A saved change: answers before and after it.")] = None
    n_tokens: Annotated[StrictInt, Field(ge=1, le=256, description="New tokens.")] = 16


class Edit(_Body):
    """Facts that are to become true: one by its parts, or several as JSON or JSON Lines."""

    prompt: Annotated[StrictStr | None, Field(description="With {} for the subject, or filled.")] = None
    subject: StrictStr = ""
    target: Annotated[StrictStr | None, Field(description="The new answer.")] = None
    truth: Annotated[StrictStr | None, Field(description="The old answer, if it is known.")] = None
    facts: Annotated[StrictStr | None, Field(description="Instead of these: facts, as a file would hold them.")] = None
    method: StrictStr = "rome"
    settings: Annotated[dict[Word, StrictStr], Field(description="The method's, as its flags take them.")] = {}
    max_harm: Annotated[
        StrictFloat | None, Field(gt=0, lt=1, description="Largest certified harm; none: no proof.")
    ] = None
    confidence: Annotated[StrictFloat, Field(gt=0, lt=1, description="Of the certificate.")] = 0.95


class Apply(_Body):
    """A saved change that a new model is to carry."""

    change: StrictStr
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Field(description="Type of the stored weights; default: as they came."),
    ] = None
    name: Name = None


class Undo(_Body):
    """A change, or one fact of it, that a new model is to carry no more."""

    number: StrictInt
    fact: Annotated[StrictInt | None, Field(description="Only this fact, counted from 0.")] = None
    name: Name = None


Line = Annotated[StrictStr, Field(max_length=20_000)]


class Classify(_Body):
    """Texts, or pairs of texts, for a slim model."""

    slim: Annotated[StrictStr, Field(description="One of /api/slims.")]
    texts: Annotated[list[Line], Field(min_length=1, max_length=256)]
    second: Annotated[list[Line], Field(max_length=256, description="The second texts of pairs, in their order.")] = []
    threshold: Annotated[
        StrictFloat | None, Field(ge=0, le=2, description="Leave where less unsure; default: the model's own.")
    ] = None


class OpenBundle(_Body):
    """A recommender to ask."""

    bundle: Annotated[StrictStr, Field(description="One of /api/bundles.")]
    llm: Annotated[
        StrictStr | None, Field(description="One of /api/models, asked about each history; none: no model is.")
    ] = None


class Recommend(_Body):
    """A history, for the recommender that is open."""

    history: Annotated[
        list[Annotated[StrictStr, Field(max_length=1000)]],
        Field(min_length=1, max_length=1000, description="Titles or ids, oldest first."),
    ]
    k: Annotated[StrictInt, Field(ge=1, le=100, description="How many items.")] = 10
    explain: Annotated[StrictBool, Field(description="With reasons, for the first items.")] = True


class Compare(_Body):
    """Adapters of one base, to be measured against each other."""

    model: Annotated[StrictStr, Field(description="Their base: one of /api/models.")]
    adapters: Annotated[list[StrictStr], Field(min_length=2, max_length=64, description="Of /api/adapters.")]
    base_unverified: Annotated[StrictBool, Field(description="Take those that do not say their base.")] = False
    targets_from_tensors: Annotated[
        StrictBool, Field(description="Take those whose configuration names targets by a pattern.")
    ] = False


# ---------------------------------------------------------------- what is answered


class LedgerLine(BaseModel):
    """A change that the model carries or carried."""

    number: int
    id: str
    method: str
    facts: str
    prompts: list[str]
    status: str
    active: bool
    when: str
    certified: list[str]


class ModelFacts(BaseModel):
    """The model at hand, in numbers, and its ledger."""

    name: str
    family: str
    base: str
    numbers: dict[str, str]
    changes: list[LedgerLine]


class Answers(BaseModel):
    """How a model continues a text: ``answer``, or ``before`` and ``after`` a change."""

    text: str
    said: dict[str, str]


class SettingField(BaseModel):
    """A field of a form."""

    name: str
    type: str
    default: str
    doc: str
    allowed: str
    choices: list[str]


class Method(BaseModel):
    """A method and its settings."""

    name: str
    summary: str
    source: str
    settings: list[SettingField]


class MeasuredFact(BaseModel):
    """A fact of a change, with the probability of the new answer if it was measured."""

    prompt: str
    target: str | None
    truth: str | None
    before: float | None = None
    after: float | None = None


class ChangeRow(BaseModel):
    """A saved change. In a list its weights are left out; one that cannot be read has only an error."""

    path: str
    id: str = ""
    method: str = ""
    kib: int = 0
    facts: list[MeasuredFact] = []
    certified: list[str] = []
    settings: dict[str, Any] = {}
    weights: dict[str, dict[str, float]] = {}
    error: str = ""


class Page(BaseModel):
    """A report that was written as a page."""

    path: str
    url: str


class Table(BaseModel):
    """A table of a report."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float | None]]
    caption: str = ""


class Point(BaseModel):
    """A threshold of a slim model, as it was measured when the model was made."""

    threshold: float
    quality: float
    flops_ratio: float
    exit_layer: float
    certified: bool


class SlimFacts(BaseModel):
    """A saved slim model, in numbers."""

    path: str
    task: str
    labels: list[str] | None
    pairs: bool | None
    metric: str
    quality_base: float
    numbers: dict[str, str]
    threshold: Annotated[float, Field(description="The saved one; 0: nobody leaves early.")]
    curve: list[Point]
    exits: Table
    says: Annotated[list[str], Field(description="What is proved, and what is lacking.")]


class Exit(BaseModel):
    """What one exit says of a text; ``score`` is a probability, or a regression's value."""

    block: int
    label: str | None
    score: float
    unsure: Annotated[float | None, Field(description="0: sure, 1: not at all; none where it is not asked.")]


class Said(BaseModel):
    """The answer to one text."""

    text: str
    second: str | None = None
    label: str | None
    score: float
    exit_block: int
    flops: Annotated[float, Field(description="Spent, as a share of what the original spends.")]
    exits: Annotated[list[Exit], Field(description="What every exit says, were it asked.")]


class Classified(BaseModel):
    """The answers to some texts."""

    threshold: float
    said: list[Said]


class BundleFacts(BaseModel):
    """The recommender at hand: what is proved of it, and whether its codes are sound."""

    path: str
    serves: str
    numbers: dict[str, str]
    says: list[str]
    tables: list[Table]


class Title(BaseModel):
    """An item that can be taken."""

    id: str
    title: str


class Items(BaseModel):
    """What is recommended, as ``retouch recommend for --json`` tells it, and the history that was read."""

    history: list[Title]
    codes: Annotated[list[str], Field(description="The groups that the history's instruction codes name.")]
    answer: dict[str, Any]


class Saved(BaseModel):
    """What a piece of work left behind."""

    change: Annotated[str, Field(description="A saved change, below the folder.")] = ""
    model: Annotated[str, Field(description="A saved model, below the folder, or the one that was opened.")] = ""
    facts: list[MeasuredFact] = []
    says: Annotated[list[str], Field(description="What was proved and done, in sentences.")] = []
    notes: Annotated[list[str], Field(description="What to be careful about.")] = []
    items: Annotated[Items | None, Field(description="What is recommended.")] = None
    report: Annotated[dict[str, Any] | None, Field(description="A report, as --json writes it.")] = None


class Progress(BaseModel):
    """How far a part of the work is."""

    what: str
    done: float
    total: float | None
    left_s: float | None


class Job(BaseModel):
    """A piece of long work."""

    number: int
    what: str
    state: Literal["running", "done", "failed", "refused", "stopped"]
    seconds: float
    progress: list[Progress]
    warnings: list[str]
    result: Saved | None = None
    error: str = ""
    status: Annotated[int, Field(description="200, or that of the error: 409 refused, 422 asked wrongly, 500.")] = 200


class State(BaseModel):
    """What is at hand."""

    version: str
    folder: str
    model: ModelFacts | None
    job: Job | None
