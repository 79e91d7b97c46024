"""The reference bank: embedded measured spots that predictions are read from.

Keys need no images, so building a bank reads expression and positions alone. Donors (section, patient, spot) stay
with the keys, so that every prediction can name whom it came from.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mclstexp.data.spots import SpotReader
from mclstexp.errors import ModelError
from mclstexp.inference.cosine import directions
from mclstexp.model.towers import TwoTowers

ARRAYS, DONORS = "bank.safetensors", "bank_donors.parquet"
_DONOR_SCHEMA = pa.schema([(name, pa.string()) for name in ("section_id", "patient_id", "spot_id")])
_MADE_FOR = "made_for"
KEY_BATCH = 32
"""Spots that attend to each other when keys of a `random_spots` model are made (as published)."""


@dataclass(frozen=True)
class Bank:
    """N measured spots: what they are found by, what they say, and whose they are."""

    keys: np.ndarray
    """Spot embeddings, float32 (N, D)."""
    payload: np.ndarray
    """Normalised expression in the model's target unit, float32 (N, G)."""
    section_id: np.ndarray
    patient_id: np.ndarray
    spot_id: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def directions(self) -> np.ndarray:
        """The keys' directions, see `cosine.directions`, float32 (N, D); kept, since every query asks for them."""
        return directions(self.keys)

    @cached_property
    def patient_code(self) -> np.ndarray:
        """Each spot's patient as a number from 0, in the order of their names, int32 (N,)."""
        return np.unique(self.patient_id, return_inverse=True)[1].astype(np.int32)

    def save(self, folder: str | Path, made_for: Mapping[str, str]) -> None:
        """Writes the bank into a local folder, with what it was made for: values by name."""
        notes = {_MADE_FOR: json.dumps(made_for)}  # one text: the order of several would differ from run to run
        save_file({"keys": self.keys, "payload": self.payload}, Path(folder, ARRAYS), notes)
        donors = [pa.array(getattr(self, name), pa.string()) for name in _DONOR_SCHEMA.names]
        pq.write_table(pa.table(donors, schema=_DONOR_SCHEMA), Path(folder, DONORS), store_schema=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Returns the bank that `save` wrote.

        Raises:
            ModelError: its files do not belong together, or embed Arrow types that could run code when read.
        """
        arrays, donor_file = load_file(Path(folder, ARRAYS)), Path(folder, DONORS).read_bytes()
        if b"ARROW:" in donor_file:
            raise ModelError(f"{DONORS} in {folder} embeds Arrow type metadata, which banks never have; train it again")
        donors = pq.read_table(pa.BufferReader(donor_file), schema=_DONOR_SCHEMA)
        rows = [len(arrays["keys"]), len(arrays["payload"]), donors.num_rows]
        if len(set(rows)) > 1:
            raise ModelError(f"the bank in {folder} has {rows[0]} keys, {rows[1]} payloads and {rows[2]} donors")
        return cls(**arrays, **{name: np.array(donors[name].to_pylist(), object) for name in donors.column_names})


def made_for(folder: str | Path) -> dict[str, str]:
    """Returns what a saved bank was made for; empty where it does not say (model versions of schema 1 and 2)."""
    with safe_open(Path(folder, ARRAYS), "numpy") as file:
        return cast(dict[str, str], json.loads((file.metadata() or {}).get(_MADE_FOR, "{}")))


def build_bank(
    model: TwoTowers, reader: SpotReader, section_ids: Iterable[str], random_spots: bool, done: Callable[[], None]
) -> Bank:
    """Returns the bank of measured sections.

    Args:
        model: in evaluation mode, on the CPU.
        reader: of the tile table, with the model's panel and normalisers.
        section_ids: the training sections, in the order of their keys.
        random_spots: keys are made in batches of 32 spots over all sections, as the published code does, though in
            stored order, where neighbours stand together (it takes the counts file's); else each sentence attends to
            itself.
        done: called after each section.
    """
    parts = []
    for name in section_ids:
        parts.append(reader.read_section(name))
        done()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = [group.num_rows for name in section_ids for group in reader.manifest.section(name).row_groups]
    if random_spots:
        num_spots = sum(lengths)
        lengths = [min(KEY_BATCH, num_spots - start) for start in range(0, num_spots, KEY_BATCH)]
    keys = _embed(model, joined.pop("expression"), joined.pop("position"), lengths)
    return Bank(keys, **joined)


@torch.inference_mode()
def _embed(model: TwoTowers, expression: np.ndarray, position: np.ndarray, lengths: list[int]) -> np.ndarray:
    keys, start = [], 0
    for length in lengths:
        stretch = slice(start, start + length)
        spots, places = (torch.from_numpy(values[stretch])[None] for values in (expression, position))
        keys.append(model.embed_spots(spots, places, torch.ones(1, length, dtype=torch.bool))[0].float().numpy())
        start += length
    return np.concatenate(keys)
