"""The settings of `ping-llm prepare-data`."""

import re
from typing import TYPE_CHECKING, Literal

from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field

if TYPE_CHECKING:
    from ping_llm.ingest.files import Reading
    from ping_llm.places import Attribute

_OURS = {"time": "event_time", "src": "src_addr", "dst": "dst_addr", "version": "ip_version"}
_OURS |= {name: name for name in ("rtt", "kind", "loss", "spread")}
SMALLEST_MEMORY = 500_000_000
ATTRIBUTES: "dict[str, Attribute]" = {"asn": "asn", "region": "country"}  # by split, of `Places`
_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MULTIPLES |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class PrepareSettings(Settings):
    """Turn measurements into probe rows for training.

    INPUT is a file, a directory or a glob of Parquet, Arrow or CSV measurements, or of RIPE Atlas
    pings and traceroutes (JSON, a result a line or an array; .gz, .bz2, .xz, .zst and .tar too).
    An INPUT may also be `-` (standard input) or a URL: https://, hf://datasets/..., gs://, s3://.
    Each INPUT is one input to `--split time`. Records that cannot be used are counted by reason and
    kept in OUTPUT/rejected.parquet.

    Attributes:
        inputs: Files, directories, globs or URLs; - for standard input.
        output: Directory for the rows; may be remote.
        split: How valid and test are held out: by pair, time or probe; or, with --prefixes, by
            autonomous system (asn) or country (region), all addresses of one together.
        prefixes: Who is where: CSV with the columns prefix and asn or country, or pyasn's text.
        valid_fraction: Fraction held out for choosing settings.
        test_fraction: Fraction held out for the final evaluation.
        seed: Seed that decides which pairs or probes are held out.
        row_cap_mb: Size of the largest row in MB (1e6 bytes).
        columns: Names of columns that are not ours, such as src=source_ip,dst=target,rtt=latency;
            ours are time, src, dst, version, rtt, kind, loss and spread.
        rtt_unit: Unit of the RTTs in tables: ms, s or us.
        failed_values: What stands for a failure where an RTT should be, such as timeout,*,nan.
        traceroutes: What is taken of RIPE Atlas traceroutes: their destination and each public
            address on the way, their destination, or nothing.
        both_ends: Also count train measurements as made from their destinations.
        memory_limit: Most memory to use, such as 4GB or 512MiB.
        workers: Number of threads.
        engine: Sort on this machine or with Spark, which needs the extra [spark].
    """

    inputs: tuple[str, ...] = field(argument=True, location=True, stored=False, metavar="INPUT...")
    output: str = field(location=True, stored=False, metavar="DIR")
    split: Literal["pair", "time", "probe", "asn", "region"] = "pair"
    prefixes: str | None = field(default=None, location=True, stored=False)
    valid_fraction: float = field(default=0.05, ge=0, lt=1)
    test_fraction: float = field(default=0.1, ge=0, lt=1)
    seed: int = field(default=0, ge=0, lt=2**63)
    row_cap_mb: float = field(default=8.0, ge=0.001, le=1000)
    columns: str | None = field(default=None, metavar="NAMES")
    rtt_unit: Literal["ms", "s", "us"] = "ms"
    failed_values: str | None = field(default=None, metavar="VALUES")
    traceroutes: Literal["hops", "end", "no"] = "hops"
    both_ends: bool = False
    memory_limit: str = field(default="4GB", stored=False)
    workers: int | None = field(default=None, gt=0, stored=False, default_text="one per CPU")
    engine: Literal["local", "spark"] = field(default="local", stored=False)

    def check(self) -> None:
        """Raises a `ConfigError` if nothing is left to train on, or the memory is too little."""
        if self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} "
                "leave nothing to train on; their sum must be below 1"
            )
        if (self.prefixes is not None) != (self.split in ATTRIBUTES):
            raise ConfigError(
                f"--prefixes is for --split {' or '.join(ATTRIBUTES)}, and needed there; this is "
                f"split={self.split}"
            )
        _ = self.reading
        if self.memory_bytes < SMALLEST_MEMORY:
            raise ConfigError(
                f"memory_limit={self.memory_limit} must be at least {SMALLEST_MEMORY:,} bytes"
            )

    @property
    def reading(self) -> "Reading":
        """How the inputs are read.

        Raises:
            ConfigError: `columns` is no list of pairs, or names a column twice or one we have not.
        """
        from ping_llm.ingest.files import Reading

        pairs = [pair.partition("=") for pair in self.columns.split(",")] if self.columns else []
        named = [ours.strip() for ours, _, _ in pairs]
        for (ours, _, theirs), name in zip(pairs, named, strict=True):
            if name not in _OURS or not theirs.strip() or named.count(name) > 1:
                raise ConfigError(
                    f"columns={self.columns!r}: {ours!r} is not one of {', '.join(_OURS)}, once, "
                    "with = and the file's name"
                )
        return Reading(
            traceroutes=self.traceroutes,
            columns=tuple((_OURS[ours.strip()], theirs.strip()) for ours, _, theirs in pairs),
            rtt_scale={"ms": 1.0, "s": 1000.0, "us": 0.001}[self.rtt_unit],
            failed=tuple(v.strip() for v in (self.failed_values or "").split(",") if v.strip()),
        )

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes: "4GB" is 4e9, "512MiB" is 512 * 2**20, "1000" is 1000."""
        text = self.memory_limit.strip().upper()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text)
        if match is None:
            raise ConfigError(
                f"memory_limit={self.memory_limit!r} is not a size; give one like 4GB or 512MiB"
            )
        return int(float(match[1]) * _MULTIPLES[match[2] or ""])

    @property
    def row_cap_bytes(self) -> int:
        """The largest row, in bytes."""
        return int(self.row_cap_mb * 1e6)
