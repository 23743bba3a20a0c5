"""Between texts and tokens: prompts, chats, answers, and what ends them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.jobs.model_folder import context_of
from workers.policy.errors import PolicyFailed, Subject

MAX_SHOWN = 500  # characters of a template's own words
NO_LIMIT = 1 << 20  # tokens of context, for a model that names none
LOADED_BY = ("is_local", "local_files_only")  # how transformers came by a tokenizer, which it would write beside what it is


class Text:
    """A tokenizer together with what the model adds to it: further end tokens, the context, the size of the vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.tokenizer: Any = tokenizer  # its annotations allow for much that is not asked of it here
        embeddings: Any = model.get_input_embeddings()
        self.rows: int = embeddings.weight.shape[0]  # of the embedding: tokens that the model knows
        declared = getattr(model.generation_config, "eos_token_id", None)
        more = declared if isinstance(declared, list) else [declared]
        # Every token that ends an answer; the tokenizer's own comes first.
        self.eos_ids: list[int] = list(dict.fromkeys(i for i in (self.tokenizer.eos_token_id, *more) if i is not None))
        self.pad_id: int = next((i for i in (self.tokenizer.pad_token_id, *self.eos_ids) if i is not None), 0)
        context = context_of(model.config.get_text_config().to_dict())
        self.context = min(self.tokenizer.model_max_length, NO_LIMIT) if context is None else context

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """A text as it stands (with the tokenizer's own prefix, if it has one), or messages through the chat template."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            # Some tokenizers close every text; a prompt is to be continued.
            closed = ids and ids[-1] in self.eos_ids and not prompt.endswith(str(self.tokenizer.eos_token))
            return self._known(ids[:-1] if closed else ids)
        if not self.tokenizer.chat_template:
            raise PolicyFailed(
                "no_chat_template",
                "data.chat was given, and the model's tokenizer has no chat template",
                hint="use data.prompt, or an instruction-tuned model",
                subject=Subject.CHAT,
            )
        unfinished = prompt[-1]["role"] == "assistant"
        try:
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=not unfinished, continue_final_message=unfinished, return_dict=False
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything: its own words, or what it trips over
            raise PolicyFailed(
                "chat_refused",
                f"the model's chat template refuses the messages ({', '.join(str(turn['role']) for turn in prompt)}): "
                f"{str(error)[:MAX_SHOWN] or type(error).__name__}",
                hint="change data.chat to what the template takes, or use data.prompt",
                subject=Subject.CHAT,
            ) from error
        return self._known(ids)

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of an answer, with the end-of-sequence token after them."""
        if not self.eos_ids:
            raise PolicyFailed(
                "no_eos_token",
                "the model's tokenizer has no end-of-sequence token to close an answer with",
                hint="use another model, or give its tokenizer one",
                subject=Subject.SOURCE,
            )
        return [*self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"]), self.eos_ids[0]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, the same for the same tokenizer wherever it was loaded from."""
        for name in LOADED_BY:
            self.tokenizer.init_kwargs.pop(name, None)
        self.tokenizer.save_pretrained(str(folder))

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.decode_all([tokens])[0]

    def decode_all(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _known(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.rows:
            raise PolicyFailed(
                "model_unsupported",
                f"the tokenizer made token {max(ids)}, and the model knows {self.rows} tokens",
                hint="the tokenizer does not belong to this model",
                subject=Subject.SOURCE,
            )
        return ids
