"""What W&B wrote offline, read back from its own files."""

import struct
from collections.abc import Iterator
from pathlib import Path


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes. Blocks of
    32 KiB hold pieces with a checksum, a length and a kind: whole, first, middle or last."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_back(folder: Path) -> tuple[list[dict], dict, set[str], dict]:
    """History rows, summary, run ids and config of all offline runs that W&B keeps in a folder."""
    from wandb.proto import wandb_internal_pb2

    history, summary, ids, config = [], {}, set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                history.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
            elif kind == "summary":
                updates = record.summary.update
                summary |= {"/".join(i.nested_key) or i.key: i.value_json for i in updates}
            elif kind == "run":
                ids.add(record.run.run_id)
                config |= {i.key: i.value_json for i in record.run.config.update}
    return history, summary, ids, config
