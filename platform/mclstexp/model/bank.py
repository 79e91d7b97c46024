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
from safetensors.numpy import save_file

from mclstexp.data.spots import SpotReader
from mclstexp.errors import ModelError
from mclstexp.model.nearest import directions, nearest
from mclstexp.model.towers import TwoTowers

ARRAYS, DONORS = "bank.safetensors", "bank_donors.parquet"
_DONOR_SCHEMA = pa.schema([(name, pa.string()) for name in ("section_id", "patient_id", "spot_id")])
_ARRAY_NAMES = ("keys", "payload", "directions")
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

    directions: np.ndarray = None  # type: ignore[assignment]  # made from the keys where it is not given
    """The keys' directions, see `nearest.directions`, float32 (N, D)."""

    def __post_init__(self) -> None:
        if self.directions is None:
            object.__setattr__(self, "directions", directions(self.keys))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def patient_code(self) -> np.ndarray:
        """Each spot's patient as a number from 0, in the order of their names, int32 (N,)."""
        return np.unique(self.patient_id, return_inverse=True)[1].astype(np.int32)

    def save(self, folder: str | Path, made_for: Mapping[str, str]) -> None:
        """Writes the bank into a local folder, with what it was made for: values by name."""
        notes = {_MADE_FOR: json.dumps(made_for)}  # one text: the order of several would differ from run to run
        save_file({name: getattr(self, name) for name in _ARRAY_NAMES}, Path(folder, ARRAYS), notes)
        donors = [pa.array(getattr(self, name), pa.string()) for name in _DONOR_SCHEMA.names]
        pq.write_table(pa.table(donors, schema=_DONOR_SCHEMA), Path(folder, DONORS), store_schema=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Returns the bank that `save` wrote; its arrays are memory maps, so that it may exceed the memory.

        Raises:
            ModelError: its files do not belong together, or embed Arrow types that could run code when read.
        """
        arrays, donor_file = _mapped(Path(folder, ARRAYS)), Path(folder, DONORS).read_bytes()
        if b"ARROW:" in donor_file:
            raise ModelError(f"{DONORS} in {folder} embeds Arrow type metadata, which banks never have; train it again")
        donors = pq.read_table(pa.BufferReader(donor_file), schema=_DONOR_SCHEMA)
        if any(len(values) != donors.num_rows for values in arrays.values()):
            sizes = ", ".join(f"{len(values)} {name}" for name, values in sorted(arrays.items()))
            raise ModelError(f"the bank in {folder} has {sizes} and {donors.num_rows} donors; fetch it again")
        return cls(**arrays, **{name: np.array(donors[name].to_pylist(), object) for name in donors.column_names})


def made_for(folder: str | Path) -> dict[str, str]:
    """Returns what a saved bank was made for; empty where it does not say (model versions of schema 1 and 2)."""
    with safe_open(Path(folder, ARRAYS), "numpy") as file:
        return cast(dict[str, str], json.loads((file.metadata() or {}).get(_MADE_FOR, "{}")))


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file as read-only memory maps, float32.

    Format: 8 bytes with the header's length, the header as JSON, then the arrays
    (https://huggingface.co/docs/safetensors/index#format). The library reads whole arrays into memory; here it checks
    the header.

    Raises:
        ModelError: the arrays have other names or types than a bank's.
    """
    with safe_open(path, "numpy") as file:  # raises where offsets and lengths contradict each other
        names = set(file.keys())
    whole = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    if not {"keys", "payload"} <= names <= set(_ARRAY_NAMES) or any(header[name]["dtype"] != "F32" for name in names):
        raise ModelError(f"{path} holds {', '.join(sorted(names))}, expected float32 {', '.join(_ARRAY_NAMES)}")
    spans = {name: header[name]["data_offsets"] for name in names}
    return {
        name: np.frombuffer(whole[start + first : start + last], "<f4").reshape(header[name]["shape"])
        for name, (first, last) in spans.items()
    }


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


MAX_TILES = 20_000
PERCENTILE = 1.0
_SEED = 0


def drawn_sections(num_tiles: Mapping[str, int], most: int = MAX_TILES) -> list[str]:
    """Returns the training sections whose tiles set the threshold, in the order given; none where there is but one.

    All of them, or as many whole ones as a fixed draw fits into `most` tiles; the smallest where none fits.
    """
    names, left, drawn = list(num_tiles), most, set()
    if len(names) < 2:
        return []
    if sum(num_tiles.values()) <= most:
        return names
    for index in np.random.default_rng(_SEED).permutation(len(names)):
        if num_tiles[names[index]] <= left:
            drawn.add(names[index])
            left -= num_tiles[names[index]]
    return [name for name in names if name in drawn] or [min(names, key=num_tiles.__getitem__)]


def ood_similarity(queries: Mapping[str, np.ndarray], bank: Bank) -> float | None:
    """Returns the best cosine that 1 in 100 training tiles stays below; None where nothing can be left out.

    Args:
        queries: image embeddings of training sections by their names, float32 (N, D) each.
        bank: of all training sections; each tile is asked of the keys of the others.
    """
    best = []
    for section_id, embedding in queries.items():
        others = bank.section_id != section_id
        if len(embedding) and others.any():
            found = [nearest(embedding, bank.directions[run], k=1)[1][:, 0] for run in _runs(others)]
            best.append(np.max(found, axis=0))
    return float(np.percentile(np.concatenate(best), PERCENTILE)) if best else None


def _runs(chosen: np.ndarray) -> list[slice]:
    """Returns the stretches of true values in bool (N,), so that a large array is viewed and not copied."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]
