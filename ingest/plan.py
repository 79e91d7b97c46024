"""What a run of prepare has to do: the sections whose sources or settings changed, their geometry and genes.

Only headers are read (genes, resolution), so that most faults end the run before any tile is cut. A section's digest
covers the content of its files, not their paths or times. The trade-off: a local file is hashed again only if its size
or time changed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from ingest.header import Header, merged_genes, report
from ingest.readers import READERS
from ingest.readers.files import source_files
from ingest.readers.spots import PICTURES, Gene
from ingest.section import Recipe
from ingest.twins import require_own_files
from mclstexp import storage
from mclstexp.config import Config
from mclstexp.data.folds import similar_patients
from mclstexp.data.schema import IMAGE, IMAGE_WIDE, MANIFEST, Manifest, SectionEntry, load_genes, load_manifest
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import ConfigError, SourceError, TableError
from mclstexp.settings import TilesConfig
from mclstexp.slides.tiles import MAX_UPSAMPLING, NATIVE_RATIO, tile_scale

FileStamp = tuple[int, int, str]
"""A file's size in bytes, time of change in ns and content digest."""
ReadHeaders = Callable[[list[SectionRow]], Iterable[Header]]
_CUTTER_VERSION = 2
"""Raise it if the same sources and settings give other bytes: all sections are then cut again. 2: measured genes."""
_FILE_STAMPS = "sources.json"
_NUM_LOOKUPS = 16  # at once
_DIGEST_DIGITS = 16


@dataclass(frozen=True)
class Plan:
    """The work of one run."""

    root: str
    recipe: Recipe
    todo: dict[str, SectionRow]
    """Sections to cut, by the digest of their sources and settings."""
    kept: tuple[SectionEntry, ...]
    """Sections of the table that need no work."""
    removed: tuple[str, ...]
    """Sections of the table that are no longer in the sheet."""
    mpp: Mapping[str, float]
    """Source resolution by section."""
    genes: tuple[Gene, ...]
    """The gene table: the genes present, then new ones."""
    previous: Manifest | None
    version: str | None
    """Version of the manifest that this plan starts from."""
    stamps: Mapping[str, FileStamp]
    """Local files by path, for the next run."""
    headers: Mapping[str, Header]
    """Headers of sections that are new, have changed sources or were cut before genes were named as now."""

    @property
    def is_done(self) -> bool:
        """True if the table already matches the sheet."""
        return not self.todo and not self.removed

    @property
    def sources(self) -> str:
        """What was found in the sources that were read, in words; empty if none was."""
        num_present = self.previous.num_genes if self.previous else 0
        patients = {row.section_id: row.patient_id for row in self.todo.values()}
        patients |= {entry.section_id: entry.patient_id for entry in self.kept}
        alike = [f"warning    {warning}" for warning in similar_patients(patients)]
        return "\n".join(filter(None, [report(self.headers, self.genes, num_present), *alike]))


def make_plan(sheet_uri: str, out_uri: str, config: Config, read_headers: ReadHeaders) -> Plan:
    """Returns the work after which the table at `out_uri` matches the sheet.

    Args:
        sheet_uri: the sample sheet.
        out_uri: root of the tile table.
        config: the settings.
        read_headers: maps `read_header` over sections, in order.

    Raises:
        SheetError, SourceError, TableError: the sheet, a source or the present table has a fault.
        ConfigError: the sections' resolutions do not fit `tiles`.
    """
    rows = read_sheet(sheet_uri, READERS)
    root = storage.absolute(out_uri)
    version = storage.version(storage.join(root, MANIFEST))
    previous = None if version is None else _load_previous(root)
    entries = {entry.section_id: entry for entry in previous.sections} if previous else {}

    # Headers of sections whose sources are new or changed; the others' resolution and genes are in the table.
    sources, stamps, contents = source_digests(rows, load_stamps(root))
    require_own_files(rows, contents)
    fresh = [row for row in rows if not _is_known(entries.get(row.section_id), sources[row.section_id])]
    headers = dict(zip((row.section_id for row in fresh), read_headers(fresh), strict=True))
    mpp = {row.section_id: _mpp(row.section_id, headers, entries) for row in rows}
    recipe = Recipe(config.tiles, _table_mpp(config.tiles, mpp, previous))
    _require_wider(recipe)
    _require_no_upsampling(recipe, mpp)

    # Sections are done if both sources and settings are those of their entry.
    digests = {row.section_id: f"{sources[row.section_id]}-{_settings_digest(recipe)}" for row in rows}
    done = {name for name, entry in entries.items() if entry.fingerprint == digests.get(name)}
    return Plan(
        root,
        recipe,
        todo={digests[row.section_id]: row for row in rows if row.section_id not in done},
        kept=tuple(entries[row.section_id] for row in rows if row.section_id in done),
        removed=tuple(name for name in entries if name not in digests),
        mpp=mpp,
        genes=merged_genes(_present_genes(root, previous), [header.preview.genes for header in headers.values()]),
        previous=previous,
        version=version,
        stamps=stamps,
        headers=headers,
    )


def last_versions(plan: Plan, section_ids: Iterable[str]) -> list[SectionEntry]:
    """Returns the present entries of sections that could not be cut again, if they were cut with the same settings.

    They keep their old digest, so that the next run tries again.
    """
    present = {entry.section_id: entry for entry in plan.previous.sections} if plan.previous else {}
    found = [present[name] for name in section_ids if name in present]
    return [entry for entry in found if entry.fingerprint.split("-")[1] == _settings_digest(plan.recipe)]


def describe(plan: Plan) -> str:
    """Returns the plan in words."""
    tiles, recipe = plan.recipe.tiles, plan.recipe
    quality = f" quality {tiles.jpeg_quality}" if tiles.encoding == "jpeg" else ""
    lines = [
        f"table      {plan.root}",
        f"tiles      {tiles.size_px} px at {recipe.mpp:.4g} um/px = {tiles.size_px * recipe.mpp:.4g} um, "
        f"{tiles.encoding}{quality}, sentences of at most {tiles.sentence_length}",
        f"views      {_views(recipe)}",
        f"genes      {len(plan.genes)}",
        f"unchanged  {len(plan.kept)} section(s)",
        f"to remove  {', '.join(plan.removed) or 'none'}",
        f"to cut     {len(plan.todo)} section(s), one task of 1 CPU each",
    ]
    for row in plan.todo.values():
        scale = tile_scale(recipe.mpp, plan.mpp[row.section_id])
        how = "exact crops" if scale == 1 else f"resampled, {scale:.3g} slide px per tile px"
        lines.append(
            f"  {row.section_id}: patient {row.patient_id}, {row.format}, {plan.mpp[row.section_id]:.4g} um/px, {how}"
        )
    return "\n".join([*lines, plan.sources]).rstrip()


def _views(recipe: Recipe) -> str:
    if recipe.wide_mpp is None:
        return IMAGE
    size_px, wide_um = recipe.tiles.wide_px, recipe.tiles.wide_um
    return f"{IMAGE}, {IMAGE_WIDE} ({size_px} px at {recipe.wide_mpp:.4g} um/px = {wide_um:.4g} um)"


class Sources(NamedTuple):
    """What the source files of sections contain."""

    digests: dict[str, str]
    """Digest of all sources of a section, by section id."""
    stamps: dict[str, FileStamp]
    """Local files by path."""
    contents: dict[str, dict[str, str]]
    """Digest of each file's content, by section id and part."""


def source_digests(rows: Iterable[SectionRow], known: Mapping[str, FileStamp]) -> Sources:
    """Returns what the sections' source files contain.

    Args:
        rows: the sections.
        known: stamps of the last run.

    Raises:
        SourceError: a file is missing.
    """
    rows = list(rows)
    with ThreadPoolExecutor(_NUM_LOOKUPS) as pool:
        files = dict(zip((row.section_id for row in rows), pool.map(_made_from, rows), strict=True))
        uris = sorted({uri for parts in files.values() for uri in parts.values()})
        found = dict(zip(uris, pool.map(lambda uri: _stamp(uri, known.get(uri)), uris), strict=True))
    contents = {name: {part: found[uri][2] for part, uri in parts.items()} for name, parts in files.items()}
    digests = {row.section_id: _row_digest(row, contents[row.section_id]) for row in rows}
    return Sources(digests, {uri: stamp for uri, stamp in found.items() if not storage.is_s3(uri)}, contents)


def load_stamps(root: str) -> dict[str, FileStamp]:
    """Returns the stamps that the last run saved; empty if there are none."""
    try:
        tree = json.loads(storage.read(storage.join(root, _FILE_STAMPS)))
        return {uri: (int(size), int(changed), str(digest)) for uri, (size, changed, digest) in tree.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def save_stamps(root: str, stamps: Mapping[str, FileStamp]) -> None:
    """Saves the stamps of local files for the next run."""
    storage.write(storage.join(root, _FILE_STAMPS), json.dumps(stamps, indent=1, sort_keys=True).encode())


def _made_from(row: SectionRow) -> dict[str, str]:
    return {part: uri for part, uri in source_files(row).items() if part not in PICTURES}


def _load_previous(root: str) -> Manifest:
    try:
        return load_manifest(root)
    except TableError as error:
        raise TableError(f"{error}; or remove {storage.join(root, MANIFEST)} to start over") from None


def _is_known(entry: SectionEntry | None, source_digest: str) -> bool:
    """Returns whether the table has what a section's headers state: its sources are the same, and so are gene names.

    Genes were named otherwise in tables that do not say which ones a section measures.
    """
    if entry is None or entry.fingerprint.split("-")[0] != source_digest:
        return False
    return entry.genes is not None or not entry.measured


def _settings_digest(recipe: Recipe) -> str:
    left_out = {"allow_upsampling"} | ({"wide_um", "wide_px"} if recipe.tiles.wide_um is None else set())
    settings = recipe.tiles.model_dump(mode="json", exclude=left_out)  # without a wide view as before there was one
    settings |= {"mpp": recipe.mpp, "cutter": _CUTTER_VERSION}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]


def _mpp(section_id: str, headers: Mapping[str, Header], entries: Mapping[str, SectionEntry]) -> float:
    return headers[section_id].mpp if section_id in headers else entries[section_id].source_mpp


def _table_mpp(tiles: TilesConfig, mpp: Mapping[str, float], previous: Manifest | None) -> float:
    """Returns the tiles' resolution: the setting, else the table's or the most frequent one if all agree within 2 %.

    The table's is preferred, so that a new section does not cause all others to be cut again.
    """
    if tiles.mpp is not None:
        return tiles.mpp
    low, high = (choose(mpp, key=mpp.__getitem__) for choose in (min, max))
    if mpp[high] > NATIVE_RATIO * mpp[low]:
        raise ConfigError(
            f"tiles.mpp is empty and the sections' resolutions differ: {low} has {mpp[low]:.4g} um/px, {high} "
            f"{mpp[high]:.4g}; set tiles.mpp (to {mpp[high]:.4g} or more, so that nothing is enlarged)"
        )
    if previous and max(mpp[high], previous.mpp) <= NATIVE_RATIO * min(mpp[low], previous.mpp):
        return previous.mpp
    times = Counter(mpp.values())
    return min(times, key=lambda value: (-times[value], value))  # the same for any order of the sheet


def _require_wider(recipe: Recipe) -> None:
    """Refuses a wide view that shows no more than the tile itself."""
    tiles, tile_um = recipe.tiles, recipe.tiles.size_px * recipe.mpp
    if tiles.wide_um is not None and tiles.wide_um <= tile_um:
        raise ConfigError(
            f"tiles.wide_um={tiles.wide_um:.4g} is not wider than the tile of {tiles.size_px} px x {recipe.mpp:.4g} "
            f"um/px = {tile_um:.4g} um; raise tiles.wide_um (to {4 * tile_um:.4g}, for example), or leave the wide "
            "view out (tiles.wide_um=none)"
        )


def _require_no_upsampling(recipe: Recipe, mpp: Mapping[str, float]) -> None:
    tiles = recipe.tiles
    _require_not_enlarged(f"tiles.mpp={recipe.mpp:.4g}", "raise tiles.mpp", recipe.mpp, recipe, mpp)
    if recipe.wide_mpp is not None:
        named = f"tiles.wide_um={tiles.wide_um:.4g} in tiles.wide_px={tiles.wide_px}"
        fix = "lower tiles.wide_px, or leave the wide view out (tiles.wide_um=none),"
        _require_not_enlarged(named, fix, recipe.wide_mpp, recipe, mpp)


def _require_not_enlarged(setting: str, fix: str, target: float, recipe: Recipe, mpp: Mapping[str, float]) -> None:
    """Refuses a view's resolution that is much finer than that of a section."""
    enlarged = {name: value / target for name, value in mpp.items() if value > MAX_UPSAMPLING * target}
    if enlarged and not recipe.tiles.allow_upsampling:
        named = ", ".join(f"{name} by {factor:.3g}" for name, factor in enlarged.items())
        raise ConfigError(
            f"{setting} would enlarge {named}; at most {MAX_UPSAMPLING} is allowed: {fix} unless a model needs it, or "
            "set tiles.allow_upsampling=true"
        )


def _present_genes(root: str, previous: Manifest | None) -> list[Gene]:
    return [Gene(**gene) for gene in load_genes(root, previous).to_pylist()] if previous else []


def _stamp(uri: str, known: FileStamp | None) -> FileStamp:
    try:
        size, changed = (0, 0) if storage.is_s3(uri) else _size_and_time(uri)
    except FileNotFoundError:
        raise SourceError(f"there is no file {uri}") from None
    if known and known[:2] == (size, changed) and not storage.is_s3(uri):
        return known
    version = storage.version(uri)
    if version is None:
        raise SourceError(f"there is no file {uri}")
    return size, changed, version


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _row_digest(row: SectionRow, versions: dict[str, str]) -> str:
    columns = ("pitch_um", "mirrored", "library_id", "species", "organ")
    later = {name for name in columns if getattr(row, name) in (None, "")}
    facts = row.model_dump(exclude={*row.files, *later}) | versions  # tables of before these columns stay as they are
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]
