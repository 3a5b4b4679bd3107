"""RecBole's dataset, with exact time order and with the same rows and the same items for every model."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_hatllm.data.prepare import prepare_missing
from recbole_hatllm.data.rows import TARGET_LENGTH, Rows, RowTable
from recbole_hatllm.data.titles import read_titles
from recbole_hatllm.errors import ConfigError, DataError

_DAY = 86_400  # seconds
_UNIX_SECONDS = (1e8, 5e9)  # from 1973 to 2128: no count of days, of milliseconds or of interactions lies in there


class HatDataset(SequentialDataset):
    """Interactions in time order, cut into rows: a user, a history of at most MAX_ITEM_LIST_LENGTH items, a target.

    Until `build`, `inter_feat` is a DataFrame; after it, the same interactions as tensors, oldest first. The parts that
    `build` makes have `seen`, the training interactions; those for evaluation have besides, whatever the model's family,
    `rows`, a RowTable, and `same_day`: [R] bool, whether the user's interaction before the target was on its day (of UTC),
    or None where some time of the data is no plausible Unix time in seconds.

    Args:
        config: a `recbole_hatllm.config.Config`.

    Raises:
        DataError: a file is missing or broken; the message names it and, where there is one, the line.
    """

    # --- Loading

    def _load_inter_feat(self, token, dataset_path):
        """Sorts by time before RecBole rounds times to float32; ties keep the file's order."""
        file = Path(dataset_path) / f"{token}.inter"
        needed = {self.uid_field: "token", self.iid_field: "token", self.time_field: "float"}
        lines = _check_lines(file, needed, self.config["field_separator"])
        try:
            super()._load_inter_feat(token, dataset_path)
        except ValueError as error:  # pandas' own errors and UnicodeDecodeError are ValueErrors
            raise DataError(f"{file} cannot be read ({error}): a quote that is never closed, or no UTF-8.") from error
        if lines != len(self.inter_feat):
            raise DataError(
                f'{file} has {lines} lines, read as {len(self.inter_feat)}: remove the quotes (") in its cells.'
            )
        if self.inter_feat.empty:
            raise DataError(f"{file} is empty: below its header it needs one line for each interaction.")
        for field in needed:
            if (missing := self.inter_feat[field].isna()).any():
                raise DataError(
                    f"{file}, line {int(missing.to_numpy().argmax()) + 2}, has no {field} (an empty cell, or a word "
                    "like NA or null that pandas takes for one): fill it in or drop the line."
                )
        if np.isinf(self.inter_feat[self.time_field]).any():
            raise DataError(f"{file} has an infinite {self.time_field}: write seconds.")
        self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable", ignore_index=True)

    def _load_data(self, token, dataset_path):
        """Features of items that nobody took are dropped: they must not join the candidates."""
        super()._load_data(token, dataset_path)
        for name, field in (("user_feat", self.uid_field), ("item_feat", self.iid_field)):
            feat = getattr(self, name)
            if feat is not None:
                setattr(self, name, feat[feat[field].isin(self.inter_feat[field])].reset_index(drop=True))

    def _download(self):
        """RecBole calls it where the dataset's folder is missing; `Config` has refused names that nobody knows."""
        prepare_missing(self.dataset_name, Path(self.dataset_path), self.config["show_progress"])

    def _remove_duplication(self):
        """As RecBole, but without its unstable sort: the table is in time order already."""
        if keep := self.config["rm_dup_inter"]:
            self.inter_feat.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep, inplace=True)

    def _fill_nan(self):
        # pandas 2 announces what pandas 3 will no longer do; setup.py asks for pandas < 3.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            super()._fill_nan()

    @property
    def item_tokens(self) -> list[str]:
        """Item ids as in the files, by internal id; `[PAD]` at 0."""
        return self.field2id_token[self.iid_field].tolist()

    @property
    def history_field(self) -> str:
        """The column of rows that holds their histories."""
        return self.iid_field + self.config["LIST_SUFFIX"]

    @cached_property
    def titles(self) -> list[str]:
        """Titles by internal id, read from the `.item` file.

        Raises:
            DataError: an item has none, and `missing_title` does not say otherwise.
        """
        file = Path(self.dataset_path) / f"{self.dataset_name}.item"
        options = (self.config[key] for key in ("title_field", "year_field", "missing_title"))
        return read_titles(file, self.item_tokens, *options)

    # --- Rows

    def data_augmentation(self):
        """Nothing: rows are cut by `build`, and this table keeps the interactions themselves."""

    def build(self) -> list[HatDataset]:
        """Training, validation and test part.

        Evaluation parts hold rows. The training part holds rows for a sequential model, each with `target_length` items
        to teach where the model has `targets: all`; for a general one, every interaction that occurs in a training row
        as history or target, once.

        Raises:
            DataError: a part would be empty. ConfigError: `stride` is longer than a history.
        """
        if isinstance(self.inter_feat, pd.DataFrame):
            self._day = _days(self.inter_feat[self.time_field].to_numpy())  # before times are rounded to float32
            self._change_feat_format()
            self._declare_history()
        rows = Rows(self.inter_feat[self.uid_field].numpy(), self.config["MAX_ITEM_LIST_LENGTH"])
        split = {"leave_one_out": rows.leave_one_out, "windows": rows.windows}[self.config["protocol"]]
        train, *held_out = split()
        for name, part in zip(("training", "validation", "test"), (train, *held_out)):
            if len(part) == 0:
                raise DataError(
                    f"{self.dataset_name} leaves no {name} rows under protocol {self.config['protocol']}: it has "
                    f"{len(self.inter_feat)} interactions of {self.user_num - 1} users, and needs longer histories."
                )
        held_out = [_sample(part, self.config["eval_sample"]) for part in held_out]
        seen = Interaction(self._lines(rows.interactions(train)))
        tables = [self._table(rows, part) for part in held_out]
        if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            parts = [self._training_rows(rows, train), *tables]
        else:
            fields = (self.uid_field, self.iid_field)
            parts = [seen, *(Interaction({field: table[field] for field in fields}) for table in tables)]
        built = [self.copy(part) for part in parts]
        for dataset in built:
            dataset.seen = seen
        for dataset, table, ends in zip(built[1:], tables, held_out):
            dataset.rows = table
            dataset.same_day = self._same_day(rows, ends)
        return built

    def _declare_history(self) -> None:
        """Tells RecBole of the two columns that rows have and the file has not."""
        history = self.history_field
        setattr(self, f"{self.iid_field}_list_field", history)
        self.set_field_property(history, FeatureType.TOKEN_SEQ, FeatureSource.INTERACTION, self.max_item_list_len)
        self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)

    def _training_rows(self, rows: Rows, ends: np.ndarray) -> RowTable:
        if self.config["targets"] != "all":
            return self._table(rows, ends)
        stride = self.config["stride"] or rows.longest
        if stride > rows.longest:
            raise ConfigError(f"stride is {stride}, and must be at most MAX_ITEM_LIST_LENGTH, which is {rows.longest}.")
        ends, taught = rows.covering(ends, stride)
        table = self._table(rows, ends)
        table[TARGET_LENGTH] = torch.from_numpy(taught)
        return table

    def _table(self, rows: Rows, ends: np.ndarray) -> RowTable:
        length = torch.from_numpy(rows.length[ends])
        columns = {**self._lines(rows.order[ends]), self.item_list_length_field: length}
        items = self.inter_feat[self.iid_field][torch.from_numpy(rows.order)]
        return RowTable(columns, self.history_field, items, torch.from_numpy(ends), length, rows.longest)

    def _same_day(self, rows: Rows, ends: np.ndarray) -> torch.Tensor | None:
        if self._day is None:
            return None
        return torch.from_numpy(self._day[rows.order[ends]] == self._day[rows.order[ends - 1]])

    def _lines(self, lines: np.ndarray) -> dict[str, torch.Tensor]:
        index = torch.from_numpy(lines)
        return {name: column[index] for name, column in self.inter_feat.interaction.items()}

    def taught_items(self) -> torch.Tensor:
        """The items that the training part teaches, one entry a target; of a built training part."""
        if TARGET_LENGTH not in self.inter_feat:
            return self.inter_feat[self.iid_field]
        first = np.unique(self.seen[self.uid_field].numpy(), return_index=True)[1]
        return torch.from_numpy(np.delete(self.seen[self.iid_field].numpy(), first))

    def inter_matrix(self, form="coo", value_field=None):
        """Users x items, counting the training interactions (all of them before `build`)."""
        return self._create_sparse_matrix(
            getattr(self, "seen", self.inter_feat), self.uid_field, self.iid_field, form, value_field
        )


def _days(times: np.ndarray) -> np.ndarray | None:
    """The day of each time, [N] int64, or None where they are not all Unix times in seconds."""
    low, high = _UNIX_SECONDS
    return (times // _DAY).astype(np.int64) if low <= times.min() and times.max() <= high else None


_SAMPLE_SEED = 42  # not the run's: every model and every seed is to be measured on the same rows


def _sample(rows: np.ndarray, size: int | None) -> np.ndarray:
    """`size` of the rows, or all, in their order."""
    if size is None or size >= len(rows):
        return rows
    return rows[np.sort(np.random.RandomState(_SAMPLE_SEED).permutation(len(rows))[:size])]


# --- Broken files


def _check_lines(file: Path, needed: dict[str, str], separator: str) -> int:
    """The number of lines below the header, which must name all columns and their types.

    Raises:
        DataError: no header, a missing column, a line of another length or a time that is no number.
    """
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: it must hold the interactions, in the columns {_columns(needed, separator)}."
        )
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline().rstrip("\n")
        if not header.strip():
            raise DataError(f"{file} is empty: it must begin with the columns {_columns(needed, separator)}.")
        types = _column_types(file, header.split(separator))
        for name, kind in needed.items():
            if types.get(name) != kind:
                raise DataError(
                    f"{file}, line 1, needs a column {name}:{kind} and has {', '.join(header.split(separator))}: "
                    "rename the column, or say its name in USER_ID_FIELD, ITEM_ID_FIELD or TIME_FIELD."
                )
        at_time, count = [*types].index(list(needed)[2]), 0
        for number, line in enumerate(lines, 2):
            if not line.strip():  # pandas skips it too
                continue
            cells = line.rstrip("\n").split(separator)
            if len(cells) != len(types):
                raise DataError(
                    f"{file}, line {number}, has {len(cells)} columns and the header {len(types)}: correct the line."
                )
            try:
                float(cells[at_time] or "nan")
            except ValueError:
                name = [*types][at_time]
                raise DataError(
                    f"{file}, line {number}: the {name} {cells[at_time]!r} is no number: write seconds."
                ) from None
            count += 1
    return count


def _column_types(file: Path, columns: list[str]) -> dict[str, str]:
    types = {}
    for column in columns:
        name, _, kind = column.partition(":")
        if kind not in {kind.value for kind in FeatureType}:
            raise DataError(
                f"{file}, line 1: the column {column!r} must be written as name:type, such as {name}:token."
            )
        types[name] = kind
    return types


def _columns(needed: dict[str, str], separator: str) -> str:
    return separator.replace("\t", " <TAB> ").join(f"{name}:{kind}" for name, kind in needed.items())
