"""Gzipped IDX files: a magic number, the lengths of the axes, then unsigned bytes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslkit.errors import UserError

MAX_BYTES = 2**28  # five times the largest file of Fashion-MNIST
CHUNK = 2**20


def read_idx(file: Path, num_axes: int) -> NDArray[np.uint8]:
    """Read an array of unsigned bytes with ``num_axes`` axes.

    Memory grows with the content that is read, whatever the header says, and at most to 256 MiB.

    Raises:
        UserError: The file does not exist, is not a gzip file, or its content does not match its header.
    """
    if not file.is_file():
        raise UserError(
            f"[data] name: 'full' needs {file}; install Debian's package dataset-fashion-mnist, or set data_dir"
        )
    try:
        with gzip.open(file) as stream:
            header = stream.read(4 + 4 * num_axes)
            shape = [int(length) for length in np.frombuffer(header[4 : 4 + 4 * num_axes], dtype=">u4")]
            size = math.prod(shape)
            content = bytearray()
            valid = len(header) == 4 + 4 * num_axes and header[:4] == bytes((0, 0, 8, num_axes))
            if valid and 0 < size <= MAX_BYTES:
                content = _read_at_most(stream, size + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"[data] data_dir: {file} is not an intact gzip file: {error}") from error
    if len(content) != size or not content:
        raise UserError(
            f"[data] data_dir: {file} is not an IDX file of unsigned bytes with {num_axes} axes, or not of the size "
            f"that its header states (at most {MAX_BYTES} bytes)"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _read_at_most(stream: gzip.GzipFile, size: int) -> bytearray:
    content = bytearray()
    while len(content) < size and (chunk := stream.read(min(CHUNK, size - len(content)))):
        content += chunk
    return content
