"""Features of a tile table: equal to a plain forward pass, computed once, and never another encoder's."""

import pickle
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from feature_tables import plain_table, section_blocks, small_tiles, write
from small_table import empty_manifest
from torch.nn.functional import adaptive_avg_pool2d

from mclstexp import storage
from mclstexp.config import Config, override
from mclstexp.data.features import FEATURES, RGB, FeatureManifest, FeatureReader
from mclstexp.data.schema import MANIFEST, Manifest, load_manifest
from mclstexp.data.spots import decode_tiles
from mclstexp.data.table import read_sentence, write_section
from mclstexp.errors import ConfigError
from mclstexp.model import extract
from mclstexp.model.extract import Wanted, can_store, features, renew_features, wanted
from mclstexp.model.extractor import Extractor
from mclstexp.model.frozen import FrozenEncoder, frozen_encoder
from mclstexp.settings import ModelConfig

CPU = torch.device("cpu")
SMALL = ModelConfig(image_encoder="small_cnn", freeze_encoder=True)
BOTH = ("image", "image_wide")
PLAIN = Wanted(("image",), "float32", "fp32", 0, "default", 0)


def _tiles(num: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)


def _encoder(seed: int = 0, **changes: object) -> FrozenEncoder:
    return frozen_encoder(SMALL.model_copy(update=changes), 32, seed)


def _plain(encoder: FrozenEncoder, **known: object) -> FeatureManifest:
    return plain_table(**({"encoder": encoder.record, "num_draws": 0, "augmentation": "none"} | known))


def _independent(encoder: FrozenEncoder, tiles: np.ndarray) -> np.ndarray:
    """Returns the pooled feature of the small network by the layers' own modules, one tile at a time."""
    state = {name.removeprefix("network."): value for name, value in encoder.state().items()}
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
        layers += [torch.nn.Conv2d(before, after, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers)
    network.load_state_dict(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(tiles) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return torch.cat([adaptive_avg_pool2d(network.eval()(image[None]), 1).flatten(1) for image in images]).numpy()


def test_blocks_are_the_encoders_features_of_each_view() -> None:
    encoder, views = _encoder(), {"image": _tiles(20), "image_wide": _tiles(20, 16, 1)}
    blocks = Extractor(encoder.state(), _plain(encoder), CPU)(views, "S1/0")
    assert set(blocks) == {f"{view}/{block}" for view in BOTH for block in ("pooled", RGB)}
    for view in BOTH:
        assert blocks[f"{view}/pooled"].dtype == np.float32
        assert blocks[f"{view}/pooled"] == pytest.approx(_independent(encoder, views[view]), abs=1e-5)
    colour = np.concatenate([(views["image"] / 255).mean((1, 2)), (views["image"] / 255).std((1, 2))], axis=1)
    assert blocks["image/rgb"] == pytest.approx(colour, abs=1e-5)


def test_layers_are_columns_of_their_own() -> None:
    encoder = _encoder(image_layers=("third", "pooled"))
    views = {"image": _tiles(3), "image_wide": _tiles(3)}
    blocks = Extractor(encoder.state(), _plain(encoder), CPU)(views, "S1/0")
    assert blocks["image/third"].shape == (3, 96)
    assert blocks["image/pooled"] == pytest.approx(_independent(encoder, views["image"]), abs=1e-5)


def test_draws_are_fixed_by_seed_sentence_and_number_and_shared_by_the_views() -> None:
    encoder, tiles = _encoder(), _tiles(24)
    views = {"image": tiles, "image_wide": tiles}

    def blocks(sentence: str = "S1/0", **known: object) -> dict[str, np.ndarray]:
        plain = _plain(encoder, **({"num_draws": 2, "augmentation": "flips"} | known))
        return Extractor(encoder.state(), plain, CPU)(views, sentence)

    first = blocks()
    assert all(np.array_equal(first[name], values) for name, values in blocks().items())
    assert np.array_equal(first["image/pooled/0"], first["image_wide/pooled/0"])
    assert np.array_equal(first["image/pooled/1"], blocks(num_draws=4)["image/pooled/1"]), "more draws keep the first"
    others = [first["image/pooled/1"], first["image/pooled"]]
    others += [blocks(seed=1)["image/pooled/0"], blocks("S1/1")["image/pooled/0"]]
    assert all(not np.allclose(first["image/pooled/0"], other, atol=1e-6) for other in others)
    sides = [np.rot90(side, turns, (1, 2)) for side in (tiles, tiles[:, ::-1]) for turns in range(4)]
    by_side = np.stack([_independent(encoder, np.ascontiguousarray(side)) for side in sides])
    nearest = np.abs(by_side - first["image/pooled/0"]).max(axis=2).min(axis=0)
    assert nearest == pytest.approx(np.zeros(24), abs=1e-5), "each draw is one of the eight orientations"


def test_what_a_configuration_asks_for() -> None:
    changes = {
        "model.freeze_encoder": True,
        "model.image_views": BOTH,
        "model.feature_dtype": "float16",
        "train.feature_draws": 3,
        "train.augmentation": "flips",
        "train.seed": 5,
        "train.precision": "bf16",
    }
    assert wanted(override(Config(), changes, "test")) == Wanted(BOTH, "float16", "bf16", 3, "flips", 5)


def test_a_table_serves_whoever_asks_for_no_more_than_it_has() -> None:
    manifest, record = empty_manifest(), _encoder().record
    three = replace(PLAIN, num_draws=3)
    table = three.plain_table(manifest, record, "fp32")
    serves = [PLAIN, three, replace(three, num_draws=1), replace(PLAIN, seed=9), replace(PLAIN, precision="auto")]
    assert all(each.served_by(table, manifest, record) for each in serves)
    others = [
        replace(three, num_draws=4),
        replace(three, seed=1),
        replace(three, augmentation="flips"),
        replace(PLAIN, precision="bf16"),
        replace(PLAIN, dtype="float16"),
    ]
    assert not any(each.served_by(table, manifest, record) for each in others)
    assert not PLAIN.served_by(table, manifest, _encoder(1).record), "another encoder file is never mixed with it"
    newer = table.model_copy(update={"libraries": table.libraries | {"timm": "99"}})
    assert not PLAIN.served_by(newer, manifest, record)
    bf16 = PLAIN.plain_table(manifest, record, "bf16")
    assert replace(PLAIN, precision="auto").served_by(bf16, manifest, record)
    both, third = (_encoder(image_layers=layers).record for layers in (("third", "pooled"), ("third",)))
    layered = three.plain_table(manifest, both, "fp32")
    assert all(PLAIN.served_by(layered, manifest, each) for each in (record, third, both))
    assert not any(PLAIN.served_by(table, manifest, each) for each in (third, both))
    assert not PLAIN.served_by(layered, manifest, _encoder(1).record)


def _copied(tiles: str, folder: Path) -> tuple[str, Manifest]:
    root = str(folder / "tiles")
    shutil.copytree(tiles, root, ignore=shutil.ignore_patterns("features"))
    return root, load_manifest(root)


def _expected(root: str, manifest: Manifest, name: str, encoder: FrozenEncoder) -> np.ndarray:
    entry = manifest.section(name)
    tables = [read_sentence(root, entry, group) for group in range(len(entry.row_groups))]
    return np.concatenate([_independent(encoder, decode_tiles(each["image"].to_pylist(), 32)) for each in tables])


@pytest.mark.ray
def test_features_are_made_once_and_read_by_everybody(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, manifest = _copied(tiles, tmp_path)
    names = [entry.section_id for entry in manifest.sections[:2]]
    encoder, reports = _encoder(), []
    with pytest.raises(ConfigError, match=r"2 section\(s\) have no stored features .*jobs/embed.py --data .*small_cnn"):
        features(root, manifest, names, encoder, PLAIN, make=False)
    reader = features(root, manifest, names, encoder, PLAIN, lambda *report: reports.append(report))
    assert reports[-1][1:3] == (manifest.num_spots(names), manifest.num_spots(names))
    assert capsys.readouterr().out == f"stored the features of 2 section(s) by small_cnn in {reader.root}\n"
    for name in names:
        assert reader.read_section(name) == pytest.approx(_expected(root, manifest, name, encoder), abs=1e-5)

    computed: list[str] = []
    plainly = extract.stream_sentences

    def noted(root, manifest, section_ids, *rest):
        computed.extend(section_ids)
        return plainly(root, manifest, section_ids, *rest)

    monkeypatch.setattr(extract, "stream_sentences", noted)
    auto = replace(PLAIN, precision="auto")
    for each in (PLAIN, auto):
        assert features(root, manifest, names, encoder, each, make=False).manifest == reader.manifest
    assert capsys.readouterr().out == ""
    third = manifest.sections[2].section_id
    assert len(features(root, manifest, [*names, third], encoder, PLAIN).manifest.sections) == 3
    assert computed == [third], "only what is missing is computed"
    other = features(root, manifest, names[:1], _encoder(1), PLAIN)
    assert other.root != reader.root
    assert computed == [third, names[0]]
    assert not np.allclose(other.read_section(names[0]), reader.read_section(names[0]), atol=1e-3)


@pytest.mark.ray
def test_beside_tiles_that_cannot_be_written_features_are_refused_or_computed_for_once(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, manifest = _copied(tiles, tmp_path)
    Path(root, FEATURES).touch()  # where the folder would be
    assert not can_store(root)
    name, encoder, scratch = manifest.sections[0].section_id, _encoder(), str(tmp_path / "scratch")
    with pytest.raises(
        ConfigError, match=r"cannot be stored beside the tiles: cannot write .*; run jobs/embed.py where"
    ):
        features(root, manifest, [name], encoder, PLAIN, lambda *_: pytest.fail("it was encoded"))
    reader = features(root, manifest, [name], encoder, PLAIN, scratch=scratch)
    assert "they are computed for this once" in capsys.readouterr().out
    assert reader.read_section(name) == pytest.approx(_expected(root, manifest, name, encoder), abs=1e-5)
    monkeypatch.setattr(extract, "stream_sentences", None)
    assert features(root, manifest, [name], encoder, PLAIN, scratch=scratch).manifest == reader.manifest


def test_the_command_that_makes_missing_features_has_all_that_they_depend_on(tmp_path: Path) -> None:
    manifest, encoder = small_tiles(tmp_path), _encoder(5, input_scaling="unit")
    asked = replace(PLAIN, seed=5)
    with pytest.raises(ConfigError) as error:
        features(str(tmp_path), manifest, ["A1"], encoder, asked, make=False)
    command = str(error.value).partition("python jobs/embed.py ")[2].split()
    options = {name.removeprefix("--"): value for name, value in zip(command[::2], command[1::2], strict=True)}
    assert (options.pop("data"), options["model.image_weights"]) == (str(tmp_path), "random")
    config = override(Config(), options | {"model.image_layers": ["pooled"], "train.seed": int(options["train.seed"])})
    again = frozen_encoder(config.model, 32, config.train.seed).record
    assert (
        wanted(config).plain_table(manifest, again, "fp32").name
        == asked.plain_table(manifest, encoder.record, "fp32").name
    )


def test_of_two_tables_that_serve_the_one_that_would_be_made_here_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, encoder = small_tiles(tmp_path), _encoder()
    auto, own = replace(PLAIN, precision="auto"), extract._arithmetic("auto")
    for arithmetic in ("fp32", "bf16"):
        plain = PLAIN.plain_table(manifest, encoder.record, arithmetic)
        for entry in manifest.sections:
            write(tmp_path, plain, entry, section_blocks(plain, entry))
    names = [entry.section_id for entry in manifest.sections]
    assert features(str(tmp_path), manifest, names, encoder, auto, make=False).manifest.arithmetic == own
    other = {"fp32": "bf16", "bf16": "fp32"}[own]
    monkeypatch.setattr(extract, "_native_arithmetic", lambda _: other)
    assert features(str(tmp_path), manifest, names, encoder, auto, make=False).manifest.arithmetic == other


@pytest.mark.ray
@pytest.mark.slow
def test_damaged_and_stale_features_are_made_again(tiles: str, tmp_path: Path, s3: str) -> None:
    _, manifest = _copied(tiles, tmp_path)
    root = f"{s3}/tiles"
    storage.upload_folder(tmp_path / "tiles", root, MANIFEST)
    names = [entry.section_id for entry in manifest.sections[:3]]
    encoder = _encoder()
    first = renew_features(root, manifest, names, encoder, PLAIN)
    assert first.computed == tuple(names)
    calm = _bytes(first.root)
    reader = features(root, manifest, names, encoder, PLAIN, make=False)

    # A flipped bit is named, and made again with the same bytes; so is a file that is gone
    section = reader.manifest.section(names[1])
    place = section.row_groups[1].offset + 100
    uri = storage.join(first.root, section.file)
    flipped = bytearray(calm[section.file])
    flipped[place] ^= 4
    storage.write(uri, bytes(flipped))
    lost = reader.manifest.section(names[2]).file
    storage.delete(storage.join(first.root, lost))
    with pytest.raises(ConfigError, match=rf"1 section\(s\) have no stored features .*: {names[2]};"):
        features(root, manifest, names, encoder, PLAIN, make=False)
    again = renew_features(root, manifest, names, encoder, PLAIN)
    assert again.computed == (names[1], names[2])
    assert again.damaged[0] == f"section {names[1]}: sentence 1 of {section.file}"
    assert again.damaged[1].startswith(f"section {names[2]}: ")
    assert again.damaged[1].endswith(f" of {lost}")
    assert features(root, manifest, names, encoder, PLAIN, make=False).manifest == reader.manifest
    assert _bytes(first.root) == calm
    storage.write(storage.join(first.root, MANIFEST), calm[MANIFEST][:100])
    again = renew_features(root, manifest, names, encoder, PLAIN)
    assert again.computed == tuple(names)
    assert "manifest.json is damaged" in again.damaged[0]
    assert _bytes(first.root) == calm
    assert renew_features(root, manifest, names, encoder, PLAIN).computed == ()

    # A section that was cut again is encoded again, and one that is gone is removed
    recut = _recut(root, manifest, names[0])
    kept = recut.model_copy(update={"sections": tuple(each for each in recut.sections if each.section_id != names[2])})
    storage.write(storage.join(root, MANIFEST), kept.encode())
    with pytest.raises(ConfigError, match=rf"1 section\(s\) have no stored features .*: {names[0]};"):
        features(root, kept, names[:2], encoder, PLAIN, make=False)
    last = renew_features(root, kept, names[:2], encoder, PLAIN)
    assert last.computed == (names[0],)
    assert last.stale == (names[0], names[2])
    reader = features(root, kept, names[:2], encoder, PLAIN, make=False)
    assert reader.read_section(names[0]) == pytest.approx(_expected(root, kept, names[0], encoder), abs=1e-5)
    assert set(_bytes(first.root)) == {MANIFEST, *(each.file for each in reader.manifest.sections)}
    assert len(reader.manifest.sections) == 2


def _bytes(root: str) -> dict[str, bytes]:
    """Returns all files of a feature table."""
    uris = [uri for uri in storage.list_files(root) if not uri.endswith(".lock")]
    return {uri.rpartition("/")[2]: storage.read(uri) for uri in uris}


def _recut(root: str, manifest: Manifest, name: str) -> Manifest:
    """Gives a section the tiles of another one."""
    sections = {each.section_id: each for each in manifest.sections}
    donor = next(each for each in manifest.sections if each.section_id != name and each.measured)
    table = [read_sentence(root, donor, group) for group in range(len(donor.row_groups))]
    renamed = [
        each.set_column(0, "section_id", pa.array([name] * each.num_rows, pa.string())).cast(each.schema)
        for each in table
    ]
    with tempfile.TemporaryDirectory() as scratch:
        written = write_section(Path(scratch, "x.parquet"), renamed)
        storage.upload(Path(scratch, "x.parquet"), storage.join(root, "tiles/recut.parquet"))
    sections[name] = sections[name].model_copy(
        update=written.__dict__ | {"file": "tiles/recut.parquet", "num_spots": donor.num_spots}
    )
    return manifest.model_copy(update={"sections": tuple(sections[each] for each in sorted(sections))})


def test_a_reader_crosses_process_borders(tmp_path: Path) -> None:
    reader = FeatureReader("x", _plain(_encoder()), ("image",), _encoder().record)
    assert pickle.loads(pickle.dumps(reader)) == reader
