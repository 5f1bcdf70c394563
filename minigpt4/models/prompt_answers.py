"""Answers to finished prompts, one image each, as scripts of the newest release ask for them."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from minigpt4.common.device import shared_generators
from minigpt4.models.llm.layouts import embed
from minigpt4.text.rows import context_ids
from minigpt4.text.segments import IMAGE, IMAGE_SLOT, prompt_segments

SCORES = ("sum", "mean")


class PromptAnswers:
    """The part of MiniGPTBase that answers, in batches, prompts that are ready for the LLM.

    A prompt stands as it is: what it begins with comes behind BOS, so that one with a `<s>` of its own has two.
    """

    @torch.no_grad()
    def generate(
        self,
        images: torch.Tensor,
        texts: Sequence[str],
        num_beams: int = 1,
        max_new_tokens: int = 20,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        do_sample: bool = False,
        stop_words_ids: Sequence[int | Sequence[int]] = (),
    ) -> list[str]:
        """Return the answer to each prompt of `texts` about its image of `images` [B, 3, S, S].

        Each is the same alone and in a batch. It ends with the end token, or with `stop_words_ids`: ids, or sequences
        of them. Source of arguments and defaults: the newest release; `min_length` counts BOS. Raises ValueError.
        """
        # `generate` skips as many tokens as are padded
        from transformers import RepetitionPenaltyLogitsProcessor

        embeds, mask = self.prompt_embeds(images, texts)
        # A stop of one id ends a row as the end token does; longer ones need the ids before it.
        stops = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_words_ids]
        ends = {self.llama_tokenizer.eos_token_id, *(stop[0] for stop in stops if len(stop) == 1)}
        drawing = {"temperature": float(temperature), "top_p": float(top_p)}
        with self.maybe_autocast(), shared_generators if do_sample else nullcontext():
            answers = self.llama_model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max(min_length - 1, 0),
                num_beams=num_beams,
                logits_processor=[RepetitionPenaltyLogitsProcessor(float(repetition_penalty))],
                length_penalty=float(length_penalty),
                do_sample=do_sample,
                eos_token_id=sorted(ends),
                pad_token_id=self.llama_tokenizer.eos_token_id,
                stopping_criteria=[lambda ids, scores, **options: _end_with(ids, stops)],
                **(drawing if do_sample else {}),
            )
        return [self._answer_text(ids) for ids in answers.tolist()]

    def prompt_embeds(
        self, images: torch.Tensor, texts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (embeddings [B, L, D], mask [B, L]) of prompts with their images, padded on the left with zeros."""
        _check(images, texts)
        vectors, embedding = self.encode_images(images), self.llama_model.get_input_embeddings()
        rows = []
        for text, own in zip(texts, vectors, strict=True):
            ids = context_ids(prompt_segments(text), self.encoder, [len(own)])
            rows.append(embed(embedding, ids, own))
        # Padded on the left: a new token stands beside the last one of its prompt.
        longest = max(map(len, rows))
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=vectors.device
        )
        return torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows]), mask

    @torch.no_grad()
    def multi_select(
        self,
        images: torch.Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        num_cand: Sequence[int] | None = None,
        score: str = "sum",
    ) -> list[list[int]]:
        """Return for each prompt the numbers of its candidates, the likeliest first.

        `answers[k][i]`: candidate k of prompt i; of those from `num_cand[i]` on none is one, they come last.
        `score`: see `candidate_losses`. Prompts are the instructions of training: with `chat_template` they are set
        into it.
        """
        losses = self.candidate_losses(images, texts, answers, score)
        if num_cand is not None:
            numbers = torch.arange(losses.shape[1])
            losses = losses.masked_fill(numbers >= torch.as_tensor(num_cand)[:, None], torch.inf)
        return losses.argsort(stable=True).tolist()

    @torch.no_grad()
    def candidate_losses(
        self,
        images: torch.Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        score: str = "sum",
    ) -> torch.Tensor:
        """Return the losses [B, K] of candidates `answers[k][i]`: the sum over an answer's tokens, or their mean.

        None depends on the other prompts of the batch. Raises ValueError.
        """
        _check(images, texts)
        if score not in SCORES:
            raise ValueError(f"score: {score!r}; expected one of {', '.join(SCORES)}")
        vectors, columns = self.encode_images(images), []
        for candidates in answers:
            if len(candidates) != len(texts):
                raise ValueError(
                    f"answers: {len(candidates)} in one list; expected one for each of {len(texts)} prompts"
                )
            rows = self.rows({"image": images, "instruction_input": texts, "answer": candidates})
            found = self.row_losses(rows, vectors)
            columns.append(
                found["loss"] / found["num_targets"] if score == "mean" else found["loss"]
            )
        return torch.stack(columns, 1).float().cpu()

    def _answer_text(self, ids: list[int]) -> str:
        """Return the text of an answer: up to the end token, behind a prompt's end, should it be repeated."""
        eos, special = self.llama_tokenizer.eos_token_id, set(self.encoder.special_ids.values())
        ids = ids[: ids.index(eos)] if eos in ids else ids
        plain = [index for index in ids if index not in special]
        text = self.llama_tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        return text.rpartition("[/INST]")[2].strip()


def _end_with(ids: torch.Tensor, stops: Sequence[list[int]]) -> torch.Tensor:
    """Return which rows of ids [B, T] end with one of `stops`, as bool [B]."""

    def ends(row: list[int]) -> bool:
        return any(row[-len(stop) :] == stop for stop in stops)

    return torch.tensor(list(map(ends, ids.tolist())), device=ids.device)


def _check(images: torch.Tensor, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or len(images) != len(texts) or not len(texts):
        found = "a text" if isinstance(texts, str) else f"{len(texts)} texts"
        raise ValueError(
            f"{len(images)} images and {found}; expected a list of texts, one for each image"
        )
    for number, text in enumerate(texts):
        if (count := prompt_segments(text).count(IMAGE)) != 1:
            raise ValueError(
                f"texts[{number}]: {text!r:.200} has {count} {IMAGE_SLOT}; expected exactly one"
            )
