"""Preview of a sample as the LLM reads it, token by token, with what is learnt. Needs the tokenizer, but no weights."""

import logging
import random
import sys
from collections.abc import Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import NamedTuple

from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.prompts import read_prompts
from minigpt4.text.release_samples import TEXTS, from_release
from minigpt4.text.rows import IGNORED, IMAGE_ID, Row, batch_rows, end_problem
from minigpt4.text.sample_segments import TextSettings

# kinds of tokens; given: after the prompt, but not a target; cut: cut off, so neither read nor learnt
BEGIN = "begin"
PROMPT = "prompt"
IMAGE = "image"
TARGET = "target"
GIVEN = "given"
CUT = "cut"
KINDS = (BEGIN, PROMPT, IMAGE, TARGET, GIVEN, CUT)
_TEXT_KEYS = ("prompt_template", "end_sym", "mask_eos_labels", "chat_template", "max_context_len")


class Token(NamedTuple):
    """A token as shown: an image, or one or more ids that together spell whole characters.

    `kind`: one of KINDS. `size`: its number of positions. `is_special`: it is one special token of the tokenizer, such as
    <s> or <|im_end|>.
    """

    text: str
    kind: str
    size: int
    is_special: bool = False


class TextPreview:
    """Tokens of samples as a model of the section `model` reads them, made by the function that training calls.

    Raises ValueError or OSError if prompts cannot be read. Warns of an end symbol that would not be learnt.
    """

    def __init__(self, cfg: TextSettings, tokenizer, num_image_tokens: int):
        self.settings, self.tokenizer = cfg, tokenizer
        self.num_image_tokens = num_image_tokens
        self.prompts = read_prompts(cfg.prompt_path, cfg.prompt_template) if cfg.prompt_path else []
        self._encoder = PromptEncoder(tokenizer)
        if problem := end_problem(cfg, self._encoder):
            logging.warning(problem)
        self._special = set(tokenizer.all_special_ids)
        texts = {key: cfg[key] for key in _TEXT_KEYS}
        self._uncut = SimpleNamespace(**texts, max_txt_len=sys.maxsize)

    def lengths(self, samples: Sequence[dict]) -> list[tuple[int, int]]:
        """Return (number of tokens after the prompt, how many of them are cut off) of each sample."""
        rows = self._rows(samples, "", self.settings)
        return [(len(row.ids) - row.num_prompt + row.num_cut, row.num_cut) for row in rows]

    def tokens(self, sample: dict, seed: int | str) -> list[Token]:
        """Return the tokens of one sample; `seed` draws its prompt if the model has several."""
        prompt = random.Random(seed).choice(self.prompts) if self.prompts else ""
        (row,) = self._rows([sample], prompt, self.settings)
        (uncut,) = self._rows([sample], prompt, self._uncut)
        after = [GIVEN if label == IGNORED else TARGET for label in row.labels[row.num_prompt :]]
        kinds = [PROMPT] * row.num_prompt + after + [CUT] * row.num_cut
        if self.tokenizer.bos_token_id is not None:
            kinds[0] = BEGIN

        # BOS, images, prompt and the rest are decoded separately, as they were tokenised
        def section(index: int) -> tuple[bool, bool, bool]:
            return uncut.ids[index] == IMAGE_ID, kinds[index] == BEGIN, index < row.num_prompt

        tokens, size = [], self.num_image_tokens
        for (is_image, _, _), group in groupby(range(len(uncut.ids)), key=section):
            positions = list(group)
            if is_image:
                tokens += [Token(f"image: {size} tokens", IMAGE, size)] * (len(positions) // size)
            else:
                ids = [uncut.ids[position] for position in positions]
                tokens += self._spell(ids, [kinds[position] for position in positions])
        return tokens

    def _rows(self, samples: Sequence[dict], prompt: str, settings: TextSettings) -> list[Row]:
        """Return the rows of samples of any form, ours or the newest release's."""
        batch = {}
        for key in ("text_input", "turns", "instruction", *TEXTS):
            if any(key in sample for sample in samples):
                batch[key] = [sample.get(key, ()) for sample in samples]
        batch = from_release(batch) | {"num_images": list(map(_num_images, samples))}
        return batch_rows(batch, prompt, settings, self._encoder, self.num_image_tokens)

    def _spell(self, ids: list[int], kinds: list[str]) -> list[Token]:
        """Return the Tokens of ids; ids of one kind that only together make a character become one Token."""
        # what ids[start:end] add to the text of the Token before, from `context` on: alone, a token may lose its space
        tokens = []
        context = start = 0
        for end in range(1, len(ids) + 1):
            text = self._decoded(ids[context:end])
            is_incomplete = text.endswith("\N{REPLACEMENT CHARACTER}")
            if is_incomplete and end < len(ids) and kinds[end] == kinds[start]:
                continue
            before = self._decoded(ids[context:start]) if start > context else ""
            is_special = ids[end - 1] in self._special
            tokens.append(Token(text[len(before) :], kinds[start], end - start, is_special))
            # if the kind changes within a character, the rest is decoded by itself
            context, start = end if is_incomplete else start, end
        return tokens

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _num_images(sample: dict) -> int:
    if "images" in sample:
        return len(sample["images"])
    # a sample of text alone, which only the newest release has, has neither key
    return int("image" in sample or "text_input" in sample)
