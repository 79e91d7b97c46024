"""Positions: which columns of the table each kind uses, and how large its learnt tables are; genes without values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_table import NAMES, make_table, random_counts

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.data.spots import SpotReader, make_reader, num_positions
from mclstexp.errors import UserError
from mclstexp.model.towers import SpotTower

XY_PX = {"A1": np.array([[3.9, 100.0], [65.999999, 7.5], [0.2, 40.1]]), "B1": np.array([[12.0, 211.7], [5.5, 6.5]])}
WHOLE = {"A1": [[3, 100], [65, 7], [0, 40]], "B1": [[12, 211], [5, 6]]}


def _reader(root: Path, position: str, xy_px: dict[str, np.ndarray] = XY_PX) -> SpotReader:
    counts = {name: np.ones((len(xy), len(NAMES)), np.int32) for name, xy in xy_px.items()}
    manifest = make_table(root, counts, xy_px=xy_px)
    config = override(Config(), {"train.batching": "random_spots", "model.position": position})
    return make_reader(str(root), manifest, GenePanel.from_names(NAMES), config, list(counts))


def test_pixel_positions_are_whole_columns_and_rows_of_the_slide(tmp_path: Path) -> None:
    reader = _reader(tmp_path, "pixel_table")
    for name, whole in WHOLE.items():
        sentences = [reader.read_encoded(name, group)[0]["position"] for group in range(2)]
        assert np.concatenate(sentences).tolist() == whole
        assert reader.read_section(name)["position"].tolist() == whole
        assert sentences[0].dtype == np.float32


def test_a_table_has_a_row_for_every_coordinate_of_the_data(tmp_path: Path) -> None:
    reader = _reader(tmp_path, "pixel_table")
    assert num_positions(reader) == 212
    tower = SpotTower(Config().model.model_copy(update={"position": "pixel_table"}), len(NAMES), 212)
    spots = reader.read_section("B1")
    expression, position = (torch.from_numpy(spots[name])[None] for name in ("expression", "position"))
    with torch.no_grad():
        rows = tower.position(position)[0]
        assert torch.equal(rows[0], tower.position.x.weight[12] + tower.position.y.weight[211])
        assert torch.isfinite(tower(expression, position, torch.ones(1, 2, dtype=torch.bool))).all()


@pytest.mark.parametrize(("position", "rows"), [("table", 1), ("none", 0)])
def test_other_positions_need_no_pixels(tmp_path: Path, position: str, rows: int) -> None:
    far = {"A1": np.full((2, 2), 1e6)}
    assert num_positions(_reader(tmp_path, position, far)) == rows  # all array coordinates are 0


def test_more_rows_than_published_are_refused(tmp_path: Path) -> None:
    (tmp_path / "most").mkdir()
    most = {"A1": np.array([[65_535.9, 0.0], [1.0, 1.0]])}
    assert num_positions(_reader(tmp_path / "most", "pixel_table", most)) == 65_536
    beyond = XY_PX | {"B1": np.array([[1.0, 65_536.0], [1.0, 1.0]])}
    with pytest.raises(
        UserError, match=r"pixel_table needs coordinates from 0 to 65535; the largest of section B1 is 65536"
    ):
        num_positions(_reader(tmp_path, "pixel_table", beyond))


LACKS = {"A1": [], "B1": [1, 4], "C1": [4, 7]}
"""Genes that a section does not measure."""


def _lacking(root: Path, **settings: object) -> tuple[SpotReader, dict[str, np.ndarray]]:
    """A reader with training sections A1 and B1 of three, and the sections' counts."""
    counts = {name: random_counts(9 + seed, seed) for seed, name in enumerate(LACKS)}
    measures = {name: ~np.isin(np.arange(len(NAMES)), genes) for name, genes in LACKS.items()}
    counts = {name: values * measures[name] for name, values in counts.items()}
    manifest = make_table(root, counts, measures={name: measures[name] for name in ("B1", "C1")})
    config = override(Config(), {"genes.input": "per_spot_all", "genes.target": "per_spot_all"} | settings)
    return make_reader(str(root), manifest, GenePanel.from_names(NAMES), config, ["A1", "B1"]), counts


def _log_shares(counts: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    return np.log(1 + 1e4 * np.divide(counts, divisor, out=np.zeros(counts.shape), where=divisor > 0))


@pytest.mark.odd
@pytest.mark.parametrize("target", ["per_spot_all", "per_spot_panel", "per_gene"])
@pytest.mark.parametrize("name", ["B1", "C1"])
def test_a_gene_that_a_section_lacks_has_no_payload_and_the_mean_as_input(
    tmp_path: Path, name: str, target: str
) -> None:
    reader, counts = _lacking(tmp_path, **{"genes.target": target})
    spots, own = reader.read_section(name), counts[name].astype(float)
    divisor = own.sum(axis=0, keepdims=True) if target == "per_gene" else own.sum(axis=1, keepdims=True)
    payload, expression = _log_shares(own, divisor), _log_shares(own, own.sum(axis=1, keepdims=True))
    for gene in LACKS[name]:
        payload[:, gene] = np.nan
        measured_in = [each for each in ("A1", "B1") if gene not in LACKS[each]]
        known = [_log_shares(counts[each], counts[each].sum(axis=1, keepdims=True))[:, gene] for each in measured_in]
        expression[:, gene] = np.concatenate(known).mean()
    np.testing.assert_allclose(spots["payload"], payload, rtol=1e-5)
    np.testing.assert_allclose(spots["expression"], expression, rtol=1e-5)
    sentences = [reader.read_encoded(name, group)[0] for group in range(2)]
    joined = np.concatenate([sentence["expression"] for sentence in sentences])
    np.testing.assert_array_equal(joined, spots["expression"])


@pytest.mark.odd
def test_direct_regression_learns_nothing_of_a_gene_that_is_not_measured(tmp_path: Path) -> None:
    reader, _ = _lacking(tmp_path, **{"model.predictor": "regression"})
    for name, genes in LACKS.items():
        expression = reader.read_section(name)["expression"]
        assert np.flatnonzero(np.isnan(expression).any(axis=0)).tolist() == genes
        assert np.isnan(expression[:, genes]).all()


def test_where_training_measures_all_nothing_stands_in(tmp_path: Path) -> None:
    reader, _ = _lacking(tmp_path)
    assert reader.stand_in is not None
    config = Config()
    only = make_reader(reader.root, reader.manifest, GenePanel.from_names(NAMES), config, ["A1"])
    assert only.stand_in is None
