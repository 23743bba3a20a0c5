"""Answers in OpenAI's form, whole and in chunks."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from service.openai import sampled
from service.openai.requests import ChatRequest, CompletionRequest
from service.openai.sampled import Choice, Sampled, Token

FinishReason = Literal["stop", "length"]
LEAST = -9999.0  # stands for a log-prob of minus infinity, which JSON lacks


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: Annotated[int, Field(description="all that were sampled: the token that ends an answer too")]
    total_tokens: int

    @classmethod
    def of(cls, usage: sampled.Usage) -> Self:
        return cls(**vars(usage), total_tokens=usage.prompt_tokens + usage.completion_tokens)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[Token], asked: int) -> Self:
        """`asked`: how many of the likeliest."""
        texts = [token.text for token in tokens]
        tops = [
            None if token.log_prob is None else dict(reversed(token.top)) | {token.text: token.log_prob} for token in tokens
        ]
        return cls(
            tokens=texts,
            token_logprobs=[token.log_prob for token in tokens],
            top_logprobs=tops if asked else None,
            text_offset=[token.start for token in tokens],
        )


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionAnswer(BaseModel):
    """What the model wrote behind each prompt."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: Annotated[list[int] | None, Field(description="null for a part of a character")]

    @classmethod
    def of(cls, text: str, log_prob: float | None) -> Self:
        return cls(token=text, logprob=LEAST if log_prob is None else log_prob, bytes=_bytes(text))


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[Token]) -> Self:
        return cls(
            content=[
                TokenLogprob(
                    **TopLogprob.of(token.text, token.log_prob).model_dump(),
                    top_logprobs=[TopLogprob.of(text, log_prob) for text, log_prob in token.top],
                )
                for token in tokens
            ]
        )


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """What the model answered. Calls of tools stand in the content, as the model wrote them."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Form:
    """Answers to one request in the form of its route. `of_operation`: its id; `created`: seconds since 1970."""

    def __init__(self, request: CompletionRequest | ChatRequest, of_operation: str, created: int, model: str) -> None:
        self._request, self._is_chat = request, isinstance(request, ChatRequest)
        self._head = {"id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{of_operation}", "created": created, "model": model}
        self._kind = {"object": "chat.completion.chunk" if self._is_chat else "text_completion"}
        self._with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)

    def whole(self, answer: Sampled) -> CompletionAnswer | ChatAnswer:
        usage = Usage.of(answer.usage)
        if isinstance(self._request, ChatRequest):
            chats = [
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=choice.text),
                    logprobs=ChatLogprobs.of(choice.tokens) if self._request.logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(answer.choices)
            ]
            return ChatAnswer(**self._head, choices=chats, usage=usage)
        texts = [
            CompletionChoice(
                index=index,
                text=choice.prompt + choice.text,
                logprobs=self._logprobs(choice.tokens),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(answer.choices)
        ]
        return CompletionAnswer(**self._head, choices=texts, usage=usage)

    # ---------------------------------------------------------------- chunks

    def begun(self, index: int) -> Iterator[dict[str, Any]]:
        """What stands before the first text of an answer."""
        if self._is_chat:
            yield self._chunk(index, {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None})

    def grown(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, self._said(text, None))

    def ended(self, index: int, choice: Choice, told: int) -> Iterator[dict[str, Any]]:
        """The rest of an answer, of which `told` characters were sent: token by token if log-probs were asked for."""
        for place, token in enumerate(choice.tokens, 1):
            end = token.end if place < len(choice.tokens) else len(choice.text)
            yield self._chunk(index, self._said(choice.text[token.start : end], [token]))
        if not choice.tokens and len(choice.text) > told:
            yield self.grown(index, choice.text[told:])
        last: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        yield self._chunk(index, {**last, "logprobs": None}, choice.finish_reason)

    def usage(self, usage: sampled.Usage) -> Iterator[dict[str, Any]]:
        if self._with_usage:
            yield {**self._head, **self._kind, "choices": [], "usage": Usage.of(usage).model_dump()}

    def _said(self, text: str, tokens: list[Token] | None) -> dict[str, Any]:
        if self._is_chat:
            logprobs: Any = None if tokens is None else ChatLogprobs.of(tokens).model_dump()
            return {"delta": {"content": text}, "logprobs": logprobs}
        logprobs = None if tokens is None else self._logprobs(tokens)
        return {"text": text, "logprobs": None if logprobs is None else logprobs.model_dump()}

    def _logprobs(self, tokens: list[Token]) -> CompletionLogprobs | None:
        assert isinstance(self._request, CompletionRequest)
        asked = self._request.logprobs
        return None if asked is None else CompletionLogprobs.of(tokens, asked)

    def _chunk(self, index: int, content: dict[str, Any], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        usage = {"usage": None} if self._with_usage else {}
        return {
            **self._head,
            **self._kind,
            "choices": [{"index": index, **content, "finish_reason": finish_reason}],
            **usage,
        }


def _bytes(text: str) -> list[int] | None:
    return None if sampled.BROKEN in text else list(text.encode())
