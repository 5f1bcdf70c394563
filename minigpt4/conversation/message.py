"""The text of a message: a string that knows which of its image slots are images."""

from collections.abc import Iterable

from minigpt4.text.segments import IMAGE, IMAGE_SLOT, Segment, Text, message_segments

SLOT = f"<Img>{IMAGE_SLOT}</Img>"  # how a message shows the place of an image


class Message(str):
    """The text of a message: a string that knows which of the slots in it are images, and which were typed."""

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> "Message":
        segments = tuple(segments)
        message = super().__new__(cls, "".join(map(str, segments)))
        message.segments = segments
        return message

    def __getnewargs__(self) -> tuple:  # how copies and pickles are made
        return (self.segments,)

    @classmethod
    def read(cls, text: str, is_user: bool) -> "Message":
        """Return a plain string as a message: in the user's, "<Img><ImageHere></Img>" is an image, as in 2023."""
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
