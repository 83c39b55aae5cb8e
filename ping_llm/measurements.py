"""The one table of measurements: who pinged whom, when, and what came back.

It goes to and from every library that speaks Arrow (pandas, polars, DuckDB, pyarrow):
`MeasurementTable.from_arrow(frame)`, `polars.DataFrame(table)`, `pyarrow.table(table).to_pandas()`.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from ping_llm import addresses, columns
from ping_llm.errors import DataError

NO_TIME = int(np.iinfo(np.int64).min)
KINDS = ("ping", "hop", "end")  # indices are the values of `kind`


@dataclasses.dataclass(frozen=True)
class _ColumnSpec:
    """All that is said of one column; reading, writing and checking follow it.

    Attributes:
        arrow: Its name in Arrow.
        dtype: Its dtype.
        wanted: How an error says what a value should be.
        read: Returns (values, OK / MISSING / INVALID) of an Arrow array.
        missing: What stands for a null; None where there must be a value.
        accepts: Says which of the values read are good.
    """

    arrow: str
    dtype: np.dtype
    wanted: str
    read: Callable[[pa.Array], tuple[np.ndarray, np.ndarray]] = columns.read_numbers
    missing: float | None = None
    accepts: Callable[[np.ndarray], np.ndarray] = lambda values: np.ones(len(values), bool)

    def arrow_type(self) -> pa.DataType:
        return columns.from_numpy(np.zeros(0, self.dtype)).type

    def from_arrow(self, array: pa.Array, row: int) -> np.ndarray:
        """Returns the values of `array`, of which the first stands in row `row`."""
        if not len(array):  # of any type: a library cannot know that of a column without values
            return np.zeros(0, self.dtype)
        values, problems = self.read(array)
        bad = (problems == columns.INVALID) | ((problems == columns.OK) & ~self.accepts(values))
        absent = problems == columns.MISSING
        if self.missing is None:
            bad |= absent
        for i in np.flatnonzero(bad):
            shown = "missing" if absent[i] else repr(array[int(i)].as_py())
            raise DataError(f"row {row + i}: {self.arrow} is {shown}; expected {self.wanted}")
        values = values.astype(self.dtype, copy=False)
        return np.where(absent, self.dtype.type(self.missing), values) if absent.any() else values

    def to_arrow(self, values: np.ndarray) -> pa.Array:
        if self.dtype == addresses.ADDRESS:
            return columns.from_numpy(values)
        unknown = np.isnan(values) if self.dtype.kind == "f" else values == NO_TIME
        return pa.array(values, mask=unknown if unknown.any() else None)


def _within(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: (values >= low) & (values <= high)  # false for NaN


def _among(*choices: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.isin(values, choices)


_FLOAT, _LARGEST = np.dtype(np.float32), float(np.finfo(np.float32).max)
_ADDRESS = addresses.ADDRESS, "an address like 192.0.2.1 or 2001:db8::1", columns.read_addresses
_TIME = _ColumnSpec(
    "event_time",
    np.dtype("i8"),
    "ISO 8601 or seconds since 1970, not milliseconds, up to 2106",
    columns.read_times,
    NO_TIME,
    _within(0, 2**32 - 1),
)
_FAMILY = _ColumnSpec("ip_version", np.dtype("i1"), "4 or 6", accepts=_among(4, 6))
_RTT = _ColumnSpec("rtt", _FLOAT, "ms, -1 = failed", accepts=_within(-_LARGEST, _LARGEST))
_MEANINGS = "0 for ping, 1 for hop or 2 for end"
_KIND = _ColumnSpec("kind", np.dtype("u1"), _MEANINGS, missing=0, accepts=_among(0, 1, 2))
_SHARE = "a fraction from 0 to 1"
_LOSS = _ColumnSpec("loss", _FLOAT, _SHARE, missing=np.nan, accepts=_within(0, 1))
_AT_LEAST_0 = _within(0, _LARGEST)
_SPREAD = _ColumnSpec("spread", _FLOAT, "ms, at least 0", missing=np.nan, accepts=_AT_LEAST_0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasurementTable:
    """Measurements, one array a column, each with the spec that its conversions and checks follow.

    Attributes:
        time: Seconds since 1970 UTC, `NO_TIME` where it is not known [n], int64.
        src: Source addresses [n], `addresses.ADDRESS`.
        dst: Destination addresses [n], `addresses.ADDRESS`.
        family: 4 or 6, of both addresses [n], int8.
        rtt: Round-trip time in ms, below 0 where the measurement failed [n], float32.
        kind: Index into `KINDS` [n], uint8; None: all are pings.
        loss: Fraction of the packets that were lost, NaN where unknown [n], float32; None: unknown.
        spread: Largest minus smallest RTT in ms, NaN where unknown [n], float32; None: unknown.

    Raises:
        DataError: A column has another dtype or length than it should.
    """

    time: Annotated[np.ndarray, _TIME]
    src: Annotated[np.ndarray, _ColumnSpec("src_addr", *_ADDRESS)]
    dst: Annotated[np.ndarray, _ColumnSpec("dst_addr", *_ADDRESS)]
    family: Annotated[np.ndarray, _FAMILY]
    rtt: Annotated[np.ndarray, _RTT]
    kind: Annotated[np.ndarray | None, _KIND] = None
    loss: Annotated[np.ndarray | None, _LOSS] = None
    spread: Annotated[np.ndarray | None, _SPREAD] = None

    def __post_init__(self) -> None:
        for name, values in self._present().items():
            expected = COLUMNS[name].dtype, (len(self.time),)
            if (values.dtype, values.shape) != expected:
                raise DataError(
                    f"column {name} is {values.dtype} {list(values.shape)}; "
                    f"expected {expected[0]} {list(expected[1])}"
                )

    def __len__(self) -> int:
        return len(self.time)

    @property
    def names(self) -> set[str]:
        """The columns that are there."""
        return {*self._present()}

    def _present(self) -> dict[str, np.ndarray]:
        named = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in named.items() if values is not None}

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> "MeasurementTable":
        return MeasurementTable(**{name: change(v) for name, v in self._present().items()})

    @property
    def has_time(self) -> np.ndarray:
        """Whether each time is known [n], bool."""
        return self.time != NO_TIME

    def take(self, index: np.ndarray) -> "MeasurementTable":
        """Returns the measurements at `index`, numbers or booleans."""
        return self._map(lambda values: values[index])

    def slice(self, start: int, stop: int) -> "MeasurementTable":
        """Returns measurements [start, stop) as views."""
        return self._map(lambda values: values[start:stop])

    def sorted(self) -> "MeasurementTable":
        """Returns the measurements by family, source, time, destination and RTT, failed first."""
        src_high, src_low = addresses.words(self.src)
        dst_high, dst_low = addresses.words(self.dst)
        rtt = np.where(self.rtt < 0, np.float32(-1), self.rtt)
        return self.take(np.lexsort((rtt, dst_low, dst_high, self.time, src_low, src_high)))

    def mirrored(self) -> "MeasurementTable":
        """Returns the measurements as if made from their destinations, less those to oneself."""
        apart = self.take(self.src != self.dst)
        return dataclasses.replace(apart, src=apart.dst, dst=apart.src)

    @classmethod
    def empty(cls) -> "MeasurementTable":
        """Returns a table without measurements."""
        required = {n: np.zeros(0, c.dtype) for n, c in COLUMNS.items() if n not in _OPTIONAL}
        return cls(**required)

    @classmethod
    def concat(cls, tables: Sequence["MeasurementTable"]) -> "MeasurementTable":
        """Returns the measurements of `tables`, end to end.

        A column that only some of them have gets what stands for a null in the others: ping, or
        NaN.
        """
        if len(tables) < 2:
            return tables[0] if tables else cls.empty()
        names = dict.fromkeys(name for table in tables for name in table._present())
        return cls(**{n: np.concatenate([table.column(n) for table in tables]) for n in names})

    def column(self, name: str) -> np.ndarray:
        """Returns a column; of one that is not there, what stands for a null [n]."""
        column, values = COLUMNS[name], getattr(self, name)
        return np.full(len(self), column.missing, column.dtype) if values is None else values

    @classmethod
    def from_arrow(
        cls, data: Any, *, questions: bool = False, first_row: int = 1
    ) -> "MeasurementTable":
        """Returns the measurements of a table of another library.

        Columns are src_addr, dst_addr and rtt, and may be event_time, ip_version, kind, loss and
        spread; others are ignored. Addresses are text or fixed_size_binary(16), times are
        timestamps, seconds since 1970 or ISO 8601, and all may be text of any encoding. A null
        time is unknown.

        Args:
            data: Whatever `pyarrow.table` takes: a pandas, polars or Arrow table, anything with
                `__arrow_c_stream__`, or a dictionary of lists.
            questions: Whether rows ask for an RTT rather than tell one: it is -1, and a column rtt
                is ignored.
            first_row: Number of the first row in messages.

        Raises:
            DataError: A column is absent, or a value is missing or not what it should be.
        """
        if hasattr(data, "iloc"):  # pandas: a column that nobody asks for may be of any type
            _check_names(list(map(str, data.columns)), questions)
            data = data.loc[:, data.columns.isin([column.arrow for column in COLUMNS.values()])]
        try:
            table = pa.table(data)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"this is no table: {error}") from None
        _check_names(table.schema.names, questions)
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
        rows = np.cumsum([first_row, *map(len, batches)]).tolist()
        try:
            tables = [_from_batch(*each, questions) for each in zip(batches, rows, strict=False)]
        except (pa.ArrowException, UnicodeError) as error:
            raise DataError(f"this is no table of measurements: {error}") from None
        return cls.concat(tables)

    def to_arrow(self) -> pa.Table:
        """Returns the measurements in their compact form.

        event_time int64 seconds, null where unknown; src_addr and dst_addr fixed_size_binary(16),
        IPv4 as IPv4-mapped IPv6; ip_version int8; rtt float32 ms; and the optional columns there
        are. Without copies where nothing is null.
        """
        present = self._present().items()
        return pa.table({COLUMNS[name].arrow: COLUMNS[name].to_arrow(v) for name, v in present})

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Returns the measurements as people read them, for pandas, polars and others.

        As `to_arrow`, but for addresses as text and times as UTC timestamps of seconds.
        """
        table = self.to_arrow()
        for i, field in enumerate(table.schema):
            if field.type == pa.binary(16):
                table = table.set_column(i, field.name, _texts(table[i].combine_chunks()))
            elif field.name == COLUMNS["time"].arrow:
                utc = table[i].cast(pa.timestamp("s", "UTC"))
                table = table.set_column(i, field.name, utc)
        return table.__arrow_c_stream__(requested_schema)


COLUMNS = {f.name: f.type.__metadata__[0] for f in dataclasses.fields(MeasurementTable)}
_OPTIONAL = {f.name for f in dataclasses.fields(MeasurementTable) if f.default is None}


def _texts(array: pa.Array) -> pa.Array:
    encoded = array.dictionary_encode()
    texts = addresses.to_text(columns.to_numpy(encoded.dictionary))
    return pa.array(texts, pa.large_string()).take(encoded.indices)


def _check_names(names: Sequence[str], questions: bool) -> None:
    for name, column in COLUMNS.items():
        if names.count(column.arrow) > 1:
            raise DataError(f"the table has several columns {column.arrow}; give one")
        needed = name in ("src", "dst") or (name == "rtt" and not questions)
        if needed and column.arrow not in names:
            raise DataError(f"the table has no column {column.arrow}; it has {', '.join(names)}")


def _from_batch(batch: pa.RecordBatch, row: int, questions: bool) -> MeasurementTable:
    values = {
        name: column.from_arrow(batch[column.arrow], row)
        for name, column in COLUMNS.items()
        if column.arrow in batch.schema.names and not (questions and name == "rtt")
    }
    families = [addresses.family(values[name]) for name in ("src", "dst")]
    values.setdefault("time", np.full(len(batch), NO_TIME))
    values.setdefault("family", families[0])
    if questions:
        values.setdefault("rtt", np.full(len(batch), -1, np.float32))
    for i in np.flatnonzero((families[0] != families[1]) | (families[0] != values["family"])):
        src, dst = (addresses.to_text(values[name][i : i + 1])[0] for name in ("src", "dst"))
        raise DataError(
            f"row {row + i}: {src}, {dst} and ip_version {values['family'][i]} are of different "
            "families; give IPv4 or IPv6"
        )
    return MeasurementTable(**values)
