"""What every MiniGPT has: a frozen LLM, the projection into its embedding space, rows, loss, names of checkpoints.

A subclass adds the vision side: its parts in the constructor, `image_size`, and what stands under "the vision side".

Shapes: B samples, I images of the batch, S image size, Q vision vectors an image, H their width before the projection,
D LLM width, L positions of a row, N targets.
"""

import itertools
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from minigpt4.common.config import as_section
from minigpt4.common.cuda_graphs import Recorder
from minigpt4.common.device import send
from minigpt4.common.dist_utils import main_print
from minigpt4.common.startup import startup
from minigpt4.common.utils import resolve_file
from minigpt4.models import checkpoint_folder, trained_with, training_parts
from minigpt4.models.base_model import BaseModel, resolve_compute_dtype
from minigpt4.models.dry_run import DryRun
from minigpt4.models.language_side import LanguageSide
from minigpt4.models.llm import (
    backends,
    language_model,
    layouts,
    quantization,
    row_logits,
    sharding,
)
from minigpt4.models.mini_gpt4_config import MiniGPT4Config
from minigpt4.models.prompt_answers import PromptAnswers
from minigpt4.models.trained_weights import RELEASE_NAMES, TrainedWeights
from minigpt4.text.cutting import warn_of_cut
from minigpt4.text.prompts import read_prompts
from minigpt4.text.release_samples import from_release
from minigpt4.text.rows import Row, batch_rows, end_problem, faults_named, split_batch


class MiniGPTBase(DryRun, LanguageSide, TrainedWeights, PromptAnswers, BaseModel):
    """A vision side, `llama_proj` and an LLM. `from_config(cfg)` builds it; `forward` gives the loss of a batch."""

    Config = MiniGPT4Config

    def __init__(self, cfg: MiniGPT4Config, compute_dtype: torch.dtype):
        """Take the settings; a subclass makes the vision parts on the meta device: shapes, types, what is frozen."""
        super().__init__()
        self.compute_dtype = compute_dtype
        # text, see text.sample_segments.TextSettings
        self.prompt_list, self.prompt_template = [], cfg.prompt_template or ""
        self.max_txt_len, self.end_sym = cfg.max_txt_len, cfg.end_sym
        # what the checkpoint says, if it does
        self.trained_text = (self.prompt_template, cfg.end_sym)
        self.chat_template, self.max_context_len = cfg.chat_template, cfg.max_context_len
        self.mask_eos_labels, self.repetition_penalty = cfg.mask_eos_labels, cfg.repetition_penalty
        self.vision_identity = {}  # {key of a file that is frozen: trained_with.identity}; a subclass fills it
        # how the LLM is run, and what of it trains
        self.llm_checkpointing = cfg.llm_checkpointing or cfg.use_grad_checkpoint_llm
        self.lora_r, self.lora_alpha = cfg.lora_r, cfg.lora_alpha
        self.train_modes, self.projector = training_parts.modes(cfg), cfg.projector
        self.pack_sequences, self.may_compile = cfg.pack_sequences, cfg.compile
        self.llm_backend = (
            None  # one of backends.PACKED or "padded"; `forward` finds out which the LLM can take
        )
        self._llm_trained = False  # when llm_backend was chosen
        self.recorder = Recorder() if cfg.cuda_graphs else None
        self._num_forwards, self._encoder = itertools.count(), None

    # the vision side, a subclass's
    @property
    def num_image_tokens(self) -> int:
        """The number of vectors that an image becomes, Q."""
        raise NotImplementedError(f"{type(self).__name__}.num_image_tokens")

    @classmethod
    def image_tokens(cls, cfg: MiniGPT4Config) -> int:
        """Return what `num_image_tokens` will be for a `model` section; nothing is loaded."""
        raise NotImplementedError(f"{cls.__name__}.image_tokens")

    @property
    def vision_width(self) -> int:
        """The width of those vectors before the projection, H."""
        raise NotImplementedError(f"{type(self).__name__}.vision_width")

    def vision_composition(self) -> dict[str, str]:
        """Return the vision side's part of `composition`; {} says nothing."""
        return {}

    def load_vision(self, cfg: MiniGPT4Config, device: torch.device) -> None:
        """Fill the vision parts from their files; they will compute on `device`."""
        raise NotImplementedError(f"{type(self).__name__}.load_vision")

    def encode_images(self, image: torch.Tensor) -> torch.Tensor:
        """Return vectors [I, Q, D] of normalised images [I, 3, S, S]."""
        raise NotImplementedError(f"{type(self).__name__}.encode_images")

    @staticmethod
    def import_libraries() -> None:
        """Import what is otherwise imported where it is first needed."""
        from transformers import AutoModelForCausalLM  # noqa: F401

    def encode_img(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (`encode_images(image)`, all-ones mask [I, Q]). Source: the 2023 release's method of this name."""
        vectors = self.encode_images(image)
        return vectors, torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)

    # building

    @classmethod
    def from_config(
        cls, cfg: MiniGPT4Config, device: torch.device | str | None = None, shard_llm: bool = False
    ) -> "MiniGPTBase":
        """Return the model of a `model` section, weights loaded, on `device` (None: on the CPU, to be moved).

        `cfg`: that of a Config, or any mapping, whose absent keys take their defaults. `shard_llm`: called by all
        ranks, each holds a share of the LLM. Raises ValueError (CheckpointError, ConfigError) or OSError that names
        the configuration key of a file that does not fit.
        """
        cfg = as_section(cfg, cls.Config, "model")
        cls.settle(cfg)
        with startup.phase("imports"):
            cls.import_libraries()
        meant_for = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = cls(cfg, resolve_compute_dtype(cfg.llm_precision, meant_for))
        model.load_vision(cfg, meant_for)
        model.to(device or "cpu")
        is_quantised = quantization.kind_of(cfg.llm_quantization, cfg.low_resource) != "none"
        # quantised weights are packed for the device that computes with them
        shard = {"shard_llm": True} if shard_llm else {}  # own models may not know it
        model.load_language(
            cfg, meant_for if is_quantised else torch.device(device or "cpu"), **shard
        )
        if cfg.prompt_path:
            model.prompt_list = read_prompts(cfg.prompt_path, cfg.prompt_template)
            main_print(f"Load {len(model.prompt_list)} training prompts")
            main_print(f"Prompt Example \n{model.prompt_list[0]}")
        if cfg.ckpt:
            name = RELEASE_NAMES.get(cfg.arch, "BLIP2-LLM")
            main_print(f"Load {name} Checkpoint: {cfg.ckpt}")
            path = resolve_file(cfg.ckpt, "model.ckpt")
            saved = checkpoint_folder.compared(model.load_ckpt(path), path, cfg, model.identity())
            model.trained_text = trained_with.trained_text(saved) or model.trained_text
        return model.eval()

    def in_turns(self) -> AbstractContextManager:
        return sharding.in_turns(self.llama_model)

    def identity(self) -> dict:
        """Return the frozen weights and the text around images that those which train belong to, as plain values."""
        text = {
            "prompt_template": self.prompt_template,
            "end_sym": self.end_sym,
            "prompts": self.prompt_list,
        }
        made_of = {"composition": self.composition()}
        return {"llm": self.llm_identity, "vision": self.vision_identity, **made_of, **text}

    # forward: images, rows, loss

    def forward(self, samples: dict, reduction: str = "mean") -> dict:
        """Return {"loss": mean cross entropy over the batch's target tokens, "num_targets": N}.

        `samples` has "image", the images [I, 3, S, S] of all samples in order, and the texts that
        `text.rows.batch_rows` describes; or it is a batch of the newest release, `text.release_samples`. The
        `reduction` "none" gives `row_losses`. Raises ValueError for a batch without a target. Waits for no device.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: {reduction!r}; expected 'mean' or 'none'")
        samples = from_release(samples)
        images, rows = self.encode_batch(samples["image"]), self.rows(samples)
        if reduction == "none":
            return self.row_losses(rows, images)
        losses, _ = self._target_losses(rows, images)
        return {"loss": losses.mean(), "num_targets": len(losses)}

    def row_losses(self, rows: list[Row], images: torch.Tensor) -> dict:
        """Return {"loss": sum over each row's targets [B], "num_targets": [B]}, 0 and 0 for a row without one.

        `images` are vectors [I, Q, D]; several rows may have one image. Neither depends on the other rows. Raises
        ValueError if no row has a target.
        """
        losses, order = self._target_losses(rows, images)
        counts = send([row.num_targets for row in rows], device=losses.device)[0]
        return {"loss": row_logits.sums_of_rows(losses, order, rows), "num_targets": counts}

    def _target_losses(
        self, rows: list[Row], images: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[int]]:
        """Return (cross entropy of each target [N], the rows as they stand in it one behind the other)."""
        if not any(row.num_targets for row in rows):
            raise self._no_target(rows)
        self.tokens_read += sum(len(row.ids) for row in rows)
        backend, pad_id = self.choose_backend(), self.llama_tokenizer.pad_token_id
        with self.maybe_autocast():
            if backend == "padded":
                order, how = range(len(rows)), (pad_id, self.llm_checkpointing)
                losses = row_logits.padded(self.llama_model, rows, images, *how)
            else:
                packed = layouts.pack(rows, self.num_image_tokens, may_share=not self._llm_trained)
                how = backends.PACKED[backend], self.llm_checkpointing
                can_record = images.requires_grad and backends.can_record(backend, images)
                recorder = self.recorder if can_record else None
                losses = row_logits.packed(self.llama_model, packed, images, *how, recorder)
                order = packed.rows
        return losses, order

    def encode_batch(self, image: torch.Tensor) -> torch.Tensor:
        """Return vectors [I, Q, D] of a batch's images [I, 3, S, S]; I may be 0.

        Then the projection has a gradient of zeros, or what else trains, for there must be one; where the LLM trains,
        they have none, and the optimizer leaves them alone in that step. Source: the newest release.
        """
        if len(image):
            return self.encode_images(image)
        first = next(self.llama_proj.parameters())
        none = first.new_zeros(0, self.num_image_tokens, self.vision_width)
        if not first.requires_grad:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            none = none + sum(parameter.flatten()[0] for parameter in trained[:1])
        with (
            self.maybe_autocast(),
            torch.set_grad_enabled(not language_model.trains(self.llama_model)),
        ):
            return self.llama_proj(none)

    def rows(self, samples: dict) -> list[Row]:
        """Return what the LLM reads of each sample of a batch."""
        samples = from_release(samples)
        prompt = self._draw_prompt(samples) if self.prompt_list else ""
        with faults_named(samples, prompt, self, self.encoder, self.num_image_tokens):
            rows = batch_rows(samples, prompt, self, self.encoder, self.num_image_tokens)
        turns = samples.get("turns") or [()] * len(rows)
        if any(own and row.num_cut for own, row in zip(turns, rows, strict=True)):
            warn_of_cut(self.max_txt_len)
        return rows

    def split(self, samples: dict, max_tokens: int) -> list[tuple[dict, float]]:
        """Return [(part of a batch, its share of the targets)]: samples in a row, of `max_tokens` tokens at most.

        A sample with more is a part of its own. The parts' losses times their shares add up to the batch's loss.
        """
        samples = from_release(samples)
        return split_batch(samples, self.rows(samples), max_tokens)

    def build_inputs(self, samples: dict) -> tuple[dict[str, torch.Tensor], int]:
        """Return {"inputs_embeds" [B, L, D], "attention_mask" [B, L], "labels" [B, L]} of a padded batch.

        And the most positions that a row has behind its prompt. Labels are the token ids of captions and answers,
        IGNORED elsewhere. Raises ValueError if there are none.
        """
        samples = from_release(samples)
        rows = self.rows(samples)
        if not any(row.num_targets for row in rows):
            raise self._no_target(rows)
        images = self.encode_batch(samples["image"])
        inputs = row_logits.padded_inputs(
            self.llama_model, rows, images, self.llama_tokenizer.pad_token_id
        )
        return inputs, max(len(row.ids) - row.num_prompt for row in rows)

    def choose_backend(self) -> str:
        """Return how training runs the LLM, one of backends.PACKED or "padded".

        It is found out once, and anew when weights of the LLM begin or cease to train; the log says which it is.
        """
        trains = language_model.trains(self.llama_model)
        if self.llm_backend is None or trains != self._llm_trained:
            self._llm_trained = trains
            with self.maybe_autocast():
                self.llm_backend = backends.choose(
                    self.llama_model, self.pack_sequences, self.may_compile
                )
        return self.llm_backend

    def _no_target(self, rows: list[Row]) -> ValueError:
        has_text = any(len(row.ids) > row.num_prompt for row in rows)
        advice = (
            "; model.end_sym is the end token: set model.mask_eos_labels=False" if has_text else ""
        )
        return ValueError(
            f"batch has no target token: all {len(rows)} captions are empty after truncation "
            f"(model.max_txt_len={self.max_txt_len}){advice}"
        )

    def warnings(self) -> list[str]:
        return list(filter(None, [end_problem(self, self.encoder)]))

    def _draw_prompt(self, samples: dict) -> str:
        """Return this batch's prompt, a function of the process's seed and the step: a resumed run draws it again."""
        step = samples.get("iters", next(self._num_forwards))
        return random.Random(f"{torch.initial_seed()} {step}").choice(self.prompt_list)
