"""Takes identities out of a shard set: their pictures out of the tars, their rows out of the index, their names out of the manifest.

Everything new is written aside first, in `.forget/`; a list of what to move, `commit.json`, is written last. A kill before it leaves
the set as it was; after it, the same command moves the rest. What is moved never needs to be read again to go on.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.commit import HashedFile, committed, sync_directory
from data_shards.finish import (
    DUPLICATES,
    FAILURES,
    PAIRS,
    identity_entry_table,
    spread_of_sizes,
    wids_of,
)
from data_shards.index import IDENTITIES, IDENTITY, INDEX, MANIFEST, SAMPLE, SPLITS, WIDS, ShardSet, write_table
from data_shards.progress import progress
from data_shards.shard_plan import END
from data_shards.store import Store
from data_shards.tar_members import BLOCK, Member, dali_index, header_name, split_name

ASIDE, COMMIT = ".forget", "commit.json"
FORGOTTEN = "(forgotten {})"
"""What stands for a name afterwards; labels of the others stay as they are, in tars and checkpoints."""


@dataclass(frozen=True)
class Forgotten:
    """What was taken out."""

    pictures: int
    identities: int
    tars: int
    """That were written anew or deleted."""
    lines: int
    """Of failures.jsonl, duplicates.csv and pairs.csv."""
