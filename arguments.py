"""The arguments of a program: from words and a JSON file, held to their ranges, and refused in one line."""

import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from modeling_ecgmoe.answer_files import printable

REFUSED, INTERRUPTED = 2, 130  # exit statuses, as those of `ecgmoe`
SOURCES = Path(__file__).resolve().parent
OWN_FOLDERS = (SOURCES, SOURCES / "data_builders", SOURCES / "modeling_ecgmoe")
RANGES: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda value: 0 <= value < math.inf,
    "at least 1": lambda value: 1 <= value < math.inf,
    "above 0": lambda value: 0 < value < math.inf,
    "between 0 and 1": lambda value: 0 < value < 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
}


class _Parser(HfArgumentParser):
    """Mistakes are errors like all others: one line, no page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


def parse_arguments(kinds: tuple[type, ...], argv: Sequence[str], program: str | None = None) -> tuple[Any, ...]:
    """The argument dataclasses from the words of a command line, the first of which may be a JSON file with others.

    Args:
        kinds: dataclasses; what they refuse when they are made is refused here.
        program: what `--help` calls it, the file that runs where not given.

    Raises:
        FileNotFoundError: there is no such JSON file.
        ValueError: an argument is unknown, not of its type or out of its range.
    """
    parser = _Parser(kinds, prog=program)
    words = list(argv)
    if words and words[0].endswith(".json"):
        words = [*_words_of(Path(words[0]), kinds), *words[1:]]
    *found, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(found)


def _words_of(file: Path, kinds: tuple[type, ...]) -> list[str]:
    """What a JSON file holds, as the words that would say the same."""
    values = read_json_object(file)
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{file} holds {', '.join(unknown)}; the arguments are {', '.join(known)}")
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def read_json_object(file: Path) -> dict[str, Any]:
    """The values of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; check the path")
    return parse_json_object(file.read_bytes(), str(file))


def parse_json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """The values of a JSON object.

    Args:
        name: what the message calls the text.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON object, and is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object, found {json.dumps(values)[:80]}")
    return values


def check_ranges(arguments: Any, ranges: Mapping[str, Sequence[str]]) -> None:
    """Hold numbers to their ranges; None is none.

    Args:
        ranges: a key of `RANGES` to the names of the arguments that must lie in it.

    Raises:
        ValueError: one does not.
    """
    for text, names in ranges.items():
        for name in names:
            value = getattr(arguments, name)
            if value is not None and not RANGES[text](value):
                raise ValueError(f"--{name} must be {text}, found {value}")


def check_choices(arguments: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Hold texts to what is known; None is none.

    Raises:
        ValueError: one is not among its choices.
    """
    for name, known in choices.items():
        value = getattr(arguments, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, found {value!r}")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder for results, before the work that gives them.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be made ({error.strerror}); name another folder") from error


def run_program(program: Callable[[list[str]], None], argv: list[str], name: str) -> int:
    """Run a program; gives the exit status. What its user can mend is one line on stderr, a defect a traceback."""
    try:
        program(argv)
    except (ValueError, FileNotFoundError) as error:
        if not is_refusal(error):
            raise
        print(f"{name}:", printable(" ".join(str(error).split())), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def is_refusal(error: Exception) -> bool:
    """Whether a `raise` in this project's files made the error: then its message is for the user.

    What the interpreter or a library raised is a defect, whose traceback is worth reading.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = Path(frames[-1].filename).resolve().parent if frames else None
    return where in OWN_FOLDERS and (frames[-1].line or "").startswith("raise ")
