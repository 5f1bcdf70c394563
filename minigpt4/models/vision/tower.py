"""What a model asks of a vision encoder."""

from pathlib import Path

from torch import nn

from minigpt4.common.image_format import CLIP_MEAN, CLIP_STD


class VisionTower:
    """A vision encoder of given dimensions; subclass it for another one and name it in `VIT_MODELS` of `eva_vit.py`.

    It is a dataclass. One of a weight file has whole numbers as fields, the dimensions of that file; a JSON file of
    the same stem beside it gives other ones. The network that `build` makes maps normalised pixels [B, 3, S, S] to
    tokens [B, P + N, width]: P prefix tokens (the class token), then the patches row by row. It has
    `set_grad_checkpointing(bool)`, as timm's, and `blocks` if `model.compile` shall work.
    """

    image_size: int  # pixels, of the pretraining
    width: int  # of a token
    num_prefix: int = 1  # tokens before the patches: the class token, registers
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    source = "vit_ckpt"  # the key of the section `model` that names the weights
    OPTIONAL = ("image_size",)  # dimensions that the JSON file beside the weights may leave out

    def num_tokens(self, image_size: int) -> int:
        """Return how many tokens an image of `image_size` x `image_size` pixels becomes, prefix tokens included."""
        raise NotImplementedError

    def build(
        self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta"
    ) -> nn.Module:
        """Return the network, on the meta device not initialised. Raises ValueError for a size it cannot take."""
        raise NotImplementedError

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """Fill a network of `build` with the tensors of a file or folder, strictly.

        Raises CheckpointError, ending in `hint`.
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
