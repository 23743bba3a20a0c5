"""An answer's text while it grows, and the text of its tokens alone."""

from random import Random

import pytest
from policy_chats import text_of, tokenizer

from workers.policy.text import Unfolding, ends_of

WHOLE = "Grüße, 世界! 👍🏽 ok"


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_whole_characters_and_make_the_text(load, seed: int) -> None:
    text = text_of(load, tokenizer())
    tokens, random = tokenizer()(WHOLE)["input_ids"], Random(seed)
    unfolding, told, count = Unfolding(text.decode), "", 0
    while count < len(tokens):
        count = min(len(tokens), count + random.randint(1, 4))
        assert unfolding.length == len(told)
        told += unfolding.part(tokens[:count])
        assert WHOLE.startswith(told)
    assert told == WHOLE


def test_bytes_of_no_character_are_told_once_one_follows(load) -> None:
    text = text_of(load, tokenizer())
    broken = tokenizer()("é")["input_ids"][:1]
    unfolding = Unfolding(text.decode)
    assert unfolding.part(broken * 3) == ""
    tokens = [*broken * 3, *tokenizer()("ab")["input_ids"]]
    assert unfolding.part(tokens) == text.decode(tokens)


def test_the_ends_of_tokens_count_whole_characters_of_the_text_that_is_shown(load) -> None:
    text = text_of(load, tokenizer())
    tokens = tokenizer()("a🙂<pad>!")["input_ids"]
    assert ends_of(tokens, text.decode) == [1, 1, 1, 1, 2, 2, 3]
    assert ends_of(tokens, text.show) == [1, 1, 1, 1, 2, 7, 8]


def test_an_end_token_behind_a_broken_character_is_behind_its_text(load) -> None:
    text = text_of(load, tokenizer())
    tokens = [*tokenizer()("a")["input_ids"], *tokenizer()("é")["input_ids"][:1], *tokenizer()("<pad>")["input_ids"]]
    assert (text.decode(tokens), ends_of(tokens, text.decode)) == ("a\ufffd", [1, 2, 2])


def test_bytes_that_are_no_character_stand_before_the_token_behind_them(load) -> None:
    text = text_of(load, tokenizer())
    first, *rest = tokenizer()("🙂")["input_ids"]
    tokens = [first, first, *tokenizer()("<|tool|>é")["input_ids"], first, rest[0], *tokenizer()("b")["input_ids"]]
    assert text.decode(tokens) == "\ufffd\ufffd<|tool|>é\ufffdb"
    assert ends_of(tokens, text.decode) == [0, 2, 10, 10, 11, 11, 12, 13]


@pytest.mark.parametrize("said", ["é", "a", "🙂a"])
def test_ends_take_time_in_proportion_to_the_tokens(load, said: str) -> None:
    """Bytes that are no character, too: they are not read again with each of those that follow."""
    text, read = text_of(load, tokenizer()), 0

    def decode(tokens: list[int]) -> str:
        nonlocal read
        read += len(tokens)
        return text.decode(tokens)

    tokens = tokenizer()(said)["input_ids"][:1] * 500
    assert ends_of(tokens, decode)[-1] == len(text.decode(tokens))
    assert read < 20 * len(tokens)


def test_pieces_have_the_text_of_each_token(load) -> None:
    tokens = tokenizer()(" a<|im_end|>")["input_ids"]
    pieces = text_of(load, tokenizer()).pieces(tokens)
    assert [pieces[token] for token in tokens] == [" ", "a", "<|im_end|>"]
