"""What may be asked in OpenAI's form. What would change the answer and is not offered is refused; what would not is ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from service.jobs.row_checks import what_is_no_chat
from service.sessions.body import Token
from service.spec.section import MOST_COUNTED, Section

MOST_CHOICES = 1024  # answers of one request, over all its prompts
MOST_TOP = 20  # likeliest tokens at each place

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Ignored = Annotated[Any, Field(description="has no effect")]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, Field(description="penalties are not offered: only 0 is taken")]


class StreamOptions(Section):
    include_usage: Annotated[bool | None, Field(description="a last chunk has the usage")] = None
    include_obfuscation: Ignored = None


class _Request(Section):
    """What both routes take. null stands for the default."""

    model: Annotated[
        str, Field(min_length=1, max_length=500, description="ckpt_..., job_... (its newest checkpoint) or a base such as tiny")
    ]
    n: Annotated[int | None, Field(ge=1, le=128, description="answers to each prompt")] = None
    temperature: Annotated[float | None, Field(ge=0, le=10, description="0 is greedy; default 1")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, description="nucleus; default 1, which is off")] = None
    top_k: Annotated[
        int | None, Field(ge=0, le=MOST_COUNTED, description="the k likeliest tokens; default 0, which is off")
    ] = None
    stop: Annotated[
        Text | Annotated[list[Text], Field(max_length=16)] | None, Field(description="texts that end an answer, left out of it")
    ] = None
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="the same seed draws the same; default: another each time")
    ] = None
    stream: Annotated[bool | None, Field(description="server-sent events, as the answer grows")] = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=0)] | None,
        Field(description="is not offered: only {} and null are taken"),
    ] = None
    user: Ignored = None

    @model_validator(mode="after")
    def stream_options_go_with_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Request):
    """A prompt that the model continues, as it is."""

    prompt: Annotated[
        Text | Tokens | list[Text] | list[Tokens], Field(description="a text or tokens, or a list of these", max_length=None)
    ]
    max_tokens: Annotated[int | None, Field(ge=0, le=131_072, description="default 16; 0 only with echo")] = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP, description="of the tokens, and so many of the likeliest")] = None
    echo: Annotated[bool | None, Field(description="the prompt stands before the answer, in logprobs too")] = None
    best_of: Annotated[int | None, Field(ge=1, le=128, description="must be n if it is given")] = None
    suffix: Annotated[
        Annotated[str, Field(max_length=0)] | None, Field(description="is not offered: only null and an empty text are taken")
    ] = None

    @model_validator(mode="after")
    def makes_sense(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt must not be empty")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is not offered: it must be n ({self.n or 1}) or be left out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1; 0 goes with echo only")
        if self.echo and self.stream:
            raise ValueError("echo does not go with stream")
        if len(self.prompts) * (self.n or 1) > MOST_CHOICES:
            raise ValueError(f"prompts times n may be {MOST_CHOICES} at most")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TextFormat(Section):
    type: Annotated[Literal["text"], Field(description="JSON and grammars are not offered")]


class ChatRequest(_Request):
    """Messages in the model's own chat template. If the last one is the assistant's, the answer goes on with it."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096, description="with role and content")]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=131_072, description="default: to the end of the context")] = (
        None
    )
    max_tokens: Annotated[int | None, Field(ge=1, le=131_072, description="the old name of max_completion_tokens")] = None
    logprobs: Annotated[bool | None, Field(description="of the answer's tokens")] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP, description="with logprobs: the likeliest at each place")] = (
        None
    )
    tools: Annotated[list[dict[str, Any]] | None, Field(max_length=512, description="shown to the chat template")] = None
    tool_choice: Annotated[
        Literal["none", "auto"] | None, Field(description="none: the template sees no tools; others are not offered")
    ] = None
    parallel_tool_calls: Annotated[Literal[True] | None, Field(description="false is not offered")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(description="the template's own variables")] = None
    response_format: Annotated[TextFormat | None, Field(description="only {type: text}")] = None
    modalities: Annotated[list[Literal["text"]] | None, Field(description="only text")] = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def makes_sense(self) -> Self:
        if (what := what_is_no_chat(self.messages)) is not None:
            raise ValueError(f"messages {what}")
        if len(self.messages) == 1 and self.messages[0]["role"] == "assistant":
            raise ValueError("messages are an answer to nothing: an assistant's turn needs a message before it")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs: true")
        return self
