"""The text of a message: a string that knows which of its image slots stand for images."""

from collections.abc import Iterable

from minigpt4.text.segments import IMAGE, IMAGE_SLOT, Segment, Text, message_segments

SLOT = f"<Img>{IMAGE_SLOT}</Img>"  # an image in the text of a message


class Message(str):
    """The text of a message: a string that knows which of its image slots stand for images and which were only typed."""

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> "Message":
        segments = tuple(segments)
        message = super().__new__(cls, "".join(map(str, segments)))
        message.segments = segments
        return message

    def __getnewargs__(self) -> tuple:  # for copy and pickle
        return (self.segments,)

    @classmethod
    def read(cls, text: str, is_user: bool) -> "Message":
        """Return a string as a Message; in the user's, "<Img><ImageHere></Img>" stands for an image, as in 2023."""
        if isinstance(text, cls):
            return text
        first, *others = text.split(SLOT) if is_user else [text]
        segments = [Text(first)] if first or not others else []
        for piece in others:
            segments += message_segments([IMAGE]) + ([Text(piece)] if piece else [])
        return cls(segments)

    @property
    def num_images(self) -> int:
        return self.segments.count(IMAGE)
