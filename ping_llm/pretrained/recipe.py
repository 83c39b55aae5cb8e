"""How the model in the box is made: `nox -s pretrain -- DATA`.

Of each file the train rows are taken, thinned, and put side by side as networks of one data set;
with simulated networks they make the worlds that a model is trained on. docs/pretrained.md says
where the files come from, and how the result was judged.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm import addresses
from ping_llm.data.network import KNOWN, thinned
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import DataError, PingLLMError
from ping_llm.hashing import file_digest
from ping_llm.ingest.prepare import prepare_data
from ping_llm.measurements import MeasurementTable
from ping_llm.outputs import publish_json
from ping_llm.runs import read_config, with_checksum
from ping_llm.storage import Location
from ping_llm.training.export import export_run
from ping_llm.training.loop import train

SEED = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of measurements to train on.

    Attributes:
        sha256: Of the file.
        split: How its test rows, which are not trained on, are chosen.
        flipped: Bits of the first octet of its IPv4 addresses that are turned over, so that no
            address is that of another file's node; what prefixes say stays.
    """

    sha256: str
    split: Literal["pair", "time"] = "pair"
    flipped: int = 0


SOURCES = {
    "planetlab490.parquet": Source(
        "1c85ae49e005a7cbe67bc09b5433ab6259d341aa2570fba077c9cdb7bb35f80e"
    ),
    "seattle99.parquet": Source(
        "ed04fb71fab9249aaef0816e805446465171d67d890978a4c1a61d9303b2e67b", flipped=128
    ),
    "filecoin_ripe_2021.parquet": Source(
        "bc249fae74461639ef201154d1bd726a9d94cb6ecf07636a104eb7e4241ec6bd"
    ),
    "ripe_rtt50.parquet": Source(
        "05ce95fcab23976c78055a674b16f3c06536a21e2b5a5345ed6cc88bac175c08", split="time"
    ),
    "ripe_anchoring_traceroute_2019.parquet": Source(
        "08b80f6adf70d2f8228e83756cc54b72daa4229f39254da3c197d2510ab1a050", flipped=128
    ),
}

TRAINING = {
    "preset": "tiny",
    "init": "random",
    "steps": 3808,
    "learning_rate": 5e-3,
    "decay_fraction": 0.3,
    "eval_batches": 2,
    "batch_size": 64,
    "grid_fraction": 1.0,
    "simulated_fraction": 0.5,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "log_every": 100,
}


def pretrain(
    data: str | Path, output: str | Path, *, without: str | None = None, **changes: object
) -> None:
    """Makes an export in `output`; run again, it goes on where it stopped.

    Args:
        data: The directory of the files of `SOURCES`.
        output: Where everything is made: `rows`, `run` and the export `pretrained`.
        without: A file to leave out, by its name, to judge what is made on it.
        changes: Other settings of the training than `TRAINING`.

    Raises:
        DataError: A file is not the one that the recipe names.
        PingLLMError: A part of it failed.
    """
    output = Location.of(output).path
    output.mkdir(parents=True, exist_ok=True)
    sources = {name: source for name, source in SOURCES.items() if name != without}
    rows = output / "rows"
    if not (rows / "dataset.json").exists():
        merged = output / "networks.parquet"
        tables = (
            _train_rows(Location.of(data) / name, each, output) for name, each in sources.items()
        )
        pq.write_table(pa.table(MeasurementTable.concat([*tables])), merged)
        prepare_data([str(merged)], output=rows, test_fraction=0.0, valid_fraction=0.02, seed=SEED)
    train(rows, output / "run", seed=SEED, **(TRAINING | changes))
    made = Location.of(output / "pretrained")
    export_run(output / "run", str(made))
    (made / KNOWN).remove()  # it answers about networks it is given
    config = read_config(made)
    config["data"]["path"] = rows.name  # not where they were on this machine
    publish_json(made / "config.json", with_checksum(config))


def _train_rows(file: Location, source: Source, place: Path) -> MeasurementTable:
    """Returns the train rows of one file, thinned, its addresses told from those of the others."""
    with file.open_input() as content:
        digest = file_digest(content)
    if digest != source.sha256:
        raise DataError(f"{file} has SHA-256 {digest}, not {source.sha256}; get the file named")
    prepared = place / file.path.stem
    prepare_data([str(file)], output=prepared, split=source.split, seed=SEED)
    table = thinned(ProbeRows(prepared, "train").to_table())
    moved = []
    for ends in (table.src, table.dst):
        packed = addresses.as_bytes(ends).copy()
        packed[table.family == 4, 12] ^= source.flipped
        moved.append(addresses.from_bytes(packed))
    return dataclasses.replace(table, src=moved[0], dst=moved[1])


def _main() -> None:
    parser = argparse.ArgumentParser(description="Makes the model in the box.")
    parser.add_argument("data", help="directory of the files")
    parser.add_argument("output", help="where everything is made")
    parser.add_argument("--without", choices=[*SOURCES], help="a file to leave out")
    parser.add_argument("--steps", type=int, help="of the training")
    words = parser.parse_args()
    changes = {"loader_workers": max(len(os.sched_getaffinity(0)) - 2, 0)}
    if words.steps is not None:
        changes["steps"] = words.steps
    try:
        pretrain(words.data, words.output, without=words.without, **changes)
    except PingLLMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
