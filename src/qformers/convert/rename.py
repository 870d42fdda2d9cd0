"""A key table applied to tensors, in either direction, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from qformers.convert.keys import LEADING_AXIS, NO_KEY_BIAS, Table
from qformers.errors import CheckpointError
from qformers.models.tensors import Tensors


@dataclass(frozen=True)
class Row:
    """One row of a table for one layer: the same numbers under our names and under theirs."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    @property
    def stored(self) -> tuple[str, ...]:
        """Their names, without what they do not store."""
        return tuple(name for name in self.theirs if name != NO_KEY_BIAS)


def rows_of(table: Table, names: Iterable[str]) -> list[Row]:
    """The table written out, for as many layers as the numbers in `names` count."""
    numbers = (int(part) for name in names for part in name.split(".") if part.isdigit())
    layers = range(1 + max(numbers, default=0))
    rows: dict[Row, None] = {}
    for (ours, theirs), i, kind in product(table.items(), layers, ("weight", "bias")):
        filled = [tuple(name.format(i=i, w=kind) for name in _tuple(side)) for side in (ours, theirs)]
        rows[Row(filled[0], filled[1])] = None  # a row without placeholders comes once
    return list(rows)


def to_ours(tensors: Tensors, table: Table, needed: Mapping[str, Tensor], source: str) -> Tensors:
    """`tensors` under our names: exactly those that are `needed`.

    Raises:
        CheckpointError: some are missing, or one is left over; names `source` and the first of them.
    """
    recipes: dict[str, _Recipe] = {}
    used: set[str] = set()
    for row in rows_of(table, needed):
        if not all(name in needed for name in row.ours):
            continue
        if absent := [name for name in row.stored if name not in tensors.described]:
            raise CheckpointError(
                f"{source}: lacks {absent[0]}, so it is not the checkpoint of its config: fetch it again"
            )
        used.update(row.stored)
        for number, name in enumerate(row.ours):
            recipes[name] = _Recipe(row.stored, lambda parts, row=row, number=number: _read(parts, row, number))
    if homeless := [name for name in needed if name not in recipes]:
        raise CheckpointError(f"{source}: its format has no place for {homeless[0]}, which its config asks for")
    if leftover := [name for name in tensors.described if name not in used]:
        raise CheckpointError(
            f"{source}: {len(leftover)} of its tensors have no place in this model, first {leftover[0]}"
        )
    return _derived(tensors, recipes)


def to_theirs(tensors: Tensors, table: Table) -> tuple[Tensors, Tensors]:
    """`tensors` under their names, and under ours those that the table has no place for."""
    recipes: dict[str, _Recipe] = {}
    used: set[str] = set()
    for row in rows_of(table, tensors.described):
        if not all(name in tensors.described for name in row.ours):
            continue
        used.update(row.ours)
        for name in row.stored:
            number = row.theirs.index(name)
            recipes[name] = _Recipe(row.ours, lambda parts, row=row, number=number: _write(parts, row, number))
    rest = tensors.chosen(name for name in tensors.described if name not in used)
    return _derived(tensors, recipes), rest


@dataclass(frozen=True)
class _Recipe:
    sources: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


def _derived(tensors: Tensors, recipes: dict[str, _Recipe]) -> Tensors:
    """New tensors from others, in the others' order so that each file is opened once."""
    place = {name: number for number, name in enumerate(tensors.described)}
    ordered = sorted(recipes, key=lambda name: place[recipes[name].sources[0]])

    def make(name: str, read: Callable[[str], Tensor]) -> Tensor:
        return recipes[name].make([read(source) for source in recipes[name].sources])

    # The same operations on the meta device give shapes and dtypes without reading anything.
    described = {name: make(name, tensors.described.__getitem__) for name in ordered}
    return Tensors(described, lambda name: make(name, tensors.read))


def _read(parts: list[Tensor], row: Row, number: int) -> Tensor:
    """Our tensor `number` of the row from all that they store of it."""
    if NO_KEY_BIAS in row.theirs:
        parts = parts.copy()
        parts.insert(row.theirs.index(NO_KEY_BIAS), torch.zeros_like(parts[0]))
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if row.ours[0] in LEADING_AXIS:
        return whole[0]
    return whole.chunk(len(row.ours))[number] if len(row.ours) > 1 else whole


def _write(parts: list[Tensor], row: Row, number: int) -> Tensor:
    """Their tensor `number` of the row from all of ours."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if row.ours[0] in LEADING_AXIS:
        return whole[None]
    return whole.chunk(len(row.theirs))[number] if len(row.theirs) > 1 else whole


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
