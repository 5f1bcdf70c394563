"""The weights in a model's checkpoints: what trains, under the tensor names of the release's files."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.models import projector, trained_with, training_parts, weights
from minigpt4.models.llm import adapters

# What the release of each arch calls its checkpoint, in the log line when it loads one.
RELEASE_NAMES = {"mini_gpt4": "BLIP2-LLM", "minigpt4": "MiniGPT-4", "minigpt_v2": "Minigpt-4-LLM"}


class TrainedWeights:
    """The part of MiniGPTBase that writes and reads the weights of checkpoints."""

    has_new_bridge = False  # whether the Q-Former is a new one, whose weights only checkpoints hold
    carried = frozenset()  # release names of frozen parameters whose values came from a checkpoint

    def release_name(self, name: str) -> str:
        """Return the name that our parameter `name` has in the release's checkpoints."""
        return adapters.to_release_name(name) if self.lora_r else name

    def part_of(self, name: str) -> str | None:
        """Return the part of `model.train` and `run.lr` that a parameter belongs to."""
        return training_parts.part_of(name)

    def _release_parameters(self) -> dict[str, nn.Parameter]:
        return {self.release_name(name): parameter for name, parameter in self.named_parameters()}

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Return {release name: tensor} of all that trains: with MiniGPT-4's shipped configurations, only llama_proj.

        Also of the frozen parameters in `carried`, as no other file holds their values.
        """
        return {
            name: tensor.detach()
            for name, tensor in self._release_parameters().items()
            if tensor.requires_grad or name in self.carried
        }

    def load_ckpt(self, path: Path) -> Any:
        """Load the weights of `model.ckpt`; return the whole content of its file. Raises CheckpointError."""
        saved = weights.read_file(path, "model.ckpt")
        tensors = weights.tensors_of(saved, path, "model.ckpt", root="model")
        trained_with.check_composition(saved, path, "model.ckpt", self.composition())
        # the projection must be there, and so must a new Q-Former, and LoRA as a whole or not at all
        prefixes = ("llama_proj.",)
        if self.has_new_bridge:
            prefixes += ("Qformer.", "query_tokens")
        needed = [name for name in self._release_parameters() if name.startswith(prefixes)]
        if any(".lora_" in name for name in tensors):
            needed += filter(adapters.is_lora, self._release_parameters())
        elif self.lora_r:
            logging.warning(
                f"model.ckpt: '{path}' has no LoRA; the model's starts anew, from the LLM as it is"
            )
        self.load_trainable(tensors, "model.ckpt", needed, path)
        if self.carried:
            logging.info(
                f"model.ckpt: {len(self.carried)} tensors of '{path}' do not train here and are not those of the parts' "
                f"own files ({min(self.carried)}, ..): checkpoints of this training hold them, too"
            )
        return saved

    @torch.no_grad()
    def load_trainable(
        self,
        state: dict,
        where: str,
        needed: list[str] | None = None,
        path: Path | str = "checkpoint",
    ) -> None:
        """Copy a checkpoint's tensors into the model; all release names in `needed` (default: all that train) must exist.

        Other parameters of the model that the checkpoint holds are loaded too, as another run may have trained them. If
        frozen ones change by this, they are `carried`: saved in the checkpoints of this run. Raises CheckpointError.
        """
        own = self._release_parameters()
        if needed is None:
            needed = [name for name, parameter in own.items() if parameter.requires_grad]
        try:
            state = adapters.in_release_names(state)
        except ValueError as error:
            raise CheckpointError(f"{where}: '{path}': {error}") from None
        projector.check(state, own, where, path)
        expected = {name: own[name] for name in needed}
        hint = adapters.advice(state, own, self.lora_r)
        found = weights.match(
            state, expected, where, path, weights.CHECKPOINT_EXCESS, optional=own, hint=hint
        )
        weights.check_finite(found, where, path)
        for name, tensor in found.items():
            if not own[name].is_floating_point() or own[name].element_size() == 1:
                raise CheckpointError(
                    f"{where}: '{path}' holds weights of the LLM ({name}), and this model has them in 8 or 4 bits; set "
                    "model.llm_quantization=none"
                )
            if hasattr(own[name], "to_local"):  # torch's DTensor
                raise CheckpointError(
                    f"{where}: '{path}' holds weights of the LLM ({name}), which run.shard_llm divides among ranks; "
                    "set run.shard_llm=False"
                )
            if not own[name].requires_grad and not _is_equal(own[name], tensor):
                self.carried |= {name}
            own[name].copy_(tensor)


def _is_equal(own: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether a parameter has these values already; False on the meta device, where it has none."""
    return not own.is_meta and torch.equal(own, found.to(own))
