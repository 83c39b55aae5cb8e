"""Files of other people, changed at random: an error of one line, or an answer; never a crash.

PING_LLM_FUZZ sets how many are tried in all; tests/ingest/test_fuzz_measurements.py has more.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hf_checkpoints import add_tokenizer, make_checkpoint
from mutations import cases

from ping_llm.activations import store
from ping_llm.activations.inspection import inspect_activations
from ping_llm.activations.reader import ActivationReader
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import PingLLMError
from ping_llm.extraction import arc, records, run
from ping_llm.extraction.templates import CheckpointTokenizer
from ping_llm.hashing import seal
from ping_llm.ingest.prepare import prepare_data
from ping_llm.models import huggingface
from ping_llm.runs import read_config
from ping_llm.storage import KeyValueStore, Location
from ping_llm.training.metrics import RunLog

COUNT = int(os.environ.get("PING_LLM_FUZZ", "600"))
LONGEST_S = 5.0


def rows(place: Path) -> Path:
    table = "event_time,src_addr,dst_addr,ip_version,rtt\n" + "".join(
        f"{1_700_000_000 + i},192.0.2.{i % 3},198.51.100.{i},4,{i}.5\n" for i in range(60)
    )
    (place / "pings.csv").write_text(table)
    prepare_data([str(place / "pings.csv")], str(place / "rows"))
    return place / "rows"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One sound thing of each kind."""
    place = tmp_path_factory.mktemp("fuzz")
    add_tokenizer(make_checkpoint(place / "model"))
    (place / "model" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "bos_token": None,
                "eos_token": {"content": "<|endoftext|>", "special": True},
                "additional_special_tokens": ["<|x|>"],
                "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            }
        )
    )
    lines = [{"id": f"d{i}", "text": "the cat " * i} for i in range(4)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"train": [{"input": [[1, 2]], "output": [[0]]}], "test": [{"input": [[3]]}]}
    (place / "arc.json").write_text(json.dumps({"a": task}))
    rows(place)
    store_of = {"layers": "0", "sites": "residual", "max_length": 64, "batch_tokens": 64}
    run.extract_activations(place / "model", place / "in.jsonl", place / "store", **store_of)
    (place / "run").mkdir()
    config = {"model": {"d_model": 8}, "train": {"steps": 1}, "data": {"fingerprint": "x"}}
    (place / "run" / "config.json").write_text(json.dumps(config))
    (place / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' * 4)
    return place


def read_model_config(path):
    huggingface.read_config(path.parent)


def read_weights(path):
    huggingface.load(path.parent, dtype="float32")


def read_weight_names(path):
    huggingface.checkpoint_bytes(path.parent)


def read_tokenizer(path):
    tokenizer = CheckpointTokenizer(path.parent, chat=True, vocab_size=1000)
    list(tokenizer.encode([("a", "the <|x|> cat")], add_special=True))


def read_arc(path):
    arc.read_tasks(Location.of(path).find())


def read_records(path):
    found = records.Records(str(path), columns=("text",), unit_bytes=1000, limit=None)
    for unit in found.units:
        list(found.read(unit))


def read_store(path):
    url = path.parents[2] if path.name == "done.json" else path.parent
    inspect_activations(url, verify=True)
    reader = ActivationReader(url, layer=0)
    reader.rows(slice(0, 3))


def read_rows(path):
    ProbeRows(path.parent, "train").to_table()


def read_run(path):
    read_config(Location.of(path.parent))


def read_metrics(path):
    RunLog(path, last_step=9).cut()


# What is changed, whether it is JSON, and what reads it.
KINDS = {
    "model/config.json": read_model_config,
    "model/model.safetensors": read_weight_names,
    "model/model.safetensors.index.json": read_weight_names,
    "model/tokenizer.json": read_tokenizer,
    "model/tokenizer_config.json": read_tokenizer,
    "arc.json": read_arc,
    "in.jsonl": read_records,
    "store/manifest.json": read_store,
    "store/units/00000/done.json": read_store,
    "rows/dataset.json": read_rows,
    "rows/train-00000-of-00001.arrow": read_rows,
    "run/config.json": read_run,
    "run/metrics.jsonl": read_metrics,
}
SLOW = {"model/tokenizer.json": 4, "store/manifest.json": 10, "store/units/00000/done.json": 10}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")  # of other libraries, about what is odd in a file
def test_a_changed_file_is_an_error_of_one_line_or_an_answer(place, tmp_path, name):
    top = name.partition("/")[0]
    target = tmp_path / name
    if (place / top).is_dir():
        shutil.copytree(place / top, tmp_path / top)
    if name.endswith("index.json"):
        content = {"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors"}}
        (target.parent / "model.safetensors").rename(target.parent / "model-1.safetensors")
    else:
        content = (place / name).read_bytes()
    is_json = name.endswith(".json")
    if is_json and isinstance(content, bytes):
        content = json.loads(content)
    for data in cases(name, COUNT // len(KINDS) // SLOW.get(name, 1) + 4, content):
        if top == "store":
            try:  # as one who seals what he wrote would
                data = seal({k: v for k, v in json.loads(data).items() if k != "checksum"})
            except (ValueError, AttributeError):
                continue
        target.write_bytes(data)
        started = time.monotonic()
        try:
            KINDS[name](target)
        except PingLLMError as error:
            message = str(error)
            assert message.isprintable(), message
            assert str(tmp_path) in message or target.name in message, message
        assert time.monotonic() - started < LONGEST_S, data


def test_what_is_read_is_what_stands_there(place):
    """The files that are changed above are sound, and their readers take them."""
    for name, read in KINDS.items():
        if not name.endswith("index.json"):
            read(place / name)
    assert store.open_manifest(KeyValueStore(place / "store"))["d_model"]
