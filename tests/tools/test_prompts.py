"""Prompts end in their letter, and each of their words is one token."""

import torch

from diffquant import zoo
from diffquant.zoo.prompts import LETTERS, labels_of
from tools.train_zoo.prompts import DEFAULT_PROMPTS, PROMPT_TOKENS, WORDS, prompt_of, tokenize, tokenizer


def test_prompts_end_in_the_letter_that_they_ask_for():
    assert prompt_of("bold italic serif", 6) == "bold italic serif letter G"
    assert prompt_of("", 0) == "letter A"
    assert labels_of([prompt_of("bold", label) for label in range(26)]).tolist() == list(range(26))


def test_default_prompts_go_through_the_letters():
    assert len(set(DEFAULT_PROMPTS)) == 6 * 26 and DEFAULT_PROMPTS[:2] == ("letter A", "bold sans letter B")
    assert labels_of(DEFAULT_PROMPTS).tolist() == list(range(26)) * 6


def test_the_shipped_tokenizer_is_this_one():
    shipped, made = zoo.load("glyph-sd").tokenizer, tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    assert torch.equal(tokenize(shipped, [*DEFAULT_PROMPTS, ""]), tokenize(made, [*DEFAULT_PROMPTS, ""]))


def test_every_word_and_letter_is_one_token():
    words = tokenizer()
    ids = [words(word).input_ids for word in (*WORDS, *LETTERS)]
    assert all(len(row) == 3 for row in ids)  # start, the word, end
    assert len({row[1] for row in ids}) == len(WORDS) + len(LETTERS)


def test_tokens_round_trip_and_survive_saving(tmp_path):
    words = tokenizer()
    longest = "bold condensed italic serif letter G"
    assert words.decode(words(longest).input_ids, skip_special_tokens=True).strip() == longest.lower()
    words.save_pretrained(tmp_path)
    assert torch.equal(tokenize(type(words).from_pretrained(tmp_path), [longest, ""]), tokenize(words, [longest, ""]))
    assert tokenize(words, ["letter G"]).shape == (1, PROMPT_TOKENS)
