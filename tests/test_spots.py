"""Positions: which columns of the table each kind uses, and how large its learnt tables are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_table import NAMES, make_table

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
    return make_reader(str(root), manifest, GenePanel.from_names(NAMES), config)


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
