"""From ECG files to output lines: what the command line and the Space share. For a line see `record_answers`."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapters import MultiTask
from .ecg_files import Ecg, EcgFileError, read_ecg
from .feature_extraction_ecgmoe import Prepared
from .leads import find_lead
from .record_answers import BATCH_SIZE, LoadedRecord, answer_records, prepare_record, refuse_record

NUM_READERS = 2


@dataclass(frozen=True)
class FileFacts:
    """What the caller knows about files that do not say it themselves.

    Args:
        sampling_rate: in Hz.
        leads: the channels of a file that does not name them, or not as leads, in file order; of another the leads to
            use.
        unit: "V", "mV", "uV" or "nV".
    """

    sampling_rate: float | None = None
    leads: tuple[str, ...] | None = None
    unit: str | None = None


def read_record(path: Path, facts: FileFacts) -> Ecg:
    """Read a file, and of it the leads that the caller asks for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or lacks a fact or a lead; one line.
    """
    try:
        ecg = read_ecg(path, sampling_rate=facts.sampling_rate, unit=facts.unit)
    except EcgFileError as error:
        # Where it is the names that the file does not say, `leads` are these names and not a choice among them.
        if facts.leads is None or "--leads" not in str(error):
            raise
        return read_ecg(path, sampling_rate=facts.sampling_rate, lead_names=facts.leads, unit=facts.unit)
    if facts.leads is None:
        return ecg
    if not any(map(find_lead, ecg.lead_names)) and len(ecg.lead_names) == len(facts.leads):
        # The file's own names ("ECG1", "chan 2") say nothing: the caller names its channels.
        return read_ecg(path, sampling_rate=facts.sampling_rate, lead_names=facts.leads, unit=facts.unit)
    wanted = {find_lead(name): name for name in facts.leads}
    rows = [row for row, name in enumerate(ecg.lead_names) if find_lead(name) in wanted and find_lead(name)]
    missing = set(wanted) - {find_lead(ecg.lead_names[row]) for row in rows}
    if missing:
        names = ", ".join(wanted[lead] for lead in wanted if lead in missing)
        raise ValueError(f"it has no lead {names}, its leads are {', '.join(ecg.lead_names)}; choose among them")
    return replace(ecg, signal=ecg.signal[rows], lead_names=tuple(ecg.lead_names[row] for row in rows))


def load_record(many: MultiTask, path: Path, facts: FileFacts) -> LoadedRecord:
    """Read a file and make it ready for the model. What goes wrong becomes the record's line and is not raised."""
    line: dict[str, Any] = {"record": path.stem, "path": str(path)}
    try:
        ecg = read_record(path, facts)
        return prepare_record(many, line, ecg.signal, ecg.sampling_rate, ecg.lead_names, ecg.remark)
    except FileNotFoundError as error:
        return refuse_record(line, f"{error}; check the path")
    except ValueError as error:
        return refuse_record(line, str(error))
    except Exception as error:  # noqa: BLE001  whatever one file of an archive stumbles over, the others go on
        reason = f"{type(error).__name__}: {error}; leave it out, and report it if the file is sound"
        return refuse_record(line, reason)


def predict_record(
    many: MultiTask, path: Path, facts: FileFacts | None = None
) -> tuple[dict[str, Any], Prepared | None]:
    """The line of one file, and what the model saw of it, None where the file was refused."""
    record = load_record(many, path, facts or FileFacts())
    return answer_records(many, [record], BATCH_SIZE)[0], record.prepared


def predict_records(
    many: MultiTask, paths: Iterable[Path], facts: FileFacts | None = None, batch_size: int = BATCH_SIZE
) -> Generator[dict[str, Any], None, None]:
    """The lines of many files, in their order.

    Threads read ahead while the model works, a few files at a time, and stop where what is ready fills two batches:
    memory does not grow with the number of files.
    """
    waiting = iter(paths)
    pending: deque[Future[LoadedRecord]] = deque()
    batch: list[LoadedRecord] = []
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-ecg")

    def read_ahead() -> None:
        ready = sum(future.result().num_windows for future in pending if future.done())
        # Nobody knows how many windows a file will give before it is read, so few are under way at once.
        under_way = sum(not future.done() for future in pending)
        while len(pending) < 2 * batch_size and ready < 2 * batch_size and under_way < 2 * NUM_READERS:
            path = next(waiting, None)
            if path is None:
                return
            pending.append(pool.submit(load_record, many, path, facts or FileFacts()))
            under_way += 1

    try:
        read_ahead()
        while pending:
            batch.append(pending.popleft().result())
            read_ahead()
            if len(batch) >= batch_size or sum(record.num_windows for record in batch) >= batch_size:
                yield from answer_records(many, batch, batch_size)
                batch = []
        yield from answer_records(many, batch, batch_size)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
