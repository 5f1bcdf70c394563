"""The interface of a vision encoder."""

from pathlib import Path

from torch import nn

from minigpt4.common.image_format import CLIP_MEAN, CLIP_STD


class VisionTower:
    """A vision encoder of given dimensions. To add one, write a subclass and name it in `VIT_MODELS` of `eva_vit.py`.

    A subclass is a dataclass. If it is read from a weight file, its fields are the dimensions in that file, whole
    numbers; a JSON sidecar of the same stem gives others. The network made by `build` maps normalised pixels
    [B, 3, S, S] to tokens [B, P + N, width]: P prefix tokens (such as the class token), then the patches row by row. It
    has `set_grad_checkpointing(bool)`, like timm's networks, and `blocks`, which `model.compile` needs.
    """

    image_size: int  # in pixels, as in pretraining
    width: int  # of a token
    num_prefix: int = 1  # tokens before the patches: class token, registers
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    source = "vit_ckpt"  # the key of the section `model` that names the weights
    OPTIONAL = ("image_size",)  # dimensions that the sidecar may leave out

    def num_tokens(self, image_size: int) -> int:
        """Return the number of tokens for an image of `image_size` x `image_size` pixels, prefix tokens included."""
        raise NotImplementedError

    def build(
        self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta"
    ) -> nn.Module:
        """Return the network, without values on the meta device. Raises ValueError for an unsupported image size."""
        raise NotImplementedError

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """Load the weights of a network of `build` from a file or folder `path`, matching names and shapes strictly.

        Raises CheckpointError with a message that starts with the key `where` and ends in `hint`.
        """
        raise NotImplementedError


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise ValueError if patches do not tile the image."""
    if image_size % patch_size:
        below = image_size // patch_size * patch_size
        sizes = f"{below} or {below + patch_size}" if below else str(patch_size)
        raise ValueError(
            f"model.image_size: {image_size} is no multiple of the ViT's patch size {patch_size}; take {sizes}"
        )
