"""Texts to tokens and back: prompts, chats, answers, and the tokens that end an answer."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.jobs.model_folder import context_of
from workers.policy.chat import Chat, Messages
from workers.policy.errors import PolicyFailed, Subject
from workers.rollout.engine import BROKEN

NO_LIMIT = 1 << 20  # tokens of context, for a model that names none
LOADED_BY = ("is_local", "local_files_only")  # how a tokenizer was loaded; transformers would save this with it
STUCK = 8  # tokens in which no character comes to its end: these bytes are none
SEAMS = "\n", ":", "a"  # texts whose tokens usually stay the same when another text follows


class Unfolding:
    """The text of tokens that grow in number, in parts: whole characters only, each once."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self.length = 0  # characters told so far
        # Tokens before these two are not decoded again: some look different at the beginning of a text, so that a new window
        # begins where the last part but one ended. `_told` counts characters of the window.
        self._window = self._end = self._told = 0

    def part(self, tokens: list[int]) -> str:
        """What came since the last part; `tokens` are all of the answer's until now."""
        whole = self._decode(tokens[self._window :])
        stuck = len(tokens) - self._end > STUCK
        certain = whole if stuck else whole.rstrip(BROKEN)
        new = certain[self._told :]
        self._told += len(new)
        self.length += len(new)
        if certain == whole and len(tokens) > self._end:
            self._window, self._end = self._end, len(tokens)
            self._told = len(self._decode(tokens[self._window :]))
        return new


def ends_of(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """How many characters of the tokens' text are whole after each of them; after the last that shows anything, all."""
    pieces = {token: decode([token]) for token in set(tokens)}
    whole = decode(list(tokens))
    if BROKEN not in whole and "".join(pieces[token] for token in tokens) == whole:
        return list(accumulate(len(pieces[token]) for token in tokens))
    unfolding, grown, ends = Unfolding(decode), list[int](), list[int]()
    for token in tokens:
        grown.append(token)
        part, piece = unfolding.part(grown), pieces[token]
        if ends and part.startswith(BROKEN) and piece and not piece.startswith(BROKEN) and part.endswith(piece):
            ends[-1] = min(unfolding.length - len(piece), len(whole))  # the bytes before this token are no character
        ends.append(min(unfolding.length, len(whole)))
    last = max((place for place, token in enumerate(tokens) if pieces[token]), default=len(ends))
    return ends[:last] + [len(whole)] * (len(ends) - last)


class Text:
    """A tokenizer, plus what the model adds to it: further end tokens, the context length, the size of the vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.tokenizer: Any = tokenizer  # its annotations are too wide for the calls made here
        self.chat = Chat(tokenizer)
        embeddings: Any = model.get_input_embeddings()
        self.rows: int = embeddings.weight.shape[0]  # rows of the embedding: how many tokens the model knows
        declared = getattr(model.generation_config, "eos_token_id", None)
        more = declared if isinstance(declared, list) else [declared]
        added = self.tokenizer.added_tokens_decoder.items()
        self._special: dict[str, int] = {token.content: i for i, token in added if token.special}
        ends = (self.tokenizer.eos_token_id, *more, *self._turn_end[-1:])
        # Every token that ends an answer; the tokenizer's own comes first.
        self.eos_ids: list[int] = list(dict.fromkeys(i for i in ends if i is not None))
        named = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, self.tokenizer.unk_token_id
        self.frame = frozenset([*self.eos_ids, *(i for i in named if i is not None)])  # tokens that `decode` leaves out
        self.pad_id: int = next((i for i in (self.tokenizer.pad_token_id, *self.eos_ids) if i is not None), 0)
        context = context_of(model.config.get_text_config().to_dict())
        self.context = min(self.tokenizer.model_max_length, NO_LIMIT) if context is None else context

    def encode(self, prompt: str | Messages, **options: Any) -> list[int]:
        """The tokens of a text as it is (with the tokenizer's prefix, if it has one), or of messages in the chat template.

        `options` are passed to the template: `tools`, and its own variables. Raises PolicyFailed.
        """
        if not isinstance(prompt, str):
            return self._known(self._plain(self.chat.prompt(prompt, **options)))
        ids = self.tokenizer(prompt)["input_ids"]
        if ids[:2] == [self.tokenizer.bos_token_id] * 2 and prompt.startswith(self.tokenizer.bos_token):
            ids = ids[1:]  # a rendered chat already begins with this token
        if ids and ids[-1] in self.eos_ids and self._plain(prompt)[-1:] != ids[-1:]:
            ids = ids[:-1]  # some tokenizers end every text, but a prompt is to be continued
        return self._known(ids)

    def cut(self, prompt: list[int], most: int) -> list[int]:
        """The prompt without its oldest tokens, so that `most` are left; a begin-of-sequence token at the front is kept. The
        prompt itself if it fits, or if nothing of it would be left."""
        begin = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        left = most - len(begin)
        return prompt if len(prompt) <= most or left < 1 else [*begin, *prompt[-left:]]

    def encode_answer(self, text: str, *, in_chat: bool = False) -> list[int]:
        """The tokens of an answer after a prompt, ended by the end-of-sequence token or the template's end of turn. Nothing is
        added to an answer that already has an end token."""
        return self._known(self._ended(self._continuation(text), self._turn_end if in_chat else []))

    def encode_turn(self, messages: Messages, **options: Any) -> tuple[list[int], list[int]]:
        """The tokens of the last message's prompt, and those of the message, an assistant's turn, with its end.

        The prompt is the same as `encode` of the messages before, if the template renders these the same.
        """
        turn = self.chat.turn(messages, **options)
        answer = self._continuation(turn.answer)
        if turn.closed or not answer or answer[-1] not in self._special.values():
            answer = self._ended(answer, self._turn_end)
        return self._known(self._plain(turn.prompt)), self._known(answer)

    @cached_property
    def _turn_end(self) -> list[int]:
        """The tokens with which the template ends an assistant's turn, up to the first special one, or to the tokenizer's end
        token if it follows with nothing but marks between; empty if there is none."""
        ids = self._plain(self.chat.ending) if self.tokenizer.chat_template else []
        first = next((place for place, token in enumerate(ids) if token in self._special.values()), None)
        if first is None:
            return []
        marks = list(takewhile(lambda token: token in self._special.values(), ids[first:]))
        eos = self.tokenizer.eos_token_id
        return ids[: first + (marks.index(eos) if eos in marks else 0) + 1]

    def _ended(self, ids: list[int], end: list[int]) -> list[int]:
        if ids and ids[-1] in self.eos_ids:
            return ids
        if not end and not self.eos_ids:
            raise PolicyFailed(
                "no_eos_token",
                "the model's tokenizer has no end-of-sequence token to close an answer with",
                hint="use another model, or give its tokenizer one",
                subject=Subject.SOURCE,
            )
        return [*ids, *(end or self.eos_ids[:1])]

    def stop_ids(self, stop: Iterable[str]) -> list[int]:
        """The ids of the stop texts that are special tokens, and of tokens that no text shows and a stop text begins with:
        `decode` leaves these out, so the text would never hold it."""
        whole = [self._special[text] for text in stop if text in self._special]
        hidden = [self._special[content] for text in stop for content in self._hidden if text.startswith(content)]
        return list(dict.fromkeys([*whole, *hidden]))

    def shows(self, texts: Iterable[str]) -> bool:
        """Whether `decode` shows all of these texts: none holds a token that it leaves out."""
        return not any(content in text for text in texts for content in self._hidden)

    @property
    def _hidden(self) -> list[str]:
        return [content for content, token in self._special.items() if token in self.frame]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files. They do not depend on where the tokenizer was loaded from."""
        for name in LOADED_BY:
            self.tokenizer.init_kwargs.pop(name, None)
        self.tokenizer.save_pretrained(str(folder))

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens. Special tokens that only frame a text (begin, end, padding, unknown) are left out; those that
        mark thoughts and tool calls stay."""
        return self.decode_all([tokens])[0]

    def show(self, tokens: list[int]) -> str:
        """The text of a prompt as the model reads it, with every special token."""
        return self.show_all([tokens])[0]

    def show_all(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_all(self, rows: list[list[int]]) -> list[str]:
        return self.show_all([[token for token in row if token not in self.frame] for row in rows])

    def pieces(self, tokens: Iterable[int]) -> dict[int, str]:
        """The text of each token alone, special ones too, with the space that it may begin with."""
        ids, start = sorted(set(tokens)), self._plain("a")
        shown = self.tokenizer.batch_decode(
            [start, *([*start, token] for token in ids)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return {token: text[len(shown[0]) :] for token, text in zip(ids, shown[1:], strict=True)}

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows another, without the space that SentencePiece puts before a text."""
        if not self._adds_a_space:
            return self._plain(text)
        for before in SEAMS:
            start, whole = self._plain(before), self._plain(before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._plain(text)

    @cached_property
    def _adds_a_space(self) -> bool:
        start, whole = self._plain(SEAMS[0]), self._plain(SEAMS[0] + "x")
        return whole[: len(start)] == start and whole[len(start) :] != self._plain("x")

    def _known(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.rows:
            raise PolicyFailed(
                "model_unsupported",
                f"the tokenizer made token {max(ids)}, and the model knows {self.rows} tokens",
                hint="the tokenizer does not belong to this model",
                subject=Subject.SOURCE,
            )
        return ids
