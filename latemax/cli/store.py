"""``latemax store``: what a store holds, and its upkeep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from latemax.cli.terminal import printable
from latemax.store import PatchStore, StoreWriter, upgrade


def info(store: str) -> dict[str, Any]:
    """Describes a store.

    Returns:
        ``{"store", "documents", "tokens", "dim", "dtype", "codes", "ids", "generation", "shards", "bytes", "meta"}``;
        ``bytes`` is the size of all its files, ``meta`` what its maker recorded.
    """
    pages = PatchStore(store)
    return {
        "store": store,
        "documents": len(pages),
        "tokens": pages.n_tokens,
        "dim": pages.dim,
        "dtype": str(pages.dtype).removeprefix("torch."),
        "codes": pages.codes,
        "ids": pages.id_type,
        "generation": pages.generation,
        "shards": len(pages.shards),
        "bytes": _bytes(store),
        "meta": pages.meta,
    }


def render_info(found: dict[str, Any]) -> str:
    """Formats what `info` returned as text."""
    lines = [
        printable(found["store"]),
        f"  documents   {found['documents']:,} of {found['tokens']:,} tokens, dim {found['dim']}, {found['dtype']}"
        + (f" with {found['codes']} codes" if found["codes"] else ""),
        f"  on disk     {found['bytes'] / 1e6:,.1f} MB, {_counted(found['shards'], 'shard')}, "
        f"generation {found['generation']}",
        *(f"  {printable(str(key)):10}  {printable(str(value))}" for key, value in found["meta"].items()),
    ]
    return "\n".join(lines)


def verify(store: str) -> str:
    """Checks every byte of a store.

    Raises:
        StoreError: naming the file and what is wrong with it.
    """
    pages = PatchStore(store)
    pages.verify()
    held = f"{_counted(len(pages), 'document')} in {_counted(len(pages.shards), 'shard')}"
    return f"{printable(store)}: {held}, every byte is correct"


def remove(store: str, ids: Sequence[str]) -> str:
    """Removes documents, all of them or none.

    Raises:
        ValueError: an id that the store does not have.
    """
    pages = PatchStore(store)
    wanted: list[int | str] = []
    for id in dict.fromkeys(ids):
        try:
            wanted.append(int(id) if pages.id_type == "int" else id)
        except ValueError as error:
            raise ValueError(f"{store} has integer ids, got {printable(id)}; nothing was removed") from error
    with StoreWriter(store) as writer:
        unknown = [str(one) for one in wanted if one not in writer]
        if unknown:
            raise ValueError(f"{store} has no document {printable(unknown[0])}; nothing was removed")
        for one in wanted:
            writer.remove(one)
        left = len(writer)
    return f"{len(wanted)} removed; {printable(store)} holds {left} (compact gives the disk space back)"


def compact(store: str) -> str:
    """Gives back the disk space of removed and replaced documents, and joins small shards."""
    PatchStore(store)
    before = _bytes(store)
    with StoreWriter(store) as writer:
        writer.compact()
    pages = PatchStore(store)
    return (
        f"{printable(store)}: {before / 1e6:,.1f} MB before, {_bytes(store) / 1e6:,.1f} MB now in "
        f"{_counted(len(pages.shards), 'shard')}"
    )


def upgraded(store: str) -> str:
    """Gives a store of the old format (manifest.json) a catalogue."""
    upgrade(store)
    return f"{printable(store)}: up to date, {_counted(len(PatchStore(store)), 'document')}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _bytes(store: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(store) if entry.is_file())
