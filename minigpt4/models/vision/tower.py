"""What a model asks of a vision encoder."""

from pathlib import Path

from torch import nn

from minigpt4.common.image_format import CLIP_MEAN, CLIP_STD


class VisionTower:
    """A vision encoder of given dimensions; subclass it for another one and name it in `VIT_MODELS` of `eva_vit.py`.

    It is a dataclass whose fields, whole numbers, are the dimensions of the weight file; a JSON file of the same stem
    beside that gives other ones. The network that `build` makes maps normalised pixels [B, 3, S, S] to tokens
    [B, N, width]; it has `set_grad_checkpointing(bool)`, as timm's, and `blocks` if `model.compile` shall work.
    """

    image_size: int  # pixels, of the pretraining
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    OPTIONAL = ("image_size",)  # dimensions that the JSON file beside the weights may leave out

    @property
    def width(self) -> int:
        """The width of a token."""
        raise NotImplementedError

    def num_tokens(self, image_size: int) -> int:
        """Return how many tokens an image of `image_size` x `image_size` pixels becomes."""
        raise NotImplementedError

    def build(self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta") -> nn.Module:
        """Return the network, on the meta device not initialised. Raises ValueError for a size it cannot take."""
        raise NotImplementedError

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """Fill a network of `build` with the tensors of a file, strictly. Raises CheckpointError, ending in `hint`."""
        raise NotImplementedError
