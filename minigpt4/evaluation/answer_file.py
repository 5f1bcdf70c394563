"""The file of answers: a JSON line an item, written whole or not at all; never mixed with answers to something else.

What was asked of which model stands beside it, in `<file>.settings.json`: a call that goes on must ask the same.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.lock import locked
from minigpt4.common.registry import registry
from minigpt4.common.utils import fingerprint

# keys of `model` that change no answer: most are for training
_NO_MATTER = (
    "device_8bit",
    "prompt_path",
    "check_llm",
    "max_txt_len",
    "mask_eos_labels",
    "pack_sequences",
)
_NO_MATTER += ("drop_path_rate", "use_grad_checkpoint", "llm_checkpointing", "train", "device_map")


def settings_of(cfg: Config, **asked: Any) -> dict[str, Any]:
    """Return all that decides an answer: `asked`, the section `model`, the image processor. Files go by content."""
    files = registry.get_model_class(cfg.model_cfg.arch).weight_files(cfg.model_cfg)
    for key, value in cfg.model_cfg.items():
        path = Path(os.path.expanduser(os.path.expandvars(str(value))))
        is_file = path in files and path.exists()
        if key not in _NO_MATTER:
            asked[f"model.{key}"] = (
                {"name": path.name, "content": fingerprint(path)[:16]} if is_file else value
            )
    return asked | {"image processor": cfg.image_processor}


def _content(setting: Any) -> Any:
    """Return what counts of a setting: of a file its content, whatever it is called now."""
    return setting.get("content", setting) if isinstance(setting, dict) else setting


class AnswerFile:
    """An open file of answers, see `open_answers`; `done`: `identity` of each id that has one, by its line's `key`."""

    def __init__(
        self, path: Path, key: str, settings: dict[str, Any], identity: Callable[[str], str] = str
    ):
        """Raise ValueError for another kind of file, and for one with answers to something else."""
        self.path, self.settings = path, settings
        self._lines = read_lines(path, key)
        unanswered = [
            line for line, read in self._lines.items() if not isinstance(read.get("answer"), str)
        ]
        self._errors = {line: identity(self._lines[line][key]) for line in unanswered}
        self.done = {
            identity(read[key]) for line, read in self._lines.items() if line not in self._errors
        }
        self._beside = path.with_name(f"{path.name}.settings.json")
        if self.done:
            self._compare()

    def _compare(self) -> None:
        """Raise ValueError where the answers that are there were asked for in another way."""
        if not self._beside.is_file():
            logging.warning(
                "'%s' does not say what its answers are to: they are taken for answers to this",
                self.path,
            )
            return
        try:
            theirs = json.loads(self._beside.read_bytes())
            common = [key for key in self.settings if key in theirs.keys()]  # noqa: SIM118 - a list has none
            different = [
                key for key in common if _content(theirs[key]) != _content(self.settings[key])
            ]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"--output: '{self._beside}' is damaged ({error}); give another --output"
            ) from error
        if different:
            differ = [
                f"{key}: {theirs[key]!r:.200} there, {self.settings[key]!r:.200} now"
                for key in different
            ]
            raise ValueError(
                f"--output: '{self.path}' holds {len(self.done)} answers to something else ({'; '.join(differ)}); "
                "give another name"
            )

    def begin(self, again: set[str]) -> None:
        """Take away half a line that an interrupted call left, and the errors of items that are tried `again`."""
        kept = [line + b"\n" for line in self._lines if self._errors.get(line) not in again]
        content = b"".join(kept)
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._beside, json.dumps(self.settings, indent=2).encode() + b"\n")
            if not self.path.exists() or self.path.read_bytes() != content:
                write_whole(self.path, content)

    def add(self, line: dict[str, str]) -> None:
        """Append a line. Raises OSError where the disk is full; what is in the file then ends with a whole line."""
        # what is no UTF-8 in a name is escaped, as JSON does it, so that the name can be found again
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with _explained(self.path), open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(end)
                raise


@contextmanager
def open_answers(path: Path, *of_file: Any) -> Iterator[AnswerFile]:
    """Yield AnswerFile(path, *of_file), for this process alone. Raises as it, and OSError where it is in use.

    A link stays one: what it leads to is written.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: '{path}' is no file; give the name of a file")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    with locked(path):
        yield AnswerFile(path, *of_file)


def read_lines(path: Path, key: str) -> dict[bytes, dict[str, str]]:
    """Return {line: what it says} of the whole lines of a file. Raises ValueError for another kind of file."""
    content = path.read_bytes() if path.is_file() else b""
    lines = {}
    *whole, rest = content.split(b"\n")  # never by splitlines: an answer may hold U+2028
    try:
        for line in filter(bytes.strip, whole):
            lines[line] = json.loads(line)
            if not isinstance(lines[line][key], str):
                raise TypeError(f"'{key}' is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--output: '{path}' is no answer file ({error}); give another name"
        ) from error
    if rest and not lines and not rest.startswith(f'{{"{key}"'.encode()):
        raise ValueError(f"--output: '{path}' is no answer file; give another name")
    return lines


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either as before or complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Within the block, an error of the system says what was to be written, and what to do."""
    try:
        yield
    except OSError as error:
        advice = "what is there is whole; make room and call again, or give another --output"
        raise OSError(
            f"--output: '{path}' cannot be written ({error.strerror or error}); {advice}"
        ) from error
