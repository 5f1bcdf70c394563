"""The answer file: one JSON line per item, each written completely or not at all.

The question and the model are recorded beside it in `<file>.settings.json`; a call that resumes the file must use the
same, so that one file never mixes answers to different questions or of different models.
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

# keys of `model` that do not affect answers; most are for training
_IRRELEVANT_KEYS = (
    "device_8bit",
    "prompt_path",
    "check_llm",
    "max_txt_len",
    "mask_eos_labels",
    "pack_sequences",
    "drop_path_rate",
    "use_grad_checkpoint",
    "llm_checkpointing",
    "train",
    "device_map",
)


def settings_of(cfg: Config, **asked: Any) -> dict[str, Any]:
    """Return everything an answer depends on: `asked`, the section `model` and the image processor.

    A weight file is represented by its name and a fingerprint of its content.
    """
    settings = dict(asked)
    files = registry.get_model_class(cfg.model_cfg.arch).weight_files(cfg.model_cfg)
    for key, value in cfg.model_cfg.items():
        if key in _IRRELEVANT_KEYS:
            continue
        path = Path(os.path.expanduser(os.path.expandvars(str(value))))
        if path in files and path.exists():
            value = {"name": path.name, "content": fingerprint(path)[:16]}
        settings[f"model.{key}"] = value
    return settings | {"image processor": cfg.image_processor}


def _comparable(setting: Any) -> Any:
    """Return what is compared of a setting: of a file its content, so that it may be renamed."""
    return setting.get("content", setting) if isinstance(setting, dict) else setting


class AnswerFile:
    """An open answer file, see `open_answers`.

    `key` is the field of a line that holds the id; `done` holds `identity(id)` of each item that has an answer.
    """

    def __init__(
        self, path: Path, key: str, settings: dict[str, Any], identity: Callable[[str], str] = str
    ):
        """Raise ValueError for another kind of file, and for one whose answers were produced with other settings."""
        self.path, self.settings = path, settings
        self._lines = read_lines(path, key)
        self._errors = {}  # raw line without an answer -> identity of its item
        self.done = set()
        for raw, line in self._lines.items():
            if isinstance(line.get("answer"), str):
                self.done.add(identity(line[key]))
            else:
                self._errors[raw] = identity(line[key])
        self._settings_path = path.with_name(f"{path.name}.settings.json")
        if self.done:
            self._check_settings()

    def _check_settings(self) -> None:
        """Raise ValueError if the answers in the file were produced with other settings."""
        if not self._settings_path.is_file():
            logging.warning(
                "'%s' has no settings file beside it: its answers are taken for answers to this question",
                self.path,
            )
            return
        try:
            theirs = json.loads(self._settings_path.read_bytes())
            # .keys(), as a list or a text, which is no settings file, raises AttributeError
            common = [key for key in self.settings if key in theirs.keys()]  # noqa: SIM118
            different = [
                key for key in common if _comparable(theirs[key]) != _comparable(self.settings[key])
            ]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"--output: '{self._settings_path}' is damaged ({error}); give another --output"
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
        """Write the settings; remove a partial last line of an interrupted call and the errors of items asked `again`."""
        kept = [raw + b"\n" for raw in self._lines if self._errors.get(raw) not in again]
        content = b"".join(kept)
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._settings_path, json.dumps(self.settings, indent=2).encode() + b"\n")
            if not self.path.exists() or self.path.read_bytes() != content:
                write_whole(self.path, content)

    def add(self, line: dict[str, str]) -> None:
        """Append a line. Raises OSError, for example on a full disk; the file then still ends with a complete line."""
        # Bytes of a file name that are not UTF-8 are written as JSON escapes, from which the name can be read back.
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
def open_answers(path: Path, *arguments: Any) -> Iterator[AnswerFile]:
    """Yield AnswerFile(path, *arguments), locked for this process. Raises what AnswerFile raises; OSError if in use.

    A symbolic link is kept: the file that it points to is written.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: '{path}' is no file; give the name of a file")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    with locked(path):
        yield AnswerFile(path, *arguments)


def read_lines(path: Path, key: str) -> dict[bytes, dict[str, str]]:
    """Return {raw line: its parsed content} for the complete lines of a file. Raises ValueError for another kind."""
    content = path.read_bytes() if path.is_file() else b""
    lines = {}
    *complete, rest = content.split(b"\n")  # not splitlines: an answer may contain U+2028
    try:
        for raw in filter(bytes.strip, complete):
            lines[raw] = json.loads(raw)
            if not isinstance(lines[raw][key], str):
                raise TypeError(f"'{key}' is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--output: '{path}' is no answer file ({error}); give another name"
        ) from error
    # A file with nothing but a partial line is accepted only if that line begins like one of ours.
    if rest and not lines and not rest.startswith(f'{{"{key}"'.encode()):
        raise ValueError(f"--output: '{path}' is no answer file; give another name")
    return lines


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: it is unchanged or complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Within the block, turn an OSError into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        advice = "what is there is whole; make room and call again, or give another --output"
        raise OSError(
            f"--output: '{path}' cannot be written ({error.strerror or error}); {advice}"
        ) from error
