"""A frozen encoder's features of a tile table: found if they are stored, else computed and stored.

Every job comes here, so that none encodes a tile that has features. Each section is published as soon as it is
computed: a run that is killed loses at most the section it was working on.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import PurePosixPath
from uuid import uuid4

import ray
import torch

from mclstexp import storage
from mclstexp.config import Config
from mclstexp.data.feature_writer import damaged_parts, has_file, load_or_plain, remove_stale, write_features
from mclstexp.data.features import (
    FEATURES,
    EncoderRecord,
    FeatureManifest,
    FeatureReader,
    FeatureSection,
    feature_root,
    load_features,
)
from mclstexp.data.schema import MANIFEST, Manifest, require_views
from mclstexp.data.spots import Batch, pad
from mclstexp.data.table import read_columns
from mclstexp.errors import ConfigError, StorageError, TableError
from mclstexp.messages import some_of
from mclstexp.model.extractor import Extractor
from mclstexp.model.frozen import FrozenEncoder
from mclstexp.model.tile_stream import allowed_resources, stream_sentences
from mclstexp.model.towers import uses_bf16
from mclstexp.progress import Show, hidden

LIBRARIES = ("torch", "torchvision", "timm")
_PARALLEL_LOOKS = 16


@dataclass(frozen=True)
class Wanted:
    """Which features a job reads."""

    views: tuple[str, ...]
    dtype: str
    precision: str
    """As `train.precision`; with `auto` features of either arithmetic serve."""
    num_draws: int
    augmentation: str
    seed: int
    """Of the draws."""

    def plain_table(self, manifest: Manifest, record: EncoderRecord, arithmetic: str) -> FeatureManifest:
        """Returns the feature table, without sections, that holds exactly these features of every view of a table."""
        return FeatureManifest(
            encoder=record,
            views=manifest.views,
            dtype=self.dtype,
            arithmetic=arithmetic,
            num_draws=self.num_draws,
            augmentation=self.augmentation if self.num_draws else "none",
            seed=self.seed if self.num_draws else 0,
            libraries={name: version(name) for name in LIBRARIES},
        )

    def served_by(self, table: FeatureManifest, manifest: Manifest, record: EncoderRecord) -> bool:
        """Returns whether a feature table has them.

        It may have more layers, in another order, and more draws, and with `auto` either arithmetic.
        """
        if table.num_draws < self.num_draws or (self.precision != "auto" and table.arithmetic != self.precision):
            return False
        if not set(record.layers) <= set(table.encoder.layers):
            return False
        asked = self.plain_table(manifest, record, table.arithmetic)
        same_layers = table.encoder.model_copy(update={"layers": record.layers, "widths": record.widths})
        table = table.model_copy(update={"encoder": same_layers, "num_draws": self.num_draws})
        if not self.num_draws:
            table = table.model_copy(update={"augmentation": "none", "seed": 0})
        return table.name == asked.name


def wanted(config: Config) -> Wanted:
    """Returns the features that a configuration asks for."""
    model, train = config.model, config.train
    return Wanted(
        model.image_views, model.feature_dtype, train.precision, train.feature_draws, train.augmentation, train.seed
    )


def features(
    tiles: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    encoder: FrozenEncoder,
    wanted: Wanted,
    show: Show = hidden,
    make: bool = True,
    scratch: str | None = None,
) -> FeatureReader:
    """Returns the reader of a table that has the features of all these sections; computes those that are missing.

    Says so, because it writes beside the tile table.

    Args:
        tiles: URI of the tile table.
        manifest: of the tile table.
        section_ids: the sections.
        encoder: the encoder.
        wanted: which features.
        show: takes progress by spot.
        make: whether missing features are computed, which needs Ray.
        scratch: local folder for computed features if none can be stored beside the tiles; None: that is an error.

    Raises:
        ConfigError: the table lacks a view; without `make`, features are missing, or without `scratch` they cannot be
            stored; or one is beyond the range of float16.
        ModelError: the encoder's weights cannot be found, or a feature is not finite.
    """
    require_views(manifest, wanted.views)
    fewest = section_ids
    for place in (tiles, scratch) if scratch else (tiles,):
        for table in _tables_that_serve(place, manifest, encoder.record, wanted):
            missing = _missing(place, table, manifest, section_ids)
            if not missing:
                return FeatureReader(feature_root(place, table.name), table, wanted.views, encoder.record)
            fewest = min(fewest, missing, key=len)
    if not make:
        raise ConfigError(_command_that_makes(tiles, encoder.record, wanted, fewest))
    plain = wanted.plain_table(manifest, encoder.record, _arithmetic(wanted.precision))
    place = _place(tiles, scratch)
    todo = _missing(place, load_or_plain(place, plain), manifest, section_ids)
    table, root = make_features(tiles, manifest, todo, encoder, plain, show, place), feature_root(place, plain.name)
    print(f"stored the features of {len(todo)} section(s) by {encoder.record.name} in {root}", flush=True)
    return FeatureReader(root, table, wanted.views, encoder.record)


@dataclass(frozen=True)
class Renewal:
    """What `renew_features` did."""

    root: str
    """URI of the feature table."""
    computed: tuple[str, ...]
    """Sections whose features were computed."""
    stale: tuple[str, ...]
    """Sections whose features were removed, because the tile table has cut them again or has them no more."""
    damaged: tuple[str, ...]
    """What was damaged and computed again, in words."""


def renew_features(
    tiles: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    encoder: FrozenEncoder,
    wanted: Wanted,
    show: Show = hidden,
) -> Renewal:
    """Brings a feature table up to date: removes stale sections, reads all others, computes missing and damaged ones.

    Raises:
        ConfigError, ModelError: as `features`.
    """
    plain, _ = plan_features(tiles, manifest, section_ids, encoder, wanted)
    damaged: list[str] = []
    try:
        load_features(tiles, plain.name)
    except TableError as error:
        damaged.append(str(error).partition(";")[0])
    stale = remove_stale(tiles, plain)
    table = load_or_plain(tiles, plain)
    missing = table.missing(manifest, section_ids)
    bad = damaged_sections(tiles, table, set(section_ids) - set(missing))
    damaged += [f"section {name}: {', '.join(parts)} of {table.section(name).file}" for name, parts in bad.items()]
    todo = [name for name in section_ids if name in bad or name in missing]
    make_features(tiles, manifest, todo, encoder, plain, show)
    return Renewal(feature_root(tiles, plain.name), tuple(todo), tuple(stale), tuple(damaged))


def plan_features(
    tiles: str, manifest: Manifest, section_ids: Sequence[str], encoder: FrozenEncoder, wanted: Wanted
) -> tuple[FeatureManifest, list[str]]:
    """Returns the table that `renew_features` would bring up to date, without sections, and the missing sections."""
    plain = wanted.plain_table(manifest, encoder.record, _arithmetic(wanted.precision))
    return plain, _missing(tiles, load_or_plain(tiles, plain), manifest, section_ids)


def make_features(
    tiles: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    encoder: FrozenEncoder,
    plain: FeatureManifest,
    show: Show = hidden,
    place: str | None = None,
) -> FeatureManifest:
    """Computes and publishes the features of some sections, one after the other; returns the table as it is then.

    Args:
        tiles: URI of the tile table.
        manifest: of the tile table.
        section_ids: sections whose features are missing or damaged.
        encoder: the encoder.
        plain: what the feature table is, without sections.
        show: takes progress by spot.
        place: folder below which feature tables are; None: the tile table.

    Raises:
        ConfigError, ModelError: as `features`.
    """
    place = place or tiles
    table = load_or_plain(place, plain)
    old = {each.section_id: each for each in table.sections}
    for name in section_ids:
        if not manifest.section(name).row_groups:
            table = write_features(place, plain, manifest.section(name), (), old.get(name))
    for name, sentences in _sections(tiles, manifest, section_ids, encoder, plain, show):
        entry = manifest.section(name)
        spots = read_columns(tiles, entry, ["spot_id"])["spot_id"].to_pylist()
        table = write_features(place, plain, entry, _with_spots(spots, sentences), old.get(name))
    return table


def damaged_sections(tiles: str, table: FeatureManifest, section_ids: Iterable[str]) -> dict[str, list[str]]:
    """Returns the sections whose files do not match their digests, with the damaged parts; reads all bytes."""
    root = feature_root(tiles, table.name)
    found = {name: damaged_parts(root, table.section(name)) for name in sorted(section_ids)}
    return {name: parts for name, parts in found.items() if parts}


class _Extract:
    """Actor: the features of one sentence."""

    def __init__(self, network: ray.ObjectRef) -> None:
        state, plain = ray.get(network)
        self._extract = Extractor(state, plain, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, batch: Batch) -> Batch:
        mask = batch["mask"][0]
        views = {name: tiles[0][mask] for name, tiles in batch.items() if name.startswith("image")}
        return pad(self._extract(views, f"{batch['section_id'][0]}/{batch['group'][0]}"), len(mask))


def _sections(
    tiles: str,
    manifest: Manifest,
    section_ids: Sequence[str],
    encoder: FrozenEncoder,
    plain: FeatureManifest,
    show: Show,
) -> Iterator[tuple[str, Iterator[Batch]]]:
    """Yields (section id, its sentences' blocks), the sections in the given order; shows progress by spot."""
    if not section_ids:
        return
    what, total, done = "encoding: spots", manifest.num_spots(section_ids), 0
    show(what, 0, total, "starting")
    network = (encoder.state(), plain)

    def shown() -> Iterator[tuple[str, Batch]]:
        nonlocal done
        stream = stream_sentences(tiles, manifest, section_ids, plain.views, _Extract, network)
        for name, _, blocks in stream:
            done += len(next(iter(blocks.values())))
            show(what, done, total, name)
            yield name, blocks

    for name, sentences in groupby(shown(), key=lambda pair: pair[0]):
        yield name, (blocks for _, blocks in sentences)


def _with_spots(spots: list[str], sentences: Iterable[Batch]) -> Iterator[tuple[list[str], Batch]]:
    first = 0
    for blocks in sentences:
        end = first + len(next(iter(blocks.values())))
        yield spots[first:end], blocks
        first = end


def can_store(tiles: str) -> bool:
    """Returns whether features can be stored beside the tiles."""
    return not _fault_of_writing(tiles)


def _place(tiles: str, scratch: str | None) -> str:
    """Returns the folder below which new features are stored; says so where it is not beside the tiles.

    Raises:
        ConfigError: nothing can be written beside the tiles, and there is no scratch folder.
    """
    fault = _fault_of_writing(tiles)
    if not fault:
        return tiles
    if scratch is None:
        raise ConfigError(
            f"features are missing, and they cannot be stored beside the tiles: {fault}; run jobs/embed.py where "
            f"{tiles} can be written, or copy the table"
        )
    print(f"features cannot be stored beside the tiles ({fault}): they are computed for this once", flush=True)
    return scratch


def _fault_of_writing(tiles: str) -> str:
    """Returns why nothing can be written below a tile table's folder of features; empty if it can."""
    probe = storage.join(storage.absolute(tiles), FEATURES, f".probe-{uuid4().hex}")
    try:
        storage.write(probe, b"")
        storage.delete(probe)
    except StorageError as error:
        return str(error)
    return ""


def _tables_that_serve(tiles: str, manifest: Manifest, record: EncoderRecord, wanted: Wanted) -> list[FeatureManifest]:
    """Returns the stored tables that have the wanted features of some sections; damaged ones do not count.

    Where `auto` lets features of either arithmetic serve, those that would be made here come first.
    """
    folder = storage.join(storage.absolute(tiles), FEATURES)
    names = [PurePosixPath(uri).parent.name for uri in storage.list_files(folder) if uri.endswith(f"/{MANIFEST}")]
    tables = []
    for name in names:
        try:
            table = load_features(tiles, name)
        except TableError:
            continue
        if table is not None and wanted.served_by(table, manifest, record):
            tables.append(table)
    if len(tables) > 1:
        own = _arithmetic(wanted.precision)
        tables.sort(key=lambda table: table.arithmetic != own)
    return tables


def _missing(tiles: str, table: FeatureManifest, manifest: Manifest, section_ids: Sequence[str]) -> list[str]:
    """Returns the sections without features as the tile table has cut them, or without their file in full length."""
    missing, root = set(table.missing(manifest, section_ids)), feature_root(tiles, table.name)

    def is_lost(section: FeatureSection) -> bool:
        return not has_file(root, section)

    present = [table.section(name) for name in section_ids if name not in missing]
    with ThreadPoolExecutor(_PARALLEL_LOOKS) as pool:
        lost = pool.map(is_lost, present)
        missing |= {each.section_id for each, gone in zip(present, lost, strict=True) if gone}
    return [name for name in section_ids if name in missing]


def _command_that_makes(tiles: str, record: EncoderRecord, wanted: Wanted, missing: Sequence[str]) -> str:
    layers = f" --model.image_layers {','.join(record.layers)}"
    options = "" if record.scaling == "encoder" else f" --model.input_scaling {record.scaling}"
    if wanted.num_draws:
        options += f" --views {wanted.num_draws} --train.augmentation {wanted.augmentation}"
    weights = record.uri or "random"
    if wanted.num_draws or weights == "random":
        options += f" --train.seed {wanted.seed}"
    return (
        f"{len(missing)} section(s) have no stored features of {record.name} in {tiles}: {some_of(missing)}; make them "
        f"with python jobs/embed.py --data {tiles} --model.image_encoder {record.name} --model.image_weights {weights}"
        f"{layers} --model.feature_dtype {wanted.dtype} --train.precision {wanted.precision}"
        f"{options}"
    )


def _arithmetic(precision: str) -> str:
    """Returns what the machines compute in: `auto` is decided where an encoder will run."""
    if precision != "auto":
        return precision
    num_gpus = allowed_resources()[1] if ray.is_initialized() else torch.cuda.device_count()
    if num_gpus and not torch.cuda.is_available():
        task = ray.remote(num_gpus=1)(_native_arithmetic)
        return str(ray.get(task.remote("cuda")))
    return _native_arithmetic("cuda" if num_gpus else "cpu")


def _native_arithmetic(device: str) -> str:
    return "bf16" if uses_bf16("auto", torch.device(device)) else "fp32"
