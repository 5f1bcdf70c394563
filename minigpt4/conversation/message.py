"""The text of a message, a string that knows which of its image slots stand for images, and what is refused as one."""

from collections.abc import Iterable

from minigpt4.text.segments import IMAGE, IMAGE_SLOT, Segment, Text, message_segments

MAX_MESSAGE_CHARS = 32_768  # about 8,000 tokens; a longer message is refused before tokenisation
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

    @property
    def is_image_only(self) -> bool:
        """Whether it holds images, and no text of the user."""
        texts = [part for part in self.segments if part is not IMAGE and not part.is_structure]
        return self.num_images > 0 and not any(part.text.strip() for part in texts)


def check_question(text: str) -> None:
    """Raise ValueError for an empty question, and for one longer than MAX_MESSAGE_CHARS."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the message is empty: type a question")
    check_length(text)


def check_length(text: str, name: str = "the message") -> None:
    """Raise ValueError for a text longer than MAX_MESSAGE_CHARS."""
    if len(text) > MAX_MESSAGE_CHARS:
        raise ValueError(
            f"{name} has {len(text):,} characters; at most {MAX_MESSAGE_CHARS:,}: shorten it"
        )
