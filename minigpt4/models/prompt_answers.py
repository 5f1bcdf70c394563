"""Answers to prompts that are already formatted, one image each, through the interface of the newest release."""

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
    """The part of MiniGPTBase that answers batches of formatted prompts.

    A prompt is taken as it is and BOS is put in front of it: a prompt that begins with `<s>` has two.
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

        An answer does not depend on the rest of the batch. It ends at the end token or at one of `stop_words_ids`,
        ids or sequences of ids. Source of arguments and defaults: the newest release; `min_length` counts BOS. Raises
        ValueError unless there is one text per image, each with exactly one image slot.
        """
        # The penalty is passed as a processor: that of `generate` ignores as many leading ids as the prompt has padding,
        # and without input ids those are the first ones of the answer.
        from transformers import RepetitionPenaltyLogitsProcessor

        embeds, mask = self.prompt_embeds(images, texts)
        # a stop of one id ends an answer like the end token; a longer one is compared with the last ids of the answer
        stops = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_words_ids]
        end_ids = {self.llama_tokenizer.eos_token_id}
        end_ids |= {stop[0] for stop in stops if len(stop) == 1}
        sampling = {"temperature": float(temperature), "top_p": float(top_p)} if do_sample else {}
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
                eos_token_id=sorted(end_ids),
                pad_token_id=self.llama_tokenizer.eos_token_id,
                stopping_criteria=[lambda ids, scores, **options: _end_with(ids, stops)],
                **sampling,
            )
        return [self._answer_text(ids) for ids in answers.tolist()]

    def prompt_embeds(
        self, images: torch.Tensor, texts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (embeddings [B, L, D], attention mask [B, L]) of prompts with their images, padded on the left.

        The padding is on the left so that a new token directly follows its prompt; it is zeros in both.
        """
        _check(images, texts)
        vectors, embedding = self.encode_images(images), self.llama_model.get_input_embeddings()
        prompts = []
        for text, image_vectors in zip(texts, vectors, strict=True):
            ids = context_ids(prompt_segments(text), self.encoder, [len(image_vectors)])
            prompts.append(embed(embedding, ids, image_vectors))
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        mask = [[0] * count + [1] * (longest - count) for count in padding]
        embeds = [
            F.pad(prompt, (0, 0, count, 0)) for prompt, count in zip(prompts, padding, strict=True)
        ]
        return torch.stack(embeds), torch.tensor(mask, device=vectors.device)

    @torch.no_grad()
    def multi_select(
        self,
        images: torch.Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        num_cand: Sequence[int] | None = None,
        score: str = "sum",
    ) -> list[list[int]]:
        """Return the indices of each prompt's candidates, the most likely first.

        `answers[k][i]` is candidate k of prompt i. Only the first `num_cand[i]` candidates of prompt i count, the
        others come last. `score`: see `candidate_losses`. Unlike those of `generate`, prompts are instructions as in
        training: with `model.chat_template` they are put into the prompt template.
        """
        losses = self.candidate_losses(images, texts, answers, score)
        if num_cand is not None:
            is_filler = torch.arange(losses.shape[1]) >= torch.as_tensor(num_cand)[:, None]
            losses = losses.masked_fill(is_filler, torch.inf)
        return losses.argsort(stable=True).tolist()

    @torch.no_grad()
    def candidate_losses(
        self,
        images: torch.Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
        score: str = "sum",
    ) -> torch.Tensor:
        """Return the losses [B, K] of the candidates `answers[k][i]`: the sum over an answer's tokens, or their mean.

        A loss does not depend on the rest of the batch. Raises ValueError for arguments that do not fit together.
        """
        _check(images, texts)
        if score not in SCORES:
            raise ValueError(f"score: {score!r}; expected one of {', '.join(SCORES)}")
        if not len(answers):
            raise ValueError("answers: empty; expected at least one list of candidates")
        vectors, columns = self.encode_images(images), []
        for candidates in answers:
            if len(candidates) != len(texts):
                raise ValueError(
                    f"answers: {len(candidates)} in one list; expected one for each of {len(texts)} prompts"
                )
            rows = self.rows({"image": images, "instruction_input": texts, "answer": candidates})
            found = self.row_losses(rows, vectors)
            losses = found["loss"]
            columns.append(losses / found["num_targets"] if score == "mean" else losses)
        return torch.stack(columns, 1).float().cpu()

    def _answer_text(self, ids: list[int]) -> str:
        """Return the text of an answer up to the end token; of one that repeats the prompt, what follows [/INST]."""
        eos, special = self.llama_tokenizer.eos_token_id, set(self.encoder.special_ids.values())
        ids = ids[: ids.index(eos)] if eos in ids else ids
        plain_ids = [index for index in ids if index not in special]
        text = self.llama_tokenizer.decode(plain_ids, clean_up_tokenization_spaces=False)
        return text.rpartition("[/INST]")[2].strip()


def _end_with(ids: torch.Tensor, stops: Sequence[list[int]]) -> torch.Tensor:
    """Return which rows of token ids [B, T] end with one of `stops`, as bool [B]."""

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
        count = prompt_segments(text).count(IMAGE)
        if count != 1:
            raise ValueError(
                f"texts[{number}]: {text!r:.200} has {count} {IMAGE_SLOT}; expected exactly one"
            )
