"""Prompts of ``glyph-sd``, such as "bold italic serif letter G", and the tokenizer that knows their words."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import CLIPTokenizer

from diffquant.zoo.prompts import LETTERS

WEIGHTS = ("thin", "light", "bold", "black")
WIDTHS = ("condensed", "expanded")
SLANTS = ("italic",)
FAMILIES = ("mono", "script", "sans", "serif")
WORDS = (*WEIGHTS, *WIDTHS, *SLANTS, *FAMILIES, "letter")
PROMPT_TOKENS = 16  # start, up to four words of style, "letter", the letter, and padding


def prompt_of(style: str, label: int) -> str:
    """The prompt for letter `label` in `style`: "bold letter G", or "letter G" where the style is empty."""
    return f"{style} letter {LETTERS[label]}".lstrip()


DEFAULT_STYLES = ("", "bold sans", "italic serif", "light", "bold italic serif", "serif")
DEFAULT_PROMPTS = tuple(prompt_of(DEFAULT_STYLES[(label + turn) % 6], label) for turn in range(6) for label in range(26))


def tokenizer() -> CLIPTokenizer:
    """A stock `CLIPTokenizer` with one token for each word and each letter; it spells other words, and brings `DEFAULT_PROMPTS`.

    Words grow from the left, one merge a character, so their beginnings are tokens as well. Longer words come first: a merge of
    a shorter one must not break them up.
    """
    characters = LETTERS.lower()
    merges: dict[tuple[str, str], None] = {}  # ordered, each once
    for word in sorted(WORDS, key=len, reverse=True):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for index in range(1, len(pieces)):
            merges["".join(pieces[:index]), pieces[index]] = None
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters), *map("".join, merges)]
    words = CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges=list(merges), model_max_length=PROMPT_TOKENS)
    words.init_kwargs["default_prompts"] = list(DEFAULT_PROMPTS)  # written with its files
    return words


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int[Tensor, "n 16"]:
    """Token ids as the pipeline makes them: padded to the model's length."""
    ids: Tensor = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids
