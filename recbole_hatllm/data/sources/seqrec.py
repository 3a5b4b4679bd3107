"""proc.zip of the SeqRecBenchmark datasets: two pickled tables, read without running what else a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
from pandas._libs.internals import _unpickle_block
from pandas.core.indexes.base import _new_Index
from pandas.core.internals.managers import BlockManager

from recbole_hatllm.data.sources.raw import Builder, RawData, label, members, number, open_bytes
from recbole_hatllm.errors import DataError

INTER, ITEMS = "user2item.pkl", "item2title.pkl"

# Names in a pickled table (pandas 1.3 to 2, pickle protocols 4 and 5) and what they stand for. numpy itself says which
# functions rebuild its arrays: their modules differ between its versions.
_array, _scalar = np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0]  # type: ignore[index]
_buffer = np.empty(0).__reduce_ex__(5)[0]  # type: ignore[index]
_ADMITTED = {
    "builtins.slice": slice,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _buffer,
    "numpy._core.numeric._frombuffer": _buffer,
    "pandas._libs.internals._unpickle_block": _unpickle_block,
    "pandas.core.frame.DataFrame": pd.DataFrame,
    "pandas.core.indexes.base.Index": pd.Index,
    "pandas.core.indexes.base._new_Index": _new_Index,
    "pandas.core.indexes.range.RangeIndex": pd.RangeIndex,
    "pandas.core.internals.managers.BlockManager": BlockManager,
}


class _Tables(pickle.Unpickler):
    """Admits exactly what a plain table needs."""

    def find_class(self, module: str, name: str) -> object:
        admitted = _ADMITTED.get(f"{module}.{name}")
        if admitted is None:
            raise DataError(f"the pickle asks for {module}.{name}, which a table does not need")
        return admitted


def read(paths: dict[str, Path]) -> RawData:
    """A row is a user with lists of items and times, oldest first; ids are numbers from 100.

    Args:
        paths: the role "archive", or "inter" and "items" for the two pickles.

    Raises:
        DataError: a table is missing, damaged, of other columns, or its pickle holds more than a table.
    """
    inter, items = _find(paths)
    builder = Builder()
    try:
        for user, taken, times in zip(*_columns(inter, "UserID", "ItemID", "Timestamp")):
            if len(taken) != len(times):
                raise ValueError(f"user {user} has {len(taken)} items and {len(times)} times")
            builder.extend((str(int(user)), str(int(item)), number(time)) for item, time in zip(taken, times))
        titles = {str(int(item)): title for item, title in zip(*_columns(items, "ItemID", "Title"))}
    except (TypeError, ValueError) as error:
        raise DataError(f"{inter[0]} holds no sequences as it should ({error}): fetch it again.") from error
    return builder.build(str(inter[0]), {item: title for item, title in titles.items() if isinstance(title, str)}, [])


def _columns(place: tuple[Path, str | None], *names: str) -> list[list]:
    """Columns of a pickled table."""
    source = label(*place)
    with open_bytes(*place) as stream:
        try:
            table = _Tables(stream).load()
        except DataError as error:
            raise DataError(f"{source} was not read: {error}; take the file from another place.") from None
        except Exception as error:  # what a damaged pickle raises depends on where it is damaged
            raise DataError(f"{source} is no pickled table ({error}): fetch it again.") from error
    if not isinstance(table, pd.DataFrame) or not {*names} <= {*table.columns}:
        has = ", ".join(map(str, table.columns)) if isinstance(table, pd.DataFrame) else type(table).__name__
        raise DataError(f"{source} has {has} where {', '.join(names)} should be: it is no file of SeqRecBenchmark.")
    return [table[name].tolist() for name in names]


def _find(paths: dict[str, Path]) -> tuple[tuple[Path, str | None], tuple[Path, str | None]]:
    """(file, member of the archive) of the sequences and of the titles."""
    if "archive" not in paths:
        return (paths["inter"], None), (paths["items"], None)
    file = paths["archive"]
    inside = {name.rsplit("/", 1)[-1]: name for name in members(file)}
    for name in (INTER, ITEMS):
        if name not in inside:
            raise DataError(f"{file} has no {name}: it must be the proc.zip of a SeqRecBenchmark dataset with titles.")
    return (file, inside[INTER]), (file, inside[ITEMS])
