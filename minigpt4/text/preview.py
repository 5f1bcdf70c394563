"""What the LLM reads and learns of a sample, token by token. It takes the tokenizer, no weights."""

import random
import sys
from types import SimpleNamespace
from typing import NamedTuple

from minigpt4.text.rows import IGNORED, batch_prompts, batch_rows, prompt_ids, read_prompts

BEGIN, PROMPT, PICTURE, TARGET, GIVEN, CUT = KINDS = ("begin", "prompt", "picture", "target", "given", "cut")


class Token(NamedTuple):
    """`kind`: one of KINDS; GIVEN is read behind the prompt but not learnt, CUT is neither, for lack of room.

    `size`: how many positions these are: those of an image, or ids that only together make a character.
    `is_special`: the tokenizer knows the text as one special token, such as <s> or <|im_end|>.
    """

    text: str
    kind: str
    size: int
    is_special: bool = False


class TextPreview:
    """What a model of the section `model` makes of the texts of samples, by the functions that training calls.

    Raises ValueError or OSError where tokenizer or prompts cannot be read.
    """

    def __init__(self, cfg, tokenizer):
        self.settings, self.tokenizer = cfg, tokenizer
        self.prompts = read_prompts(cfg.prompt_path, cfg.prompt_template) if cfg.prompt_path else []
        self._special = set(self.tokenizer.all_special_ids)
        texts = {key: cfg[key] for key in ("prompt_template", "end_sym", "mask_eos_labels")}
        self._uncut = SimpleNamespace(**texts, max_txt_len=sys.maxsize)

    def lengths(self, samples):
        """Return [(tokens behind the prompt, how many of them are cut off)] of a list of samples."""
        rows = batch_rows(_batch(samples), self.settings, self.tokenizer)
        return [(len(row.ids) + row.num_cut, row.num_cut) for row in rows]

    def tokens(self, sample, seed):
        """Return the list of Token of one sample; its prompt, where the model draws one, is drawn by `seed`."""
        batch = _batch([sample])
        drawn = random.Random(seed).choice(self.prompts) if self.prompts else ""
        (prompt,) = batch_prompts(batch, drawn, self.settings, self.tokenizer)
        before, after = prompt_ids(prompt, self.tokenizer)
        (row,) = batch_rows(batch, self.settings, self.tokenizer)
        (uncut,) = batch_rows(batch, self._uncut, self.tokenizer)
        kinds = [GIVEN if label == IGNORED else TARGET for label in row.labels] + [CUT] * row.num_cut
        begin = self.tokenizer.bos_token_id
        size = self.settings.num_query_token
        return [
            *self._spell([] if begin is None else [begin], [BEGIN]),
            *self._spell(before, [PROMPT] * len(before)),
            Token(f"image: {size} tokens", PICTURE, size),
            *self._spell(after, [PROMPT] * len(after)),
            *self._spell(uncut.ids, kinds),
        ]

    def _spell(self, ids, kinds):
        """Return the Tokens of ids; those that are parts of a character are held together, if of one kind."""
        tokens, first, start, before = [], 0, 0, ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)
            is_broken = text.endswith("\N{REPLACEMENT CHARACTER}")
            if is_broken and end < len(ids) and kinds[end] == kinds[start]:
                continue
            is_special = ids[end - 1] in self._special
            tokens.append(Token(text[len(before) :], kinds[start], end - start, is_special))
            start, before = end, text
            if is_broken:  # the limit runs through a character: what is behind it is spelt anew
                first, before = end, ""
        return tokens


def _batch(samples):
    """Return the texts of samples as the loader's batches have them."""
    keys = {key for sample in samples for key in ("text_input", "turns", "instruction") if key in sample}
    return {key: [sample.get(key, ()) for sample in samples] for key in keys}
