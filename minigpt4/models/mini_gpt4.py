"""MiniGPT-4: a frozen ViT and Q-Former, one trained linear layer, a frozen LLM.

Shapes: B images, S image size, N patches, Dv ViT width, Q queries, H Q-Former width, D LLM width, P prefix
positions (image slots and prompt), T text positions, L = 1 + P + T.
"""

import itertools
import logging
import random
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.dist_utils import main_print
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup
from minigpt4.common.utils import cached_path, expand_path, resolve_file
from minigpt4.models import memory, weights
from minigpt4.models.base_model import BaseModel, resolve_compute_dtype
from minigpt4.models.llm import attention, backends, language_model, packing, quantization
from minigpt4.models.llm.recompute import layers_again
from minigpt4.models.mini_gpt4_config import MiniGPT4Config, find_problems
from minigpt4.models.vision.eva_vit import (
    IMAGE_FORMAT,
    VIT_MODELS,
    build_eva_vit,
    compile_blocks,
    half_linears,
    load_eva_vit,
)
from minigpt4.models.vision.qformer import QFormerConfig, build_qformer, from_release_name, to_release_name
from minigpt4.text.preview import TextPreview
from minigpt4.text.rows import IGNORED, batch_prompts, batch_rows, in_parts, prompt_ids, read_prompts, warn_of_cut

# What an LLM of a certain width usually is, for messages.
_LLM_SIZES = {4096: " (7B)", 5120: " (13B)"}


@registry.register_model("mini_gpt4")
class MiniGPT4(BaseModel):
    """The whole model. `MiniGPT4.from_config(cfg)` builds it; `forward` gives the loss of a batch."""

    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain_vicuna": "configs/models/minigpt4.yaml"}
    Config = MiniGPT4Config

    def __init__(self, cfg, compute_dtype):
        """Make all parts but the LLM on the meta device: shapes, types and what is frozen, no weights."""
        super().__init__()
        self.compute_dtype, self.image_size = compute_dtype, cfg.image_size
        vit_config = weights.dimensions(cached_path(cfg.vit_ckpt), VIT_MODELS[cfg.vit_model], "model.vit_ckpt")
        qformer_config = weights.dimensions(cached_path(cfg.q_former_model), QFormerConfig(), "model.q_former_model")
        if qformer_config.encoder_width != vit_config.embed_dim:
            raise ValueError(
                f"model.q_former_model: its Q-Former looks at {qformer_config.encoder_width}-wide image tokens, the "
                f"ViT of model.vit_ckpt makes {vit_config.embed_dim}-wide ones; take files that belong together"
            )
        self.visual_encoder = build_eva_vit(vit_config, cfg.image_size, cfg.drop_path_rate)
        self.visual_encoder.set_grad_checkpointing(cfg.use_grad_checkpoint)
        self.ln_vision = LayerNorm(vit_config.embed_dim, device="meta")
        self.Qformer = build_qformer(qformer_config)
        self.query_tokens = nn.Parameter(torch.empty(1, cfg.num_query_token, qformer_config.hidden_size, device="meta"))
        if cfg.vit_precision == "fp16" and cfg.freeze_vit:
            half_linears(self.visual_encoder, compute_dtype)
        if cfg.freeze_vit:
            self.freeze("visual_encoder", "ln_vision")
        if cfg.freeze_qformer:
            self.freeze("Qformer", "query_tokens")
        self.max_txt_len, self.end_sym, self.mask_eos_labels = cfg.max_txt_len, cfg.end_sym, cfg.mask_eos_labels
        self.pack_sequences, self.llm_checkpointing = cfg.pack_sequences, cfg.llm_checkpointing
        self.may_compile = cfg.compile
        self.prompt_list, self.prompt_template, self._num_forwards = [], cfg.prompt_template, itertools.count()

    # building

    @classmethod
    def from_config(cls, cfg, device=None):
        """Return the model of a checked `model` section, weights loaded, on `device` (None: on the CPU, to be moved).

        Raises ValueError (CheckpointError) or OSError that names the configuration key of a file that does not fit.
        """
        with startup.phase("imports"):  # each is otherwise imported where it is first needed
            import timm.models.eva  # noqa: F401
            from transformers import AutoModelForCausalLM, Blip2QFormerModel  # noqa: F401
        meant_for = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = cls(cfg, resolve_compute_dtype(cfg.llm_precision, meant_for))
        model._load_vit(cfg)
        if cfg.compile:
            compile_blocks(model.visual_encoder, meant_for)
        model._load_qformer(cfg)
        model.to(device or "cpu")
        is_quantised = quantization.kind_of(cfg.llm_quantization, cfg.low_resource) != "none"
        # quantised weights are packed for the device that computes with them
        model._load_language(cfg, meant_for if is_quantised else torch.device(device or "cpu"))
        if cfg.prompt_path:
            model.prompt_list = read_prompts(cfg.prompt_path, cfg.prompt_template)
            main_print(f"Load {len(model.prompt_list)} training prompts")
            main_print(f"Prompt Example \n{model.prompt_list[0]}")
        if cfg.ckpt:
            main_print(f"Load BLIP2-LLM Checkpoint: {cfg.ckpt}")
            path = resolve_file(cfg.ckpt, "model.ckpt")
            needed = [name for name in model._release_parameters() if name.startswith("llama_proj.")]
            model.load_trainable(weights.read_tensors(path, "model.ckpt", root="model"), "model.ckpt", needed, path)
            weights.compare_llm(path, "model.ckpt", model.llm_identity)
        return model.eval()

    @classmethod
    def weight_files(cls, cfg):
        files = [cached_path(file) for file in (cfg.vit_ckpt, cfg.q_former_model, cfg.ckpt) if file]
        return [*files, expand_path(cfg.llama_model)]

    @classmethod
    def image_format(cls, cfg):
        return IMAGE_FORMAT if cfg.image_size is None else IMAGE_FORMAT._replace(size=cfg.image_size)

    @classmethod
    def preflight(cls, cfg, where="model"):
        """Return the problems of the section as lines `full key: problem`; nothing is loaded."""
        return find_problems(cfg, where)

    @classmethod
    def skeleton(cls, cfg, compute_dtype):
        """Return the model on the meta device, as `from_config` would make it: shapes and types, no weights."""
        model = cls(cfg, compute_dtype)
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        model._attach(language_model.meta_llm(cfg.llama_model, compute_dtype, kind), "meta")
        return model

    @classmethod
    def plan(cls, cfg, device):
        """Return the list of Part that `from_config` would build on `device`; reads no weights."""
        device = torch.device(device)
        quantization.check_device(quantization.kind_of(cfg.llm_quantization, cfg.low_resource), device)
        model = cls.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device))
        return [part._replace(device=str(device)) for part in model.parts()]

    @classmethod
    def text_preview(cls, cfg):
        """Return the TextPreview of a checked `model` section: what the LLM reads and learns; loads the tokenizer."""
        return TextPreview(cfg, language_model.load_tokenizer(cfg.llama_model))

    @classmethod
    def training_memory(cls, cfg, device, batch_size, max_tokens=None):
        """Return the bytes that a training step of `batch_size` texts of full length holds at most, counted."""
        return memory.count(cls, cfg, torch.device(device), batch_size, max_tokens).peak

    @startup.phase("ViT")
    def _load_vit(self, cfg):
        main_print("Loading VIT")
        path = resolve_file(cfg.vit_ckpt, "model.vit_ckpt")
        hint = f"Expected the ViT {cfg.vit_model} of the 2023 release, or dimensions in '{path.with_suffix('.json')}'"
        load_eva_vit(self.visual_encoder, path, "model.vit_ckpt", hint)
        if cfg.vit_precision == "fp16" and (self.compute_dtype == torch.float32 or not cfg.freeze_vit):
            reason = "it trains" if not cfg.freeze_vit else "this run does not compute in half precision"
            logging.info("vision encoder in float32: %s", reason)
        if cfg.freeze_vit:
            logging.info("freeze vision encoder")
        main_print("Loading VIT Done")

    @startup.phase("Q-Former")
    def _load_qformer(self, cfg):
        main_print("Loading Q-Former")
        path = resolve_file(cfg.q_former_model, "model.q_former_model")
        found = weights.read_tensors(path, "model.q_former_model", root="model")
        expected = {
            to_release_name(name): tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("query_tokens", "ln_vision.", "Qformer."))
        }
        hint = f"Expected the file of BLIP-2, or its dimensions in '{path.with_suffix('.json')}'"
        found = weights.match(found, expected, "model.q_former_model", path, weights.QFORMER_EXCESS, hint=hint)
        weights.assign(self, {from_release_name(name): tensor for name, tensor in found.items()})
        logging.info("load checkpoint from %s", path)
        if cfg.freeze_qformer:
            logging.info("freeze Qformer")
        main_print("Loading Q-Former Done")

    @startup.phase("LLM")
    def _load_language(self, cfg, device):
        main_print("Loading LLAMA")
        self.llama_tokenizer = language_model.load_tokenizer(cfg.llama_model)
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        llm = language_model.load_llm(cfg.llama_model, self.compute_dtype, device, kind, cfg.device_8bit)
        if cfg.check_llm:
            language_model.check_reads_english(llm, self.llama_tokenizer, cfg.llama_model)
        self._attach(llm, device)
        self.llm_identity = language_model.identity(cfg.llama_model, llm)
        main_print("Loading LLAMA Done")

    def _attach(self, llm, device):
        """Add the frozen LLM and the projection into its embedding space."""
        self.llama_model = llm
        self.freeze("llama_model")
        self.llama_proj = nn.Linear(self.query_tokens.shape[-1], language_model.embedding_width(llm), device=device)

    def decoder(self):
        """Return the Decoder with which a chat runs the LLM."""
        from minigpt4.models.llm.decoding import Decoder

        return Decoder(self.llama_model)

    # checkpoints

    def identity(self):
        """Return the LLM and the text around images that the weights are trained for, as plain values."""
        text = {"prompt_template": self.prompt_template, "end_sym": self.end_sym, "prompts": self.prompt_list}
        return {"llm": self.llm_identity, **text}

    def _release_parameters(self):
        return {to_release_name(name): parameter for name, parameter in self.named_parameters()}

    def trainable_state_dict(self):
        """Return {name of the 2023 release: tensor} of what trains: for the shipped files llama_proj alone."""
        return {name: tensor.detach() for name, tensor in self._release_parameters().items() if tensor.requires_grad}

    @torch.no_grad()
    def load_trainable(self, state, where, needed=None, path="checkpoint"):
        """Copy a checkpoint's tensors into the model; they must hold all names of `needed` (default: all that train).

        Other parameters of the model that are there are taken too: another run may have trained them.
        Raises CheckpointError.
        """
        own = self._release_parameters()
        needed = self.trainable_state_dict() if needed is None else needed
        self._check_width(state, where, path)
        expected = {name: own[name] for name in needed}
        found = weights.match(state, expected, where, path, weights.CHECKPOINT_EXCESS, optional=own)
        weights.check_finite(found, where, path)
        for name, tensor in found.items():
            own[name].copy_(tensor)

    def _check_width(self, state, where, path):
        found, own = state.get("llama_proj.weight"), self.llama_proj.weight
        if found is not None and found.ndim == 2 and found.shape[0] != own.shape[0]:
            theirs, ours = found.shape[0], own.shape[0]
            raise CheckpointError(
                f"{where}: '{path}' was trained for a {theirs}-wide LLM{_LLM_SIZES.get(theirs, '')}, model.llama_model "
                f"is {ours} wide{_LLM_SIZES.get(ours, '')}; give a checkpoint and an LLM of one size"
            )

    # forward

    @cached_property
    def llm_path(self):
        """How `forward` runs the LLM: one of backends.PACKED or "padded"; found out, and said in the log, once."""
        with self.maybe_autocast():
            return backends.choose(self.llama_model, self.pack_sequences, self.may_compile)

    def encode_img(self, image):
        """Return (embeddings [B, Q, D], all-ones mask [B, Q]) of normalised images [B, 3, S, S]."""
        if not image.is_floating_point():
            raise ValueError(
                f"image: {image.dtype}; expected normalised images: a loader's batch becomes that in "
                "minigpt4.common.device.to_device(batch, device)"
            )
        if image.ndim != 4 or image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"image: {list(image.shape)}; expected [B, 3, {self.image_size}, {self.image_size}]: the processors' "
                "image_size must be model.image_size"
            )
        with self.maybe_autocast():
            image_embeds = self.ln_vision(self.visual_encoder(image.to(self.device)))  # [B, 1 + N, Dv]
            queries = self.Qformer(self.query_tokens, image_embeds)  # [B, Q, H]
            inputs_llama = self.llama_proj(queries)  # [B, Q, D]
        return inputs_llama, torch.ones(inputs_llama.shape[:2], dtype=torch.long, device=inputs_llama.device)

    def prompt_wrap(self, img_embeds, atts_img, prompt):
        """Return (embeddings [B, P, D], mask [B, P]) of the prompt's text around the image; all alike without one."""
        if not prompt:
            return img_embeds, atts_img
        ids = prompt_ids(prompt, self.llama_tokenizer)
        before, after = (self._embed(torch.tensor([piece], dtype=torch.long)) for piece in ids)
        size = img_embeds.shape[0]
        wrapped = [before.expand(size, -1, -1), img_embeds.to(before), after.expand(size, -1, -1)]
        wrapped = torch.cat(wrapped, dim=1)
        return wrapped, atts_img.new_ones(wrapped.shape[:2])

    def build_inputs(self, samples):
        """Return {"inputs_embeds" [B, L, D], "attention_mask" [B, L], "labels" [B, L]} of a batch, and T.

        Labels are the token ids of captions and answers, IGNORED elsewhere. Raises ValueError if there are none.
        """
        ids, text_mask, text_labels = self._text(samples["text_input"], samples.get("turns"))
        prefix, prefix_mask = self._prefix(samples)
        embeds = self._embed(ids)  # [B, T, D]
        return {
            "inputs_embeds": torch.cat([prefix.to(embeds), embeds], dim=1),
            "attention_mask": torch.cat([prefix_mask, text_mask.to(prefix_mask)], dim=1).to(embeds.device),
            "labels": nn.functional.pad(text_labels, (prefix.shape[1], 0), value=IGNORED).to(embeds.device),
        }, ids.shape[1]

    def forward(self, samples):
        """Return {"loss": mean cross entropy over the batch's target tokens} for {"image", "text_input"}.

        "instruction", where a batch has it, holds a text per sample; those of '' get the prompt drawn for the batch.
        "turns" holds a list of (question, answer) per sample, in place of prompt and caption; `()` for one without.
        """
        return {"loss": self._loss_of_padded(samples) if self.llm_path == "padded" else self._loss_of_packed(samples)}

    def split(self, samples, max_tokens):
        """Return [(part of a batch, its share of the targets)]: samples in a row, of `max_tokens` tokens at most.

        A sample with more is a part of its own. The parts' losses times their shares add up to the batch's loss.
        """
        return in_parts(samples, *self._ids(samples), self.query_tokens.shape[1], max_tokens)

    def _loss_of_packed(self, samples):
        """Return the loss with texts one behind the other; nothing here waits for the device."""
        pictures, _ = self.encode_img(samples["image"])
        prefixes, rows = self._ids(samples)
        packed = packing.pack(prefixes, rows, pictures.shape[1])
        if not packed.targets:
            raise self._no_target(rows)
        if packed.rows != list(range(len(rows))):
            pictures = pictures.index_select(0, torch.tensor(packed.rows).to(pictures.device, non_blocking=True))
        embedding = self.llama_model.get_input_embeddings()
        device = embedding.weight.device
        ids, positions, slots, predicting, targets = (
            torch.tensor(values).to(device, non_blocking=True)
            for values in (packed.ids, packed.positions, packed.slots, packed.predicting, packed.targets)
        )
        words = embedding(ids)  # [T, D]
        embeds = words.index_copy(0, slots, pictures.flatten(0, 1).to(words))
        segments = attention.Segments(packed.lengths, device, packed.num_shared)
        with self.maybe_autocast():
            label_logits = backends.PACKED[self.llm_path]
            logits = label_logits(self.llama_model, embeds, positions, segments, predicting, self.llm_checkpointing)
        return packing.CrossEntropy.apply(logits, targets)

    def _loss_of_padded(self, samples):
        """Return the loss with texts padded to the longest, as 2023."""
        inputs, num_text = self.build_inputs(samples)
        labels = inputs.pop("labels")[:, -num_text:]  # [B, T]
        length = inputs["inputs_embeds"].shape[1]
        predicting = torch.arange(length - num_text - 1, length - 1, device=labels.device)
        recompute = layers_again(self.llama_model) if self.llm_checkpointing else nullcontext()
        with self.maybe_autocast(), recompute:
            logits = self.llama_model(**inputs, use_cache=False, logits_to_keep=predicting).logits  # [B, T, vocabulary]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def _ids(self, samples):
        """Return [(token ids before the image, behind it)] and what follows them, [prompts.Row]."""
        drawn = self._draw_prompt(samples) if self.prompt_list else ""
        prompts = batch_prompts(samples, drawn, self, self.llama_tokenizer)
        return [self._prefix_ids(prompt) for prompt in prompts], batch_rows(samples, self, self.llama_tokenizer)

    def _prefix_ids(self, prompt):
        """Return the token ids before the image, BOS first, and behind it."""
        bos = self.llama_tokenizer.bos_token_id
        before, behind = prompt_ids(prompt, self.llama_tokenizer)
        return [*([] if bos is None else [bos]), *before], behind

    def _prefix(self, samples):
        """Return (embeddings [B, 1 + P, D], mask) of BOS and prompt; rows are as long as the longest, padded left."""
        pictures, mask = self.encode_img(samples["image"])
        drawn = self._draw_prompt(samples) if self.prompt_list else ""
        if not samples.get("instruction") and not samples.get("turns"):
            return self._after_bos(*self.prompt_wrap(pictures, mask, drawn))
        prompts = batch_prompts(samples, drawn, self, self.llama_tokenizer)
        parts = zip(pictures.split(1), mask.split(1), prompts, strict=True)
        rows = [self._after_bos(*self.prompt_wrap(*part)) for part in parts]
        pad = lambda tensors: nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side="left")  # noqa: E731
        return pad([row[0] for row, _ in rows]), pad([row[0] for _, row in rows])

    def _after_bos(self, embeds, mask):
        bos = self.llama_tokenizer.bos_token_id
        bos = self._embed(torch.tensor([[] if bos is None else [bos]], dtype=torch.long)).expand(len(embeds), -1, -1)
        return torch.cat([bos, embeds.to(bos)], dim=1), nn.functional.pad(mask, (bos.shape[1], 0), value=1)

    def _text(self, texts, turns=None):
        """Return token ids, mask and labels [B, T] of what follows the prompts, cut to max_txt_len, padded right."""
        rows = batch_rows({"text_input": texts, "turns": turns}, self, self.llama_tokenizer)
        if turns and any(own and row.num_cut for own, row in zip(turns, rows, strict=True)):
            warn_of_cut(self.max_txt_len)
        ids = _stack([row.ids for row in rows], self.llama_tokenizer.pad_token_id)
        mask = _stack([[1] * len(row.ids) for row in rows], 0)
        labels = _stack([row.labels for row in rows], IGNORED)
        if all(label == IGNORED for row in rows for label in row.labels):
            raise self._no_target(rows)
        return ids, mask, labels

    def _no_target(self, rows):
        has_text = any(row.ids for row in rows)
        advice = "; model.end_sym is the end token: set model.mask_eos_labels=False" if has_text else ""
        return ValueError(
            f"batch has no target token: all {len(rows)} captions are empty after truncation "
            f"(model.max_txt_len={self.max_txt_len}){advice}"
        )

    def _embed(self, ids):
        embedding = self.llama_model.get_input_embeddings()
        return embedding(ids.to(embedding.weight.device))

    def _draw_prompt(self, samples):
        """Return this batch's prompt, a function of the process's seed and the step: a resumed run draws it again."""
        step = samples.get("iters", next(self._num_forwards))
        return random.Random(f"{torch.initial_seed()} {step}").choice(self.prompt_list)


class LayerNorm(nn.LayerNorm):
    """Computes in float32, whatever comes in, and gives back the input's type. eps 1e-5. Source: BLIP-2."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def _stack(rows, fill):
    """Return lists of unequal length as one int64 tensor [B, longest], filled on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, fill)
