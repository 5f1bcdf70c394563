"""The base class of all MiniGPT models: an LLM, the projection into its embedding space, batches as rows, the loss.

A subclass adds the vision side: it creates the vision modules in its constructor, sets `image_size`, and overrides
the members listed under "vision side" below.

Shapes: B samples, I images in the batch, S image size, Q vision vectors per image, H their width before the
projection, D LLM width, L positions in a row, N target tokens.
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
    """A vision side, `llama_proj` and an LLM. `from_config(cfg)` builds it; `forward` returns the loss of a batch."""

    Config = MiniGPT4Config

    def __init__(self, cfg: MiniGPT4Config, compute_dtype: torch.dtype):
        """Store the settings. A subclass then creates the vision modules on the meta device and freezes its own."""
        super().__init__()
        self.compute_dtype = compute_dtype
        # text: see text.sample_segments.TextSettings
        self.prompt_list, self.prompt_template = [], cfg.prompt_template or ""
        self.max_txt_len, self.end_sym = cfg.max_txt_len, cfg.end_sym
        # `from_config` replaces it by what the checkpoint says, if it says anything
        self.trained_text = (self.prompt_template, cfg.end_sym)
        self.chat_template, self.max_context_len = cfg.chat_template, cfg.max_context_len
        self.mask_eos_labels, self.repetition_penalty = cfg.mask_eos_labels, cfg.repetition_penalty
        # {configuration key of a frozen weight file: trained_with.identity}; a subclass fills it
        self.vision_identity = {}
        # how the LLM is run, and which of its weights train
        self.llm_checkpointing = cfg.llm_checkpointing or cfg.use_grad_checkpoint_llm
        self.lora_r, self.lora_alpha = cfg.lora_r, cfg.lora_alpha
        self.train_modes, self.projector = training_parts.modes(cfg), cfg.projector
        self.pack_sequences, self.may_compile = cfg.pack_sequences, cfg.compile
        self.llm_backend = None  # a key of backends.PACKED or "padded"; see `choose_backend`
        self._llm_trained = False  # whether LLM weights trained when llm_backend was chosen
        self.recorder = Recorder() if cfg.cuda_graphs else None
        self._num_forwards, self._encoder = itertools.count(), None

    # vision side: a subclass overrides these members

    @property
    def num_image_tokens(self) -> int:
        """The number of vectors per image, Q."""
        raise NotImplementedError(f"{type(self).__name__}.num_image_tokens")

    @classmethod
    def image_tokens(cls, cfg: MiniGPT4Config) -> int:
        """Return the `num_image_tokens` of a model with this `model` section, without loading anything."""
        raise NotImplementedError(f"{cls.__name__}.image_tokens")

    @property
    def vision_width(self) -> int:
        """The width of the vision vectors before the projection, H."""
        raise NotImplementedError(f"{type(self).__name__}.vision_width")

    def vision_composition(self) -> dict[str, str]:
        """Return the vision entries of `composition`; {} leaves them out."""
        return {}

    def load_vision(self, cfg: MiniGPT4Config, device: torch.device) -> None:
        """Load the vision weights from their files; `device` is where they will compute."""
        raise NotImplementedError(f"{type(self).__name__}.load_vision")

    def encode_images(self, image: torch.Tensor) -> torch.Tensor:
        """Return the vectors [I, Q, D] of normalised images [I, 3, S, S]."""
        raise NotImplementedError(f"{type(self).__name__}.encode_images")

    @staticmethod
    def import_libraries() -> None:
        """Import the slow libraries now rather than at their first use."""
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
        """Return the model of a `model` section, weights loaded, on `device` (None: on the CPU, for you to move).

        `cfg` is the section of a Config, or any mapping; missing keys take their defaults. With `shard_llm` all ranks
        must call this, and each holds a shard of the LLM. Raises ValueError (also CheckpointError, ConfigError) or
        OSError; the message names the configuration key of the file that does not fit.
        """
        cfg = as_section(cfg, cls.Config, "model")
        cls.settle(cfg)
        with startup.phase("imports"):
            cls.import_libraries()
        compute_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = cls(cfg, resolve_compute_dtype(cfg.llm_precision, compute_device))
        model.load_vision(cfg, compute_device)
        model.to(device or "cpu")
        # quantised weights are packed for the device that computes with them
        is_quantised = quantization.kind_of(cfg.llm_quantization, cfg.low_resource) != "none"
        llm_device = compute_device if is_quantised else torch.device(device or "cpu")
        # passed only if set: a user's subclass may override `load_language` without this argument
        options = {"shard_llm": True} if shard_llm else {}
        model.load_language(cfg, llm_device, **options)
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
        """Return, as plain values, the frozen weights and the text settings that the trained weights depend on."""
        return {
            "llm": self.llm_identity,
            "vision": self.vision_identity,
            "composition": self.composition(),
            "prompt_template": self.prompt_template,
            "end_sym": self.end_sym,
            "prompts": self.prompt_list,
        }

    # forward: images, rows, loss

    def forward(self, samples: dict, reduction: str = "mean") -> dict:
        """Return {"loss": mean cross entropy over the batch's target tokens, "num_targets": N}.

        `samples` holds "image", the images [I, 3, S, S] of all samples in order, and the texts that
        `text.rows.batch_rows` describes; or it is a batch in the newest release's format (`text.release_samples`).
        With `reduction="none"` the result is that of `row_losses`. Raises ValueError for a batch without a target.
        Never waits for the device.
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
        """Return {"loss": sum over each row's targets [B], "num_targets": [B]}; both are 0 for a row without a target.

        `images` are vectors [I, Q, D]; rows may share an image. A row's loss does not depend on the other rows.
        Raises ValueError if no row has a target.
        """
        losses, order = self._target_losses(rows, images)
        counts = send([row.num_targets for row in rows], device=losses.device)[0]
        return {"loss": row_logits.sums_of_rows(losses, order, rows), "num_targets": counts}

    def _target_losses(
        self, rows: list[Row], images: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[int]]:
        """Return (cross entropy of each target [N], row after row; the indices of these rows in their order)."""
        if not any(row.num_targets for row in rows):
            raise self._no_target(rows)
        self.tokens_read += sum(len(row.ids) for row in rows)
        llm, recompute = self.llama_model, self.llm_checkpointing
        backend = self.choose_backend()
        with self.maybe_autocast():
            if backend == "padded":
                pad_id = self.llama_tokenizer.pad_token_id
                losses = row_logits.padded(llm, rows, images, pad_id, recompute)
                return losses, range(len(rows))
            packed = layouts.pack(rows, self.num_image_tokens, may_share=not self._llm_trained)
            can_record = images.requires_grad and backends.can_record(backend, images)
            recorder = self.recorder if can_record else None
            label_logits = backends.PACKED[backend]
            losses = row_logits.packed(llm, packed, images, label_logits, recompute, recorder)
            return losses, packed.rows

    def encode_batch(self, image: torch.Tensor) -> torch.Tensor:
        """Return the vectors [I, Q, D] of a batch's images [I, 3, S, S]; I may be 0.

        Without images and with a frozen LLM, the loss would depend on no trained parameter and backward would fail:
        the projection, or else the first parameter that trains, then gets a gradient of zeros. Where the LLM trains,
        they get none, and the optimizer skips them in that step. Source: the newest release.
        """
        if len(image):
            return self.encode_images(image)
        first = next(self.llama_proj.parameters())
        empty = first.new_zeros(0, self.num_image_tokens, self.vision_width)
        if not first.requires_grad:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            empty = empty + sum(parameter.flatten()[0] for parameter in trained[:1])
        needs_gradient = not language_model.trains(self.llama_model)
        with self.maybe_autocast(), torch.set_grad_enabled(needs_gradient):
            return self.llama_proj(empty)

    def rows(self, samples: dict) -> list[Row]:
        """Return the row of each sample of a batch: what the LLM reads and which tokens are targets."""
        samples = from_release(samples)
        prompt = self._draw_prompt(samples) if self.prompt_list else ""
        with faults_named(samples, prompt, self, self.encoder, self.num_image_tokens):
            rows = batch_rows(samples, prompt, self, self.encoder, self.num_image_tokens)
        dialogues = samples.get("turns") or [()] * len(rows)
        if any(turns and row.num_cut for turns, row in zip(dialogues, rows, strict=True)):
            warn_of_cut(self.max_txt_len)
        return rows

    def split(self, samples: dict, max_tokens: int) -> list[tuple[dict, float]]:
        """Return [(part of a batch, its fraction of the targets)]: consecutive samples, at most `max_tokens` tokens.

        A longer sample is a part of its own. The parts' losses, weighted by these fractions, add up to the batch's
        loss.
        """
        samples = from_release(samples)
        return split_batch(samples, self.rows(samples), max_tokens)

    def build_inputs(self, samples: dict) -> tuple[dict[str, torch.Tensor], int]:
        """Return the inputs of a padded batch, and the largest number of positions that a row has after its prompt.

        The inputs are {"inputs_embeds" [B, L, D], "attention_mask" [B, L], "labels" [B, L]}. Labels are the token ids
        of captions and answers, IGNORED elsewhere. Raises ValueError for a batch without a target.
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
        """Return how training runs the LLM: a key of backends.PACKED, or "padded".

        Chosen once, and again when LLM weights start or stop training; the log names the choice.
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
        """Return the prompt of this batch. It depends only on the process's seed and the step, so resume repeats it."""
        step = samples.get("iters", next(self._num_forwards))
        return random.Random(f"{torch.initial_seed()} {step}").choice(self.prompt_list)
