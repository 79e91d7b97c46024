"""Compares a prepared section with what it is in truth (`any_section`)."""

import numpy as np
import pytest
from any_section import KEPT, AnySection
from prepared_here import PreparedHere, tile
from section_files import Form, H5adForm, ImageForm, LegacyForm


def names(section: AnySection, form: Form) -> list[str]:
    """Returns what a format calls the spots."""
    on_array = [f"{col}x{row}" for col, row in zip(section.col, section.row, strict=True)]
    return on_array if isinstance(form, LegacyForm) else section.barcodes


def gene_ids(prepared: PreparedHere) -> dict[str, str]:
    """Returns the gene table's id by every name of a gene; refuses a gene in two rows."""
    ids = {}
    for gene in prepared.plan.genes:
        for name in {gene.gene_id, gene.symbol, gene.ensembl_id} - {""}:
            assert name not in ids, f"two rows of the gene table are {name}"
            ids[name] = gene.gene_id
    return ids


def check_section(
    prepared: PreparedHere,
    section: AnySection,
    name: str,
    form: Form,
    image: ImageForm | None = None,
    ratio: float = 1.0,
) -> None:
    """Compares spots, rejects, places, tiles, counts and the list of measured genes.

    Args:
        prepared: what was prepared.
        section: what the section is.
        name: its id.
        form: how it was written.
        image: how its image was written.
        ratio: pixels of the image along one of a tile.
    """
    size = prepared.plan.recipe.tiles.size_px
    outcome, named = section.outcome(size * ratio), names(section, form)
    spots = prepared.spots(name)
    assert set(spots) == {named[i] for i, what in enumerate(outcome) if what == KEPT}
    assert prepared.rejects(name) == {named[i]: what for i, what in enumerate(outcome) if what != KEPT}
    id_of = gene_ids(prepared)
    in_table = [id_of.get(gene_id) or id_of[symbol] for gene_id, symbol in section.genes]
    assert prepared.measures(name) == set(in_table)
    for i in (i for i, what in enumerate(outcome) if what == KEPT):
        spot = spots[named[i]]
        check_place(spot, section, i, has_array=not isinstance(form, H5adForm) or form.array)
        check_tile(spot, section, i, ratio, tolerance=10 if image and image.kind == "jpeg" else 0)
        counts = zip(in_table, section.counts[i].tolist(), strict=True)
        assert prepared.counts(spot) == {gene: count for gene, count in counts if count}


def check_place(spot: dict, section: AnySection, i: int, has_array: bool) -> None:
    """Compares a spot's positions; the array's resolution is that of the image but for its shear."""
    assert (spot["x_px"], spot["y_px"]) == pytest.approx((section.x[i], section.y[i]), abs=1e-6)
    at_um = (section.x[i] * section.mpp, section.y[i] * section.mpp)
    assert (spot["x_um"], spot["y_um"]) == pytest.approx(at_um, rel=0.02)
    if has_array:
        assert (spot["array_row"], spot["array_col"]) == (section.row[i], section.col[i])


def check_tile(spot: dict, section: AnySection, i: int, ratio: float = 1.0, tolerance: int = 0) -> None:
    """Compares a tile: its centre names the spot, and at the image's own resolution it is the image's pixels."""
    shown = tile(spot)
    half = len(shown) // 2
    assert section.spot_of(shown[half, half]) == i
    if ratio == 1:
        left, top = int(section.x[i]) - half, int(section.y[i]) - half
        expected = section.pixels[top : top + 2 * half, left : left + 2 * half].astype(int)
        assert np.abs(shown - expected).max() <= tolerance
