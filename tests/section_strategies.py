"""Strategies of hypothesis for random sections and the files that they are written to."""

from any_section import GENES
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from section_files import H5adForm, ImageForm, LegacyForm, VisiumForm


def property_test(num_examples):
    """Settings: no database of examples, and no search for smaller ones, which takes minutes.

    The examples are those of the last run, unless other code is imported: hypothesis also tries its constants.
    """
    return settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def sections(draw, genes=tuple(GENES)):
    """The arguments of `any_section`, which print shorter than what it returns."""
    hexagonal = draw(st.booleans())
    mpp = [0.25, 0.46, 0.69, 1.0, 2.1, 3.4, 4.0] if hexagonal else [0.5, 0.69, 1.0, 2.1, 3.4]
    return {
        "seed": draw(st.integers(0, 999)),
        "hexagonal": hexagonal,
        "pitch_um": 100.0 if hexagonal else draw(st.sampled_from([200.0, 150.0])),
        "mpp": draw(st.sampled_from(mpp)),
        "angle": draw(st.floats(0, 360)),
        "shear": draw(st.sampled_from([0.0, 0.02, -0.03])),
        "genes": draw(st.lists(st.sampled_from(genes), min_size=6, unique=True).map(tuple)),
        "edge_px": draw(st.sampled_from([48, 10])),
    }


def images():
    tagged = st.builds(ImageForm, kind=st.sampled_from(["tiff", "pyramid", "ome"]), states_mpp=st.booleans())
    return st.builds(ImageForm, kind=st.sampled_from(["png", "jpeg"])) | tagged


def legacy_forms(ids):
    return st.builds(
        LegacyForm,
        names=st.sampled_from(["id", "symbol"]),
        ids=st.just(ids),
        corner=st.sampled_from(["", None, "spot"]),
        columns=st.permutations(LegacyForm.columns).map(tuple),
        packed=st.booleans(),
        others=st.booleans(),
    )


def visium_forms(ids):
    return st.builds(
        VisiumForm,
        matrix=st.sampled_from(["h5", "mtx", "genes"]),
        ids=st.just(ids),
        positions=st.sampled_from(
            ["tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet"],
        ),
        columns=st.permutations(VisiumForm.columns).map(tuple),
        outs=st.booleans(),
        pictures=st.sampled_from([(), ("hires",), ("hires", "lowres")]),
        others=st.booleans(),
    )


@st.composite
def h5ad_forms(draw, ids):
    both = [("symbol", "gene_ids"), ("id", "feature_name"), ("id", "gene_symbols")]
    index, beside = draw(st.sampled_from([*both, ("id", None), ("symbol", None)]))
    named = [("x", "y"), ("pxl_col_in_fullres", "pxl_row_in_fullres"), ("pixel_x", "pixel_y"), ("imagecol", "imagerow")]
    return draw(
        st.builds(
            H5adForm,
            counts_in=st.sampled_from(["X", "layers", "raw"]),
            matrix=st.sampled_from(["csr", "csc", "dense"]),
            index=st.just(index),
            beside=st.just(beside),
            ids=st.just(ids),
            spatial=st.sampled_from([None, *named]),
            tissue=st.sampled_from(["int", "bool", "float", "text"]),
            array=st.booleans(),
            uns=st.sampled_from([None, "visium", "hest"]),
            others=st.booleans(),
        )
    )


FORMS = {"legacy": legacy_forms, "visium": visium_forms, "h5ad": h5ad_forms}
