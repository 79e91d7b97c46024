"""The reference bank: the embedded measured spots that predictions are read from.

A bank needs expression and positions only, no images. Donors (section, patient, spot) are kept with the keys, so that
every prediction can name where it came from. A saved bank is read by memory map, so it may exceed the memory; the price
is that its directions are stored beside its keys (N * D float32 more), instead of being computed at each start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from mclstexp.progress import Show, hidden

ARRAYS, DONORS = "bank.safetensors", "bank_donors.parquet"
KEY_BATCH = 32
"""Spots that attend to each other when keys of a `random_spots` model are made (as published)."""
MAX_OOD_TILES = 20_000
"""Training tiles that set the out-of-distribution threshold, at most."""
OOD_PERCENTILE = 1.0
"""Percentage of training tiles below that threshold."""
_OOD_SEED = 0
_DONOR_SCHEMA = pa.schema([(name, pa.string()) for name in ("section_id", "patient_id", "spot_id")])
_ARRAY_NAMES = ("keys", "payload", "directions")
_CHECKED_AT_ONCE = 4096
"""Spots that are checked for finite numbers at once: a bank may exceed the memory."""
_MEASURED = "measured"
_TYPES = {"F32": "<f4", "BOOL": "?"}
"""Types of stored arrays, as safetensors and NumPy call them."""
_MADE_FOR = "made_for"


@dataclass(frozen=True)
class Bank:
    """N measured spots: embeddings to find them by, their expression, and their donors. `of` makes one."""

    keys: np.ndarray
    """Spot embeddings, float32 (N, D)."""
    payload: np.ndarray
    """Normalised expression in the model's target unit, float32 (N, G); 0 for a gene that the section lacks."""
    section_id: np.ndarray
    patient_id: np.ndarray
    spot_id: np.ndarray
    directions: np.ndarray
    """The keys' `nearest.directions`, float32 (N, D), which every search needs."""
    measured: np.ndarray | None = None
    """Genes that each section measures, bool (S, G) in the order of the sections' names; None: all measure all."""

    @classmethod
    def of(
        cls,
        keys: np.ndarray,
        payload: np.ndarray,
        section_id: np.ndarray,
        patient_id: np.ndarray,
        spot_id: np.ndarray,
    ) -> "Bank":
        """Returns a bank with the directions of its keys.

        A gene that a spot's section does not measure is NaN in `payload`, in all spots of the section.
        """
        measured = ~np.isnan(payload[np.unique(section_id, return_index=True)[1]])
        if measured.all():
            return cls(keys, payload, section_id, patient_id, spot_id, directions(keys))
        return cls(keys, np.nan_to_num(payload), section_id, patient_id, spot_id, directions(keys), measured)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def patient_code(self) -> np.ndarray:
        """Index of each spot's patient among the sorted patient names, int32 (N,)."""
        return np.unique(self.patient_id, return_inverse=True)[1].astype(np.int32)

    @cached_property
    def section_code(self) -> np.ndarray:
        """Index of each spot's section among the sorted section names, int32 (N,)."""
        return np.unique(self.section_id, return_inverse=True)[1].astype(np.int32)

    @cached_property
    def mean_payload(self) -> np.ndarray:
        """Each gene's mean over the spots whose section measures it, float64 (G,); 0 if none does."""
        measured = np.ones((1, self.payload.shape[1]), bool) if self.measured is None else self.measured
        sizes = [len(self)] if self.measured is None else np.bincount(self.section_code)
        return self.payload.sum(axis=0, dtype=np.float64) / np.maximum(1, sizes @ measured.astype(np.int64))

    def of_genes(self, columns: np.ndarray) -> "Bank":
        """Returns the same bank with the payload of some genes, by their indices."""
        measured = None if self.measured is None else self.measured[:, columns]
        return replace(self, payload=self.payload[:, columns], measured=measured)

    def not_finite(self) -> str | None:
        """Returns the name of the first array with a number that is not finite, read block by block; None if none."""
        for name in _ARRAY_NAMES:
            values = getattr(self, name)
            blocks = (values[start : start + _CHECKED_AT_ONCE] for start in range(0, len(values), _CHECKED_AT_ONCE))
            if not all(np.isfinite(block).all() for block in blocks):
                return f"{name} of the bank"
        return None

    def save(self, folder: str | Path, made_for: Mapping[str, str]) -> None:
        """Writes the bank into a local folder, with a note of what it was made for: values by name."""
        notes = {_MADE_FOR: json.dumps(made_for)}  # as one text, because the order of several differs between runs
        names = _ARRAY_NAMES if self.measured is None else (*_ARRAY_NAMES, _MEASURED)
        save_file({name: getattr(self, name) for name in names}, Path(folder, ARRAYS), notes)
        donors = [pa.array(getattr(self, name), pa.string()) for name in _DONOR_SCHEMA.names]
        pq.write_table(pa.table(donors, schema=_DONOR_SCHEMA), Path(folder, DONORS), store_schema=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Returns the bank that `save` wrote; its arrays are read-only memory maps.

        On a local Linux disk the folder may be deleted once it is loaded: the maps keep the file alive.

        Directions are not compared with the keys: both are in one file, whose checksum the model version verifies.
        Banks of model schemas 1 to 3 store no directions; theirs are computed.

        Raises:
            ModelError: the files do not belong together, or embed Arrow types that could run code when read.
        """
        arrays, donor_file = _mapped(Path(folder, ARRAYS)), Path(folder, DONORS).read_bytes()
        if b"ARROW:" in donor_file:
            raise ModelError(f"{DONORS} in {folder} embeds Arrow type metadata, which banks never have; train it again")
        donors = pq.read_table(pa.BufferReader(donor_file), schema=_DONOR_SCHEMA)
        measured = arrays.pop(_MEASURED, None)
        if any(len(values) != donors.num_rows for values in arrays.values()):
            sizes = ", ".join(f"{len(values)} {name}" for name, values in sorted(arrays.items()))
            raise ModelError(f"the bank in {folder} has {sizes} and {donors.num_rows} donors; fetch it again")
        arrays |= {name: np.array(donors[name].to_pylist(), object) for name in donors.column_names}
        if measured is not None and measured.shape != (len(set(arrays["section_id"])), arrays["payload"].shape[1]):
            raise ModelError(
                f"the bank in {folder} says for {measured.shape[0]} sections and {measured.shape[1]} genes what is "
                f"measured, and has {len(set(arrays['section_id']))} sections and {arrays['payload'].shape[1]} genes; "
                "fetch it again"
            )
        return cls(**arrays, measured=measured) if "directions" in arrays else cls.of(**arrays)


def made_for(folder: str | Path) -> dict[str, str]:
    """Returns what a saved bank was made for; empty if it does not say (model schemas 1 and 2)."""
    with safe_open(Path(folder, ARRAYS), "numpy") as file:
        return cast(dict[str, str], json.loads((file.metadata() or {}).get(_MADE_FOR, "{}")))


def build_bank(
    model: TwoTowers, reader: SpotReader, section_ids: Sequence[str], random_spots: bool, show: Show = hidden
) -> Bank:
    """Returns the bank of measured sections.

    Args:
        model: in evaluation mode, on the CPU.
        reader: of the tile table, with the model's panel and normalisers.
        section_ids: the training sections, in the order of their keys.
        random_spots: whether keys are made in batches of `KEY_BATCH` spots over all sections, as the published code
            does; here in stored order, where spots of a batch are neighbours (the published order is that of the counts
            file). Otherwise each sentence attends to itself.
        show: takes progress by section.
    """
    parts = []
    for done, name in enumerate(section_ids, start=1):
        parts.append(reader.read_section(name))
        show("bank: sections", done, len(section_ids))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = [group.num_rows for name in section_ids for group in reader.manifest.section(name).row_groups]
    if random_spots:
        num_spots = sum(lengths)
        lengths = [min(KEY_BATCH, num_spots - start) for start in range(0, num_spots, KEY_BATCH)]
    keys = _embedded(model, joined.pop("expression"), joined.pop("position"), lengths)
    return Bank.of(keys, **joined)


def drawn_sections(num_tiles: Mapping[str, int], max_tiles: int = MAX_OOD_TILES) -> list[str]:
    """Returns the training sections that set the out-of-distribution threshold, in the given order.

    All sections, or as many as a draw with a fixed seed fits into `max_tiles` tiles; the smallest one if none fits.
    None if there is only one section: a tile is compared with the other sections.
    """
    names, left, drawn = list(num_tiles), max_tiles, set()
    if len(names) < 2:
        return []
    if sum(num_tiles.values()) <= max_tiles:
        return names
    for index in np.random.default_rng(_OOD_SEED).permutation(len(names)):
        if num_tiles[names[index]] <= left:
            drawn.add(names[index])
            left -= num_tiles[names[index]]
    return [name for name in names if name in drawn] or [min(names, key=num_tiles.__getitem__)]


def ood_similarity(queries: Mapping[str, np.ndarray], bank: Bank) -> float | None:
    """Returns the out-of-distribution threshold: `OOD_PERCENTILE` of the training tiles' best cosines.

    Each tile is searched among the keys of the other sections. None if the bank has only one section.

    Args:
        queries: image embeddings of training sections by section, float32 (N, D) each.
        bank: of all training sections.
    """
    best = []
    for section_id, embedding in queries.items():
        others = bank.section_id != section_id
        if len(embedding) and others.any():
            found = [nearest(embedding, bank.directions[run], k=1)[1][:, 0] for run in _runs(others)]
            best.append(np.max(found, axis=0))
    return float(np.percentile(np.concatenate(best), OOD_PERCENTILE)) if best else None


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file as read-only memory maps, float32 (`measured`: bool).

    Format: 8 bytes with the header's length, the header as JSON, then the arrays
    (https://huggingface.co/docs/safetensors/index#format). The library checks the header; it is not used to read,
    because it reads whole arrays into memory.

    Raises:
        ModelError: the arrays have other names or types than a bank's.
    """
    with safe_open(path, "numpy") as file:  # raises if offsets and lengths contradict each other
        names = set(file.keys())
    whole = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    types = {name: header[name]["dtype"] for name in names}
    expected = dict.fromkeys(_ARRAY_NAMES, "F32") | {_MEASURED: "BOOL"}
    if not {"keys", "payload"} <= names or not types.items() <= expected.items():
        raise ModelError(
            f"{path} contains {', '.join(sorted(names))}, expected float32 {', '.join(_ARRAY_NAMES)} (and bool "
            f"{_MEASURED})"
        )
    spans = {name: header[name]["data_offsets"] for name in names}
    return {
        name: np.frombuffer(whole[start + first : start + last], _TYPES[types[name]]).reshape(header[name]["shape"])
        for name, (first, last) in spans.items()
    }


@torch.inference_mode()
def _embedded(model: TwoTowers, expression: np.ndarray, position: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Returns the keys of consecutive sentences of these lengths, float32 (N, D)."""
    keys, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        expression_1LG, position_1L2 = (torch.from_numpy(values[rows])[None] for values in (expression, position))
        mask_1L = torch.ones(1, length, dtype=torch.bool)
        keys.append(model.embed_spots(expression_1LG, position_1L2, mask_1L)[0].float().numpy())
        start += length
    return np.concatenate(keys)


def _runs(chosen: np.ndarray) -> list[slice]:
    """Returns the runs of true values in bool (N,): slices are views, so that a large array is not copied."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]
