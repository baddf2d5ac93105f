"""Embeddings of ECG files: one vector for each recording, to search with and to fit small models on.

A table of them holds a row for each file, in this order of columns:

| column | what |
|---|---|
| record, path | stem and path of the file |
| status, error | "ok" and null, or "error" and the reason |
| sampling_rate, leads, duration_s | of the file: Hz, lead names, seconds; null where it was refused |
| embedding | `record_size` numbers in float32, the mean over the windows of a long recording; null where refused |

The schema's metadata holds `base`, the fingerprint of the model: vectors of two models do not compare.
"""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from .adapters import SIGNAL_KEYS, MultiTask, Prepared
from .answer_files import CommandError

ROWS_AT_ONCE = 1024


class Embedder(MultiTask):
    """The model as pretrained, without any adapter: what it answers is the embedding."""

    @torch.inference_mode()
    def embed(self, windows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Prepared windows to float32 (windows, record_size)."""
        features = self.extractor.pad(windows, return_tensors="pt")
        encoded = self.encoder(**{name: features[name].to(self.device) for name in SIGNAL_KEYS})
        return self.fusion(encoded)[0].float().cpu().numpy()

    def answer(self, prepared: Sequence[Prepared], batch_size: int = 32) -> list[dict[str, Any]]:
        """{"embedding": record_size numbers} for each recording, the mean over its windows."""
        windows = [window for record in prepared for window in record.windows]
        if not windows:
            return []
        vectors = np.concatenate([self.embed(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)])
        ends = np.cumsum([len(record.windows) for record in prepared])
        return [{"embedding": part.mean(axis=0).tolist()} for part in np.split(vectors, ends[:-1])]


class EmbeddingTable:
    """A Parquet file that grows by the lines of `predict_records`, and is whole once the `with` ends, however it ends.

    Args:
        path: the file.
        base: fingerprint of the model, see `adapters.fingerprint`.
        size: numbers of an embedding.
        resume: take over from the file what it has answered, and its errors but for those of paths in `asked`.

    Attributes:
        done: the paths that it has answered.

    Raises:
        CommandError: pyarrow is missing, or the file cannot be resumed.
    """

    def __init__(self, path: Path, base: str, size: int, resume: bool = False, asked: Iterable[str] = ()) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise CommandError(
                f"--out {path} needs pyarrow, which is not installed; pip install 'ecg-moe[embed]'"
            ) from error
        self.schema = pa.schema(
            [
                ("record", pa.string()),
                ("path", pa.string()),
                ("status", pa.string()),
                ("error", pa.string()),
                ("sampling_rate", pa.float32()),
                ("leads", pa.list_(pa.string())),
                ("duration_s", pa.float32()),
                ("embedding", pa.list_(pa.float32(), size)),
            ],
            metadata={"base": base},
        )
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.rows: list[dict[str, Any]] = []
        self.done: set[str] = set()
        kept = self._kept(base, asked) if resume and path.exists() else None
        self.writer = pq.ParquetWriter(self.part, self.schema)
        if kept is not None:
            self.done = {row["path"] for row in kept.select(["path", "status"]).to_pylist() if row["status"] == "ok"}
            self.writer.write_table(kept)

    def _kept(self, base: str, asked: Iterable[str]) -> Any:
        """The rows of the file that have an embedding, and the errors of files that are not asked again."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.path)
        except pa.ArrowInvalid as error:
            raise CommandError(f"--out {self.path} is no Parquet file; name another file") from error
        found = (table.schema.metadata or {}).get(b"base", b"").decode()
        if not table.schema.equals(self.schema) or found != base:
            raise CommandError(
                f"--out {self.path} holds embeddings of another model ({found or 'unknown'}, this one is {base}); "
                "name another file"
            )
        is_asked = pc.is_in(table["path"], value_set=pa.array(list(asked), pa.string()))
        return table.filter(pc.or_(pc.equal(table["status"], "ok"), pc.invert(is_asked)))

    def write(self, line: dict[str, Any]) -> None:
        """Add the line of one record."""
        embedding = line.get("tasks", {}).get("embedding")
        self.rows.append({name: line.get(name) for name in self.schema.names} | {"embedding": embedding})
        if len(self.rows) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []

    def __enter__(self) -> "EmbeddingTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After Ctrl-C too: what is known so far is a whole file, which `resume` goes on with.
        with _uninterrupted():
            if self.rows:
                self._flush()
            self.writer.close()
            self.part.replace(self.path)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is not heard; it could leave a file half written. Threads other than the main one never hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
