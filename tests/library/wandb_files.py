"""What the file of an offline run of Weights & Biases holds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

# The layout of a file, which is that of LevelDB's logs: a header, then blocks of chunks.
FILE_HEADER = 7
BLOCK = 32768
CHUNK_HEADER = 7
# The kinds of the chunk that ends a record: a whole record, and its last part.
ENDS = (1, 4)

# Seconds that W&B's own process has to write the end of a run.
PATIENCE = 60.0


def records_of(content: bytes) -> list[bytes]:
    """Return the records of a file."""
    records = []
    record = b""
    place = FILE_HEADER
    while place < len(content):
        room = BLOCK - place % BLOCK
        if room < CHUNK_HEADER:
            # No chunk begins so near to the end of a block.
            place += room
            continue
        size = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        place += CHUNK_HEADER
        record += content[place : place + size]
        place += size
        if kind in ENDS:
            records.append(record)
            record = b""
    return records


def history_of(run: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return the step and the values of each row of an offline run that has ended.

    This waits until its end is written.
    """
    from wandb.proto import wandb_internal_pb2

    # A process has one place for all of its runs, the working folder of the first one.
    folder = Path(run.dir).parent
    assert folder.name.startswith("offline-run-")
    (file,) = folder.glob("*.wandb")
    give_up = time.monotonic() + PATIENCE
    while True:
        rows = []
        has_ended = False
        for content in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            kind = record.WhichOneof("record_type")
            has_ended = has_ended or kind == "exit"
            if kind == "history":
                values = {}
                for item in record.history.item:
                    values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
                rows.append((record.history.step.num, values))
        if has_ended:
            return rows
        assert time.monotonic() < give_up, "the end of the run was not written"
        time.sleep(0.1)
