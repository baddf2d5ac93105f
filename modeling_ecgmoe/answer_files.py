"""The forms that answers take outside of Python: JSON lines, a CSV table, and a few lines of text for people.

A file of answers is written a record at a time and can be continued after an interruption.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from .adapter_card import AdapterCard

MAX_SHOWN_LABELS = 6


class CommandError(Exception):
    """The command cannot be carried out as given. The message is one line: what is wrong, what to do."""


# ---------------------------------------------------------------------------------------------------- files of results


class LineFormat(Protocol):
    """A file of results: a head, then one line for each record."""

    head: str

    def dump(self, line: dict[str, Any]) -> str:
        """The text of a record, with its end of line."""

    def parse(self, texts: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The text of each record and what it says, from lines that `dump` wrote.

        Raises:
            ValueError: it did not write these, or it did for other tasks.
        """


class JsonLines:
    """One JSON object a line, without NaN."""

    head = ""

    def __init__(self, cards: dict[str, "AdapterCard"]) -> None:
        self.tasks = set(cards)

    def dump(self, line: dict[str, Any]) -> str:
        """See `LineFormat`."""
        return json.dumps(line, allow_nan=False) + "\n"

    def parse(self, texts: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `LineFormat`."""
        for number, text in enumerate(texts, start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON") from error
            if not (isinstance(line, dict) and {"path", "status"} <= set(line)):
                raise ValueError(f"line {number} is not a result of ecgmoe predict")
            answered = set(line.get("tasks", ()))
            if line["status"] == "ok" and answered != self.tasks:
                raise ValueError(
                    f"line {number} answers {', '.join(sorted(answered))}; asked are {', '.join(sorted(self.tasks))}"
                )
            yield text, line


class CsvTable:
    """One row a record; `ecgmoe predict --help` explains the columns."""

    facts = ("record", "path", "status", "error", "sampling_rate", "leads", "duration_s", "warnings")

    def __init__(self, cards: dict[str, "AdapterCard"]) -> None:
        self.columns = list(self.facts)
        for name, card in cards.items():
            ends = {"regression": ("low", "high"), "multi_label": ("windows",)}.get(card.task.kind, ())
            evidence = ("evidence",) if card.evidence != "measured" else ()
            self.columns += [name, *(f"{name}_{part}" for part in (*ends, *card.task.labels, *evidence))]
        self.head = self._text(self.columns)

    def dump(self, line: dict[str, Any]) -> str:
        """See `LineFormat`."""
        cells = {key: line[key] for key in self.facts if key in line}
        if "quality" in line:
            cells |= {"leads": ";".join(line["leads"]), "warnings": "; ".join(line["quality"]["warnings"])}
        for name, answer in line.get("tasks", {}).items():
            cells[name] = answer["value"] if "value" in answer else ";".join(answer["labels"])
            parts = dict(zip(("low", "high"), answer.get("interval", ()), strict=False))
            parts |= answer.get("probabilities", {}) | {"evidence": answer.get("evidence", "")}
            windows = answer.get("windows", {}).items()
            parts["windows"] = ";".join(f"{label} {found['windows']}/{found['of']}" for label, found in windows)
            cells |= {f"{name}_{part}": value for part, value in parts.items()}
        return self._text([cells.get(column, "") for column in self.columns])

    def parse(self, texts: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `LineFormat`."""
        rows = csv.reader(texts)
        columns = next(rows, self.columns)
        if columns != self.columns:
            differing = sorted(set(columns) ^ set(self.columns)) or ["their order"]
            raise ValueError(f"its columns are not those of the tasks asked ({', '.join(differing[:6])} differ)")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"line {rows.line_num} has {len(row)} cells, the first {len(columns)}")
            yield self._text(row), dict(zip(columns, row, strict=True))

    @staticmethod
    def _text(row: Sequence[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        return text.getvalue()


FORMATS: dict[str, type[JsonLines] | type[CsvTable]] = {".jsonl": JsonLines, ".csv": CsvTable}
# A path that is not UTF-8 comes back as it was.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def check_out(out: Path, resume: bool, suffixes: Iterable[str] = tuple(FORMATS)) -> None:
    """Refuse an output file that cannot be, or that would be lost.

    Raises:
        CommandError: the reason.
    """
    if out.suffix.lower() not in suffixes:
        raise CommandError(f"--out {out}: expected a file ending in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder; name a file")
    if not resume and out.exists() and out.stat().st_size:
        raise CommandError(f"--out {out} holds results already; add --resume to go on with it, or name another file")


def model_file(out: Path) -> Path:
    """The small file beside a file of results that says which model gave them."""
    return out.with_name(f"{out.name}.model.json")


def check_model(out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Write down which model answers into `out`; where results are there already, refuse to go on with another.

    Args:
        identity: see `MultiTask.identity`; `model` is told, the hashes are compared.

    Raises:
        CommandError: the results are of another model or adapter, or nobody wrote down of which.
    """
    file = model_file(out)
    if resume and out.exists() and out.stat().st_size:
        if not file.is_file():
            raise CommandError(
                f"--out {out} cannot be resumed: {file.name}, which says what model gave its results, is not beside "
                "it; bring it back, or name another file"
            )
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
            differing = [f"base {begun['base']} ({begun['model']})"] if begun["base"] != identity["base"] else []
            differing += [
                f"adapter {name} {begun['adapters'].get(name)}"
                for name, weights in identity["adapters"].items()
                if begun["adapters"].get(name, weights) != weights
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(f"--out {out} cannot be resumed: {file} is damaged; name another file") from error
        if differing:
            now = [f"base {identity['base']} ({identity['model']})"]
            now += [f"adapter {name} {identity['adapters'][name]}" for name in identity["adapters"]]
            raise CommandError(
                f"--out {out} cannot be resumed: it was begun with {', '.join(differing)}, and this is "
                f"{', '.join(now)}; use the same model, or name another file"
            )
        return
    file.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def resume_out(out: Path, form: LineFormat, paths: Iterable[Path]) -> set[str]:
    """Make a file of results ready to be continued; returns the paths that it has answered.

    A last line that was not written to its end is dropped, and so are the errors of records that are asked again.

    Raises:
        CommandError: the file does not hold results of the same tasks.
    """
    if not out.exists():
        return set()
    asked, done = {str(path) for path in paths}, set()
    repaired = out.with_name(out.name + ".part")
    try:
        with out.open(**TEXT) as old, repaired.open("w", **TEXT) as new:
            new.write(form.head)
            for text, line in form.parse(text for text in old if text.endswith("\n")):
                if line["status"] == "ok":
                    done.add(line["path"])
                if line["status"] == "ok" or line["path"] not in asked:
                    new.write(text)
        repaired.replace(out)
    except ValueError as error:
        raise CommandError(f"--out {out} cannot be resumed: {error}; name another file") from error
    finally:
        repaired.unlink(missing_ok=True)
    return done


# -------------------------------------------------------------------------------------------------- a table for people


def show_record(line: dict[str, Any], cards: dict[str, "AdapterCard"]) -> str:
    """A record as a few lines of text."""
    if line["status"] != "ok":
        return printable(f"{line['error']} ({line['path']})") + "\n"
    leads, beats = " ".join(line["leads"]), line["quality"]["beats"]
    rows = [
        f"{line['record']}: {line['duration_s']:g} s at {line['sampling_rate']:g} Hz, {beats} beats, leads {leads}"
    ]
    rows += [f"  beware: {warning}" for warning in line["quality"]["warnings"]]
    width = max(map(len, cards), default=0)
    for name, answer in line["tasks"].items():
        shown = list(_show_answer(answer, cards[name]))
        if "evidence" in answer:
            shown[0] += f"  [evidence: {answer['evidence']}]"
        rows += [f"  {'' if i else name:{width}}  {text}" for i, text in enumerate(shown)]
    return "".join(printable(row) + "\n" for row in rows)


def _show_answer(answer: dict[str, Any], card: "AdapterCard") -> Iterator[str]:
    from .tasks import DESCRIPTIONS

    if "reason" in answer:
        yield f"none: {answer['reason']}"
        return
    if "value" in answer:
        interval, digits = answer.get("interval"), card.task.decimals
        ends = f"  ({answer['level']:.0%}: {interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
        yield f"{answer['value']:.{digits}f} {card.task.unit}".rstrip() + ends
        return
    probabilities = answer["probabilities"]
    given = sorted(answer["labels"], key=lambda label: -probabilities[label])
    if not given:
        best = max(probabilities, key=lambda label: probabilities[label])
        yield f"no label; the most probable is {best} {probabilities[best]:.2f}"
    for label in given[:MAX_SHOWN_LABELS]:
        yield f"{label} {probabilities[label]:.2f}  {DESCRIPTIONS.get(label, '')}".rstrip()
    if len(given) > MAX_SHOWN_LABELS:
        yield f"and {len(given) - MAX_SHOWN_LABELS} more"
    passing = {label: found for label, found in answer.get("windows", {}).items() if label not in given}
    for label, found in sorted(passing.items(), key=lambda item: -item[1]["highest"])[:MAX_SHOWN_LABELS]:
        where = f"at {found['start_s']:g} s, in {found['windows']} of {found['of']} windows"
        yield f"{label} {found['highest']:.2f} {where}  {DESCRIPTIONS.get(label, '')}".rstrip()


def printable(text: str) -> str:
    """A stranger's text made fit for a terminal: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------------- the command


@dataclass
class Output:
    """Where lines go, whole and at once: a killed program leaves at most one half-written line."""

    file: TextIO
    name: str
    dump: Callable[[dict[str, Any]], str]

    def write(self, line: dict[str, Any]) -> None:
        """Write one record.

        Raises:
            CommandError: there is no room, or the file has gone.
        """
        try:
            self.file.write(self.dump(line))
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CommandError(
                f"{self.name} cannot be written: {error.strerror}; mend that and add --resume"
            ) from error
