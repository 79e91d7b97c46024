"""Writing of feature tables: one section after the other, each visible as soon as it is complete.

The manifest is replaced only if nobody else replaced it meanwhile; otherwise the section is added to what the other
writer published, so that two runs that compute the same features both end well.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from mclstexp import storage
from mclstexp.data.features import RGB, FeatureGroup, FeatureManifest, FeatureSection, feature_root, load_features
from mclstexp.data.row_groups import write_groups
from mclstexp.data.schema import MANIFEST, SectionEntry, load_manifest
from mclstexp.errors import ConfigError, ConflictError, ModelError, StorageError, TableError

_PARALLEL_GROUPS = 8
_NAMED_DIGITS = 12  # of a file's digest
_MAGIC = b"PAR1"

Blocks = Mapping[str, np.ndarray]
"""The features of a sentence: float32 (n, width) by column."""


def write_features(
    tiles: str,
    plain: FeatureManifest,
    entry: SectionEntry,
    sentences: Iterable[tuple[Sequence[str], Blocks]],
    damaged: FeatureSection | None = None,
) -> FeatureManifest:
    """Writes the features of a section and publishes them; returns the feature table as it is then.

    If another run published this section meanwhile, its features stay.

    Args:
        tiles: URI of the tile table.
        plain: what the feature table is, without sections.
        entry: the section in the tile table.
        sentences: spot ids and blocks of each sentence.
        damaged: the section's features that these replace.

    Raises:
        ConfigError: a feature is beyond the range of float16.
        ModelError: a feature is not finite.
    """
    root = feature_root(tiles, plain.name)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch, "features.parquet")
        section = _write(local, plain, entry, sentences)
        storage.upload(local, storage.join(root, section.file))

    def added(sections: dict[str, FeatureSection]) -> None:
        existing = sections.get(section.section_id)
        if existing in (None, damaged) or existing.tiles_sha256 != section.tiles_sha256:
            sections[section.section_id] = section

    old = load_or_plain(tiles, plain)
    new = _publish(root, tiles, plain, added)
    _remove_unnamed(root, {section.file} | {each.file for each in old.sections}, new)
    return new


def remove_stale(tiles: str, plain: FeatureManifest) -> list[str]:
    """Removes sections that the tile table has cut again, or has no more; returns their names."""
    root, old = feature_root(tiles, plain.name), load_or_plain(tiles, plain)
    cut = {entry.section_id: entry.sha256 for entry in load_manifest(tiles).sections}
    stale = {each.section_id: each for each in old.sections if cut.get(each.section_id) != each.tiles_sha256}

    def removed(sections: dict[str, FeatureSection]) -> None:
        for name in [name for name, each in sections.items() if each == stale.get(name)]:
            del sections[name]

    if stale:
        _remove_unnamed(root, {each.file for each in stale.values()}, _publish(root, tiles, plain, removed))
    return sorted(stale)


def load_or_plain(tiles: str, plain: FeatureManifest) -> FeatureManifest:
    """Returns the feature table as it is published; a table without sections if there is none, or a damaged one."""
    with suppress(TableError):
        return load_features(tiles, plain.name) or plain
    return plain


def has_file(root: str, section: FeatureSection) -> bool:
    """Returns whether a section's file is there in full length."""
    with suppress(FileNotFoundError):
        return storage.size(storage.join(root, section.file)) == section.size_bytes
    return False


def damaged_parts(root: str, section: FeatureSection) -> list[str]:
    """Returns the parts of a section's file that do not match their digest, in words; reads all of it."""
    uri = storage.join(root, section.file)
    groups = {f"sentence {i}": (each.offset, each.length, each.sha256) for i, each in enumerate(section.row_groups)}
    footer = (section.footer_offset, section.size_bytes - section.footer_offset, section.footer_sha256)
    parts = {"head": (0, len(_MAGIC), _digest(_MAGIC)), **groups, "footer": footer}

    def is_sound(part: tuple[int, int, str]) -> bool:
        offset, length, sha256 = part
        with suppress(FileNotFoundError, StorageError):
            return _digest(storage.read(uri, offset, length)) == sha256
        return False

    with ThreadPoolExecutor(_PARALLEL_GROUPS) as pool:
        return [name for name, sound in zip(parts, pool.map(is_sound, parts.values()), strict=True) if not sound]


def _write(
    local: Path, plain: FeatureManifest, entry: SectionEntry, sentences: Iterable[tuple[Sequence[str], Blocks]]
) -> FeatureSection:
    """Writes a section's file; returns its entry, with the digests of its parts."""
    groups = (_group(plain, entry.section_id, *sentence) for sentence in sentences)
    written = write_groups(local, plain.arrow_schema(), groups, "none", [])
    with open(local, "rb") as file:

        def digest(offset: int, length: int) -> str:
            file.seek(offset)
            return _digest(file.read(length))

        digests = [digest(group.offset, group.length) for group in written.row_groups]
        footer = digest(written.footer_offset, written.size_bytes - written.footer_offset)
    return FeatureSection(
        section_id=entry.section_id,
        tiles_sha256=entry.sha256,
        file=f"{entry.section_id}-{written.sha256[:_NAMED_DIGITS]}.parquet",
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        footer_offset=written.footer_offset,
        footer_sha256=footer,
        row_groups=tuple(
            FeatureGroup(offset=group.offset, length=group.length, num_rows=group.num_rows, sha256=digest)
            for group, digest in zip(written.row_groups, digests, strict=True)
        ),
    )


def _group(plain: FeatureManifest, section_id: str, spot_ids: Sequence[str], blocks: Blocks) -> pa.Table:
    """Returns a sentence as a row group."""
    columns: list[pa.Array] = [pa.array(spot_ids, pa.string())]
    for field in plain.arrow_schema():
        if field.name == "spot_id":
            continue
        values = blocks[field.name]
        kind = np.dtype("<f4") if field.name.endswith(f"/{RGB}") else plain.number_type()
        _require_finite(values, kind, f"section {section_id}", field.name, spot_ids)
        data = pa.py_buffer(np.ascontiguousarray(values, kind).tobytes())
        columns.append(pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, data]))
    return pa.table(columns, schema=plain.arrow_schema())


def _require_finite(values: np.ndarray, kind: np.dtype, where: str, block: str, spot_ids: Sequence[str]) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ModelError(
            f"{where}, spot {spot_ids[int(np.argmin(finite))]}: the encoder's features {block} are not finite; check "
            "its weights (model.image_weights), or compute with train.precision=fp32"
        )
    limit = float(np.finfo(kind).max)
    beyond = np.abs(values).max(axis=1, initial=0) > limit
    if beyond.any():
        spot = int(np.argmax(beyond))
        raise ConfigError(
            f"{where}, spot {spot_ids[spot]}: a feature of {block} is {np.abs(values[spot]).max():g}, beyond "
            f"{limit:g}, the largest {kind.name}; use model.feature_dtype=float32"
        )


def _publish(
    root: str, tiles: str, plain: FeatureManifest, change: Callable[[dict[str, FeatureSection]], None]
) -> FeatureManifest:
    """Applies a change to the sections as they are published, again and again until no other writer comes between."""
    uri = storage.join(root, MANIFEST)
    while True:
        version = storage.version(uri)
        sections = {each.section_id: each for each in load_or_plain(tiles, plain).sections}
        change(sections)
        new = plain.model_copy(update={"sections": tuple(sections[name] for name in sorted(sections))})
        with suppress(ConflictError):
            storage.publish(uri, new.encode(), version)
            return new


def _remove_unnamed(root: str, files: Iterable[str], manifest: FeatureManifest) -> None:
    """Removes those files that the manifest does not name."""
    for name in sorted(set(files) - {each.file for each in manifest.sections}):
        storage.delete(storage.join(root, name))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
