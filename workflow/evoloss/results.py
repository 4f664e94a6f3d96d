"""Result files: written whole or not at all, readable by everybody."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoloss.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SEARCH_COUNTS = (
    "archive_hits",
    "zero_gradient",
    "rejected",
    "gradient_hits",
    "stopped",
    "diverged",
    "evaluated",
    "training_steps",
)
"""What a row of a search's history counts: fates of candidates, and steps of training runs, summed over candidates."""


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it to disk, then rename it to ``path``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as JSON with sorted keys; the same data always gives the same bytes. NaN is refused."""
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises `DataError` naming the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def write_parquet(
    path: str | Path, columns: Mapping[str, Sequence[Any]], metadata: Mapping[str, Any]
) -> None:
    """Write a table as parquet with ``metadata`` (JSON) in the file's schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: list(values) for name, values in columns.items()})
    text = json.dumps(metadata, sort_keys=True)
    table = table.replace_schema_metadata({"evoloss": text})
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_parquet(path: str | Path) -> pd.DataFrame:
    """Read a table written by `write_parquet`; its metadata is in ``attrs["metadata"]``."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    frame: pd.DataFrame = table.to_pandas()
    raw = (table.schema.metadata or {}).get(b"evoloss", b"{}")
    frame.attrs["metadata"] = json.loads(raw)
    return frame


def digest(data: Any) -> str:
    """Return a short SHA-256 of ``data``'s JSON form, independent of the order of keys."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
