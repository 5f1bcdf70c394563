"""The page's API for programs, by gradio_client: /chat answers one question about images."""

from contextlib import aclosing
from pathlib import Path

import gradio as gr

from minigpt4.serving.answers import SETTINGS, Answers, Listener, checked
from minigpt4.serving.limits import Streams
from minigpt4.serving.session import Session, Turn


class Api:
    """The API; `defaults` are the initial values of the settings, `folder` holds the uploaded files."""

    def __init__(self, answers: Answers, defaults: dict, streams: Streams, folder: Path):
        self.answers, self.defaults = answers, defaults
        self.streams, self.folder = streams, folder

    async def chat(
        self,
        question: str,
        images: list[dict] | None = None,
        temperature: float | None = None,
        top_p: float = SETTINGS["top_p"].first,
        top_k: int = SETTINGS["top_k"].first,
        num_beams: int = SETTINGS["num_beams"].first,
        max_new_tokens: int = SETTINGS["max_new_tokens"].first,
        repetition_penalty: float | None = None,
        seed: int = SETTINGS["seed"].first,
        request: gr.Request = None,
    ) -> str:
        """Return the answer to a question about images, each one gradio_client.handle_file(PATH)."""
        settings = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        for name in ("temperature", "repetition_penalty"):  # their defaults depend on the model
            settings[name] = self.defaults[name] if settings[name] is None else settings[name]
        try:
            turn = self.turn(question, images)
            listener = Listener(lambda: self.streams.is_open(request.session_hash))
            pieces = self.answers.write(Session(), turn, checked(settings), listener, gr.Warning)
            async with aclosing(pieces) as steps:
                async for _ in steps:
                    pass
        except Exception as error:
            raise gradio_error(error) from error
        return turn.answer

    def turn(self, question: object, images: object) -> Turn:
        """Return a question as a Turn. Raises ValueError for one that is no text, or an image that was not uploaded."""
        if not isinstance(question, str):
            raise ValueError(f"question: {type(question).__name__}; expected text")
        if not isinstance(images, list):
            images = [images] if images else []
        paths = []
        for image in images:
            path = image.get("path") if isinstance(image, dict) else None
            if not isinstance(path, str) or not self._is_uploaded(path):
                raise ValueError("images: expected a list of gradio_client.handle_file(PATH)")
            paths.append(path)
        return Turn(question, tuple(paths))

    def _is_uploaded(self, path: str) -> bool:
        return "\0" not in path and Path(path).resolve().is_relative_to(self.folder.resolve())


def gradio_error(error: Exception) -> gr.Error:
    """Return an error as the page and programs see it: an unexpected one without its details."""
    is_known = isinstance(error, (ValueError, OSError))
    message = str(error) if is_known else f"{type(error).__name__}; the program's output says more"
    return gr.Error(message, print_exception=not is_known)
