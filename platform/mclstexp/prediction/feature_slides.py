"""Slides without images: the tiles and features that a feature file has, as inspection and reading give them.

Tiles keep the file's order and are named by their row in it. What needs pixels is left open: a tile's share of tissue
is missing, the slide's pictures show its tiles alone, and the stain counts as not looked at. The tissue is what the
tiles cover.
"""

from contextlib import ExitStack
from types import TracebackType

import numpy as np
import pyarrow as pa

from mclstexp.errors import SourceError
from mclstexp.messages import some_of
from mclstexp.prediction.feature_files import FeatureFacts, FeatureFile
from mclstexp.prediction.parts import (
    GRID_SCHEMA,
    PART_TILES,
    Inspection,
    SlideRecord,
    staging_folder,
    write_inspection,
)
from mclstexp.prediction.plan import CohortPlan, SlideSource, key
from mclstexp.prediction.slide_cache import staged
from mclstexp.slides.resolution import ASSUMED, resolve_mpp
from mclstexp.slides.tiles import NATIVE_RATIO, THUMBNAIL_PX, preview

NOT_LOOKED_AT = "predicted from features, so nobody looked at its stain"
"""Flag of slides that are predicted without their image."""
_SHEET, _MAGNIFICATION = "sheet", "magnification"
_UM_PER_PX_AT_1X = 10.0  # an objective of 40x is scanned at about .25 um/px
_UM2_PER_MM2 = 1e6


def inspect_features(source: SlideSource, found: str, plan: CohortPlan, path: str) -> Inspection:
    """Returns the findings about a slide from its feature file, and writes them into its staging folder.

    Args:
        source: the slide; its image is the file.
        found: the file's fingerprint.
        plan: says which features the model takes.
        path: local path of the file.

    Raises:
        SourceError: the file is damaged, or of another encoder, layer, width or scale than the model takes, or states
            no resolution and none is assumed.
    """
    with FeatureFile(path) as file:
        facts = file.facts()
    _require_encoder(facts, plan)
    mpp, origin = _resolution(facts, source.mpp, plan.assume_mpp)
    _require_scale(facts, mpp, origin, plan)
    table = _tiles(facts, mpp)
    picture_scale = max(1.0, max(facts.slide_px) / THUMBNAIL_PX)
    picture, covered_px = _picture(facts, picture_scale)
    record = SlideRecord(
        slide_id=source.slide_id,
        patient_id=source.patient_id,
        site=source.site,
        image=source.image,
        fingerprint=found,
        width_px=int(facts.slide_px[0]),
        height_px=int(facts.slide_px[1]),
        mpp=mpp,
        mpp_source=origin,
        scale=facts.edge_px / plan.tiles.size_px,
        scanned_from_px=(0.0, 0.0),
        num_tiles=len(table),
        tile_area_mm2=len(table) * (facts.edge_px * mpp) ** 2 / _UM2_PER_MM2,
        tissue_area_mm2=covered_px * (picture_scale * mpp) ** 2 / _UM2_PER_MM2,
        missing_tiles=0,
        left_out_positions=0,
        thumbnail_scale=picture_scale,
        not_h_and_e=NOT_LOOKED_AT,
    )
    is_assumed = origin == ASSUMED
    inspection = Inspection(
        record, staging_folder(plan.out, source.slide_id, key(source, found, plan, assumed=is_assumed))
    )
    write_inspection(inspection, table, picture, picture)
    return inspection


class FeatureReader:
    """Reads features of tiles from feature files and keeps the last one open; a context manager that releases it."""

    def __init__(self, plan: CohortPlan) -> None:
        assert plan.features is not None
        self._plan, self._width = plan, plan.features.width
        self._resources = ExitStack()
        self._uri = ""
        self._file: FeatureFile | None = None

    def __enter__(self) -> "FeatureReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def read(self, uri: str, table: pa.Table) -> np.ndarray:
        """Returns the features of consecutive tiles of a slide, float32 (n, F).

        Args:
            uri: of the feature file.
            table: the tiles, GRID_SCHEMA.

        Raises:
            SourceError: the file is damaged, or its features are not finite.
            FileNotFoundError, ResourceError, StorageError: it is not available now.
        """
        start = int(table["spot_id"][0].as_py())
        return self.open(uri).read(start, start + len(table))

    def read_part(self, uri: str, table: pa.Table, record: SlideRecord) -> dict[str, np.ndarray]:
        """Returns the columns of a part in the pipeline: `features` and `complete`; `record` plays no part.

        Raises:
            As `read`.
        """
        columns = self.empty_part()
        columns["features"][: len(table)] = self.read(uri, table)
        columns["complete"][: len(table)] = True
        return columns

    def empty_part(self) -> dict[str, np.ndarray]:
        """Returns the columns of a part without tiles."""
        features = np.zeros((PART_TILES, self._width), np.float32)
        return {"features": features, "complete": np.zeros(PART_TILES, bool)}

    def open(self, uri: str) -> FeatureFile:
        """Returns the open feature file of a URI, after copying a remote one to this node."""
        if self._file is None or self._uri != uri:
            self.release()
            path = self._resources.enter_context(staged(uri, self._plan.scratch, self._plan.scratch_budget_bytes))
            self._file, self._uri = self._resources.enter_context(FeatureFile(path)), uri
        return self._file

    def release(self) -> None:
        """Closes the open file, if any, and frees the copy of a remote one."""
        self._file = None
        self._resources.close()


def _require_encoder(facts: FeatureFacts, plan: CohortPlan) -> None:
    needs = plan.features
    assert needs is not None
    stated = facts.encoder or needs.folder
    if not stated:
        raise SourceError(
            f"neither the file nor its folder's name states an encoder, the model takes {needs.encoder}: rename the "
            f"folder to features_{needs.names[0]} if they are of it"
        )
    if stated not in needs.names:
        raise SourceError(
            f"its features are of the encoder {stated}, the model takes {needs.encoder} (as {some_of(needs.names)}): "
            "give a folder of that encoder's features"
        )
    if facts.width != needs.width:
        raise SourceError(
            f"its features of {stated} are {facts.width} wide, the model takes the layer {needs.layer} of "
            f"{needs.encoder}, {needs.width} wide: extract that layer"
        )


def _resolution(facts: FeatureFacts, of_sheet: float | None, assumed: float | None) -> tuple[float, str]:
    """Returns the micrometres per level-0 pixel and their source; a sheet's are exact, so that they come first."""
    if of_sheet is not None:
        return of_sheet, _SHEET
    by_magnification = None if facts.magnification is None else _UM_PER_PX_AT_1X / facts.magnification
    return resolve_mpp({_SHEET: None, _MAGNIFICATION: by_magnification}, assumed)


def _require_scale(facts: FeatureFacts, mpp: float, origin: str, plan: CohortPlan) -> None:
    needs, size_px = plan.features, plan.tiles.size_px
    assert needs is not None
    found_um, wanted_um = facts.edge_px * mpp, size_px * plan.mpp
    if not 1 / NATIVE_RATIO <= found_um / wanted_um <= NATIVE_RATIO:
        raise SourceError(
            f"its tiles are {found_um:.4g} um wide ({facts.edge_px:g} px at {mpp:.4g} um/px by its {origin}), the "
            f"model takes {wanted_um:.4g} um ({size_px} px at {plan.mpp:.4g} um/px): extract tiles of that width, "
            "or correct mpp in a sheet (--samples)"
        )
    if needs.keeps_size and facts.tile_px != size_px:
        raise SourceError(
            f"its tiles were {facts.tile_px:g} px wide, the model takes {size_px} px, which {needs.encoder} does not "
            f"resize: extract with --patch_size {size_px}"
        )


def _tiles(facts: FeatureFacts, mpp: float) -> pa.Table:
    """Returns the tiles of a file (GRID_SCHEMA) in its order."""
    x, y = (facts.corners + facts.edge_px / 2).T
    num_tiles = len(x)
    none, open_share = pa.nulls(num_tiles, pa.int32()), pa.nulls(num_tiles, pa.float32())
    names = {"spot_id": [str(row) for row in range(num_tiles)], "array_row": none, "array_col": none}
    positions = {"x_px": x, "y_px": y, "x_um": x * mpp, "y_um": y * mpp, "tissue_fraction": open_share}
    return pa.table(names | positions, schema=GRID_SCHEMA)


def _picture(facts: FeatureFacts, scale: float) -> tuple[np.ndarray, int]:
    """Returns a white picture of the slide with its tiles tinted, uint8 (h, w, 3), and how many pixels they cover."""
    width, height = (max(1, round(edge / scale)) for edge in facts.slide_px)
    blank = np.full((height, width, 3), 255, np.uint8)
    left, top = facts.corners.T
    picture = preview(blank, scale, np.zeros((height, width), bool), left, top, facts.edge_px)
    return picture, int((picture != blank).any(axis=2).sum())
