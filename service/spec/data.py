"""The data section of a spec: sources of rows, and how a row becomes a prompt."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.spec.section import MOST_COUNTED, Section
from service.spec.templates import Template

Shuffle = Annotated[bool, Field(description="shuffle the rows anew for each epoch; the order derives from the seed")]
RESERVED = frozenset(  # what transformers' apply_chat_template takes itself
    {
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "sanitize_control_tokens",
    }
)  # fmt: skip
MaxRows = Annotated[int | None, Field(ge=1, le=MOST_COUNTED, description="use at most this many rows")]


class DatasetSource(Section):
    """Rows of an uploaded dataset."""

    source: Literal["dataset"]
    id: Annotated[str, Field(pattern=r"^ds_[0-9a-z]+$", description="ds_...")]
    shuffle: Shuffle = True
    max_rows: MaxRows = None


class InlineSource(Section):
    """Rows that stand in the spec itself."""

    source: Literal["inline"]
    rows: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=10_000, description="the rows: objects with the same columns")
    ]
    shuffle: Shuffle = True
    max_rows: MaxRows = None


class ReasoningGymSource(Section):
    """Procedural tasks of the package reasoning-gym; columns: question, answer, metadata."""

    source: Literal["reasoning_gym"]
    task: Annotated[str, Field(description="name of a reasoning-gym dataset, for example basic_arithmetic")]
    config: Annotated[dict[str, Any], Field(description="the task's own settings")] = Field(default_factory=dict)
    size: Annotated[int, Field(ge=1, le=1_000_000, description="how many rows to make")] = 1000
    seed: Annotated[
        int,
        Field(ge=0, lt=2**64, description="row i is made from seed + i; eval needs a seed of at least train.seed + train.size"),
    ] = 0
    shuffle: Shuffle = False
    max_rows: MaxRows = None

    @field_validator("config")
    @classmethod
    def seed_and_size_stand_beside(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in ("seed", "size"):
            if name in value:
                raise ValueError(f"write `{name}` beside `config`, not inside it")
        return value


class SplitSource(Section):
    """Rows held out of the training source; they are never trained on."""

    source: Literal["split"]
    rows: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="how many rows are held out, drawn from the seed")]
    copies: Annotated[
        Literal["left_out", "kept"] | None,
        Field(
            description="training rows that are the same as a held-out one (the same line of an uploaded file; procedural rows "
            "are not compared) · left_out, the default: not trained on · kept: trained on, as versions before this field did"
        ),
    ] = None


TrainSource = Annotated[DatasetSource | InlineSource | ReasoningGymSource, Field(discriminator="source")]
EvalSource = Annotated[DatasetSource | InlineSource | ReasoningGymSource | SplitSource, Field(discriminator="source")]


class Message(Section):
    """One turn of a chat."""

    role: Annotated[Literal["system", "user", "assistant"], Field(description="who says this message")]
    content: Annotated[Template, Field(description="a template over the row's columns")]


class DataSpec(Section):
    """Where the rows come from and how they become prompts."""

    train: Annotated[TrainSource, Field(description="rows to learn from")]
    eval: Annotated[EvalSource | None, Field(description="held-out rows for evaluation; without them nothing is evaluated")] = (
        None
    )
    prompt: Annotated[Template | None, Field(description='a template over the row\'s columns, for example "{question}\\n"')] = (
        None
    )
    chat: Annotated[
        Annotated[list[Message], Field(max_length=1000)] | str | None,
        Field(description="messages for the model's chat template, or the name of a column that holds such a list"),
    ] = None
    answer: Annotated[
        Template | None,
        Field(
            description="the right answer: a supervised job learns it, and it is shown beside samples; "
            "default: the assistant's turn that a chat column ends with"
        ),
    ] = None
    learn: Annotated[
        Literal["last", "all"],
        Field(description="which assistant turns of a chat column a supervised job learns; only without `answer`"),
    ] = "last"
    overlong: Annotated[
        Literal["refuse", "skip", "truncate_left"],
        Field(
            description="rows that do not fit the context or rollout.max_prompt_tokens: the job fails at load, or leaves them "
            "out, or cuts the oldest tokens of their prompts"
        ),
    ] = "refuse"
    tools: Annotated[
        list[dict[str, Any]] | str | None,
        Field(description="tools for the chat template, as JSON schemas, or the name of a column that holds such a list"),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Field(description="further variables of the chat template, for example {enable_thinking: false}")
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def one_way_to_prompt(self) -> Self:
        if (self.prompt is None) == (self.chat is None):
            raise ValueError("give exactly one of `prompt` (a template) and `chat` (messages)")
        if self.chat is not None and len(self.chat) == 0:
            raise ValueError("chat is empty: give at least one message, or the name of a column")
        return self

    @model_validator(mode="after")
    def chats_have_what_is_said_of_them(self) -> Self:
        if self.chat is None and (self.tools is not None or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs are for the chat template: they need `chat`")
        if self.learn == "all" and (not isinstance(self.chat, str) or self.answer is not None):
            raise ValueError("learn: all needs `chat` to name a column of messages, and does not go with `answer`")
        if reserved := RESERVED & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs may not hold {min(reserved)!r}: the template gets it from elsewhere")
        return self
