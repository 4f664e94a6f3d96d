"""Checkpoints: the state of a long job, from which it goes on after whatever stopped it.

A checkpoint file is one line of JSON (format, version, the job's identity, size and SHA-256 of the rest) and then a
safetensors block: the tensors, and everything else as JSON in its metadata. Nothing in it is executed on load. The last
two are kept; each is written beside its place, synced, and renamed, so that a kill at any moment leaves a good one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from evoloss.errors import CheckpointError
from evoloss.provenance import read_package_versions
from evoloss.results import write_atomically
from evoloss.termination import Terminated, Termination

logger = logging.getLogger(__name__)

FORMAT = "evoloss checkpoint"
FORMAT_VERSION = 1
HEADER_BYTES = 4096
CURRENT, PREVIOUS = "current.checkpoint", "previous.checkpoint"


def compute_identity(content: Any, *files: str | Path) -> str:
    """Hash what a job computes from: parameters, input files, this package's code, the versions of its libraries."""
    known = [read_package_versions(), content]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    package = Path(__file__).parent
    for file in (*files, *sorted(package.rglob("*.py"))):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def encode_checkpoint(state: Any, identity: str) -> tuple[bytes, bytes]:
    """Return the file's first line and the rest.

    ``state``: dicts with str keys, lists, JSON scalars (inf and NaN too), tensors.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_replace_tensors(state, tensors))
    body: bytes = safetensors.torch.save(tensors, metadata={"state": text})
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "identity": identity,
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return json.dumps(header).encode() + b"\n", body


def decode_checkpoint(data: bytes, identity: str) -> Any:
    """Return the state in ``data``.

    Raises
    ------
    CheckpointError
        If it is no checkpoint, of another version or job, or damaged.
    """
    line, separator, body = data.partition(b"\n")
    if not separator or len(line) > HEADER_BYTES:
        raise CheckpointError("it is not a checkpoint of evoloss")
    try:
        header = json.loads(line)
        expected = {"format": FORMAT, "version": FORMAT_VERSION, "identity": identity}
        found = {key: header[key] for key in expected}
        size, checksum = header["size"], header["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError("it is not a checkpoint of evoloss") from error
    if found != expected:
        raise CheckpointError("it belongs to another configuration, input or version")
    if len(body) != size or hashlib.sha256(body).hexdigest() != checksum:
        raise CheckpointError("it is damaged (size or checksum)")
    try:
        tensors = safetensors.torch.load(body)
        length = int.from_bytes(body[:8], "little")
        text = json.loads(body[8 : 8 + length])["__metadata__"]["state"]
        return _restore_tensors(json.loads(text), tensors)
    except (
        safetensors.SafetensorError, ValueError, TypeError, KeyError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(f"its content is not a state ({error})") from error


class Checkpoints:
    """The last two checkpoints of one job.

    Parameters
    ----------
    directory
        Where they live: not among the job's declared outputs, which Snakemake deletes before a job runs again.
    identity
        Of the job (`compute_identity`); a checkpoint of another one is not used.
    interval
        Seconds between two checkpoints at most, as far as the job comes to safe points.
    """

    def __init__(self, directory: str | Path, identity: str, interval: float) -> None:
        self.directory = Path(directory)
        self.identity = identity
        self.interval = interval
        self._saved = time.monotonic()
        self._termination = Termination()

    def load(self) -> Any | None:
        """Return the newest good state, None without one; says what was damaged."""
        for name in (CURRENT, PREVIOUS):
            path = self.directory / name
            try:
                state = decode_checkpoint(path.read_bytes(), self.identity)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("checkpoint %s cannot be read: %s", path, error)
                continue
            except CheckpointError as error:
                logger.warning("checkpoint %s is not used: %s", path, error)
                # else the next save would put it in the place of a good previous one
                path.unlink(missing_ok=True)
                continue
            logger.info("going on from checkpoint %s", path)
            return state
        return None

    def reach_safe_point(self, get_state: Callable[[], Any], *, due: bool = False) -> None:
        """Save the state if it is ``due`` or the interval is over; leave the job if it was asked to end.

        Raises
        ------
        Terminated
            After SIGTERM, when the state is saved.
        """
        ending = self._termination.is_requested
        if due or ending or time.monotonic() - self._saved >= self.interval:
            self.save(get_state())
        if ending:
            logger.warning("asked to end: the state is saved, and the next start goes on from it")
            raise Terminated

    def save(self, state: Any) -> None:
        """Write a checkpoint. A full or failing disk costs the checkpoint, not the job: the previous one stays."""
        parts = encode_checkpoint(state, self.identity)
        current = self.directory / CURRENT

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                stream.writelines(parts)

        try:
            # if what follows fails, `load` finds the previous one
            if current.exists():
                current.replace(self.directory / PREVIOUS)
            write_atomically(current, write)
            _sync_directory(self.directory)
        except OSError as error:
            logger.warning("no checkpoint written: %s", error)
        self._saved = time.monotonic()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensor = node.detach().cpu().contiguous()
        # safetensors refuses parts of one memory, and one tensor under two names
        storage = tensor.untyped_storage()
        taken = {known.untyped_storage().data_ptr() for known in tensors.values()}
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
        tensors[name] = tensor if alone else tensor.clone()
        return {"tensor": name}
    if isinstance(node, Mapping):
        return {"dict": {key: _replace_tensors(value, tensors) for key, value in node.items()}}
    if isinstance(node, list | tuple):
        return [_replace_tensors(value, tensors) for value in node]
    return node


def _restore_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_restore_tensors(value, tensors) for value in node]
    if isinstance(node, dict):
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _restore_tensors(value, tensors) for key, value in node["dict"].items()}
    return node
