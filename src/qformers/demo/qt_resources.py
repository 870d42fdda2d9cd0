"""Reads Qt resource archives (`.rcc`), in which GCompris keeps its photographs."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from qformers.errors import DataError

_COMPRESSED, _DIRECTORY, _COMPRESSED_ZSTD = 1, 2, 4


def read_resources(archive: Path, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """Every file of `archive` whose name ends in one of `suffixes`, by its path inside the archive.

    The layout is that of Qt's `rcc` tool: a header (magic, version, offsets of tree, data and names, all
    big-endian 32 bit), a tree of fixed-size nodes, data blocks and UTF-16 names each led by its length.
    Raises DataError when the file is no such archive, is cut short, or holds a wanted file packed with zstd.
    """
    content = archive.read_bytes()
    if content[:4] != b"qres":
        raise DataError(f"{archive} is not a Qt resource archive (it does not begin with 'qres'): fetch it again")
    try:
        version, tree, data, names = struct.unpack_from(">4I", content, 4)
        node_bytes = 22 if version >= 2 else 14
        files: dict[str, bytes] = {}
        pending = [(0, "")]
        while pending:
            index, parent = pending.pop()
            node = tree + index * node_bytes
            name_offset, flags = struct.unpack_from(">IH", content, node)
            path = f"{parent}/{_name(content, names + name_offset)}" if index else ""
            if flags & _DIRECTORY:
                count, first = struct.unpack_from(">II", content, node + 6)
                pending += [(child, path) for child in range(first, first + count)]
            elif path.endswith(suffixes):
                (block,) = struct.unpack_from(">I", content, node + 10)
                files[path] = _block(content, data + block, flags, archive, path)
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{archive} is damaged ({error}): fetch it again") from error
    return dict(sorted(files.items()))


def _name(content: bytes, offset: int) -> str:
    (length,) = struct.unpack_from(">H", content, offset)
    (name,) = struct.unpack_from(f"{2 * length}s", content, offset + 6)  # 4 bytes of hash lie between
    return name.decode("utf-16-be")


def _block(content: bytes, offset: int, flags: int, archive: Path, path: str) -> bytes:
    (length,) = struct.unpack_from(">I", content, offset)
    block = content[offset + 4 : offset + 4 + length]
    if len(block) < length:
        raise DataError(f"{archive} is cut short: {path} has {len(block)} of {length} bytes; fetch it again")
    if flags & _COMPRESSED_ZSTD:
        raise DataError(f"{archive} holds {path} packed with zstd, which this reader does not unpack")
    return zlib.decompress(block[4:]) if flags & _COMPRESSED else block
