"""A cohort of feature files: which slides there are, and whether a model takes features that others computed.

What all files have in common (the model's own needs, the encoder that the folder's name states) is checked here, on
the driver; each file's own facts when its slide is inspected.
"""

from dataclasses import replace

from mclstexp import storage
from mclstexp.data.features import EncoderRecord
from mclstexp.data.sheet import SectionRow, read_sheet
from mclstexp.errors import PredictError, SheetError
from mclstexp.messages import some_of
from mclstexp.model.presets import PRESETS
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.cohort import Cohort, plan_of, require_unique, slide_name
from mclstexp.prediction.feature_files import FeatureNeeds
from mclstexp.prediction.origin import compare_origins
from mclstexp.prediction.plan import SlideSource
from mclstexp.settings import ModelConfig, PredictConfig

ENDING = ".h5"
_FOLDER = "features_"
"""TRIDENT's folders of features begin so; the encoder's name follows."""
_GIVE_SLIDES = "give the slides themselves with --samples"


def open_feature_cohort(
    folder: str,
    model: ModelVersion,
    out: str,
    config: PredictConfig,
    sheet: str | None = None,
    assume_mpp: float | None = None,
) -> Cohort:
    """Returns the slides of a folder or `s3://` prefix of feature files, or those of a sheet, for one model.

    Args:
        folder: has one file per slide, as TRIDENT writes them.
        model: the version that predicts.
        out: root of the predictions.
        config: prediction's settings; those of cutting slides have no effect.
        sheet: sample sheet whose slides are predicted, with their patients and exact resolutions; None: all files.
        assume_mpp: micrometres per level-0 pixel of slides whose resolution neither the file nor the sheet states.

    Raises:
        PredictError: the model takes no features of such files, or the folder is another encoder's; names both.
        SheetError: there is no file, or the sheet has faults.
    """
    needs = feature_needs(model, folder)
    rows = None if sheet is None else read_sheet(sheet)
    sources = list_feature_files(folder) if rows is None else [_source(row, folder) for row in rows]
    plan = replace(plan_of(model, out, config, assume_mpp), features=needs)
    return Cohort(sources, plan, warnings=compare_origins(rows or [], model.training))


def feature_needs(model: ModelVersion, folder: str) -> FeatureNeeds:
    """Returns what a model takes from feature files in a folder.

    Raises:
        PredictError: the model takes what no such file has, or the folder's name states another encoder.
    """
    if model.encoder is None:
        raise PredictError(f"the model trained its image encoder, so that no file has its features; {_GIVE_SLIDES}")
    encoder, blocks = model.encoder.record, model.needed_blocks()
    layer, width = encoder.layers[0], encoder.widths[0]
    if list(blocks) != [f"image/{layer}"]:
        raise PredictError(
            f"the model takes {len(blocks)} blocks of features ({', '.join(blocks)}), a feature file has one "
            f"layer of the view image; {_GIVE_SLIDES}"
        )
    _require_own_input(encoder, model.config.model)
    names = _file_names(encoder)
    name = folder.rstrip("/").rpartition("/")[2]
    stated = name.removeprefix(_FOLDER) if name.startswith(_FOLDER) else ""
    if stated and stated not in names:
        raise PredictError(
            f"{folder} has features of the encoder {stated}, the model takes {encoder.name} (as {some_of(names)}); "
            f"give the folder {_FOLDER}{names[0]}"
        )
    return FeatureNeeds(encoder.name, layer, width, names, encoder.resize_px is None, stated)


def list_feature_files(folder: str) -> list[SlideSource]:
    """Returns the slides whose files are directly in a folder or prefix; a slide's id is as `list_slides` gives it.

    Raises:
        SheetError: there is none, or two files give the same id.
    """
    names = [name for name in storage.list_folder(folder) if name.endswith(ENDING) and not name.startswith(".")]
    if not names:
        deeper = {_parent(uri) for uri in storage.list_files(folder) if uri.endswith(ENDING)}
        found = f" (some are in {some_of(sorted(deeper))})" if deeper else ""
        raise SheetError(
            f"there is no feature file ({ENDING}) in {folder}{found}: give the folder that has one per slide"
        )
    slides = [_slide(storage.join(storage.absolute(folder), name)) for name in names]
    require_unique(folder, slides)
    return slides


def _slide(uri: str) -> SlideSource:
    name = slide_name(uri)
    return SlideSource(name, name, "", uri, None)


def _source(row: SectionRow, folder: str) -> SlideSource:
    """Returns a sheet's slide; its file is named after the image, as TRIDENT does."""
    stem = row.image.rpartition("/")[2].rpartition(".")[0].removesuffix(".ome")
    uri = storage.join(storage.absolute(folder), stem + ENDING)
    return SlideSource(row.section_id, row.patient_id, row.site, uri, row.mpp)


def _parent(uri: str) -> str:
    return uri.rpartition("/")[0]


def _file_names(encoder: EncoderRecord) -> tuple[str, ...]:
    """Returns the names that files with features of an encoder's layer may state: TRIDENT's, then its own.

    Raises:
        PredictError: there is none, for such files have another layer of it.
    """
    preset = PRESETS.get(encoder.name)
    (layer,) = encoder.layers
    if preset is None:  # of timm, or somebody's own
        return tuple(dict.fromkeys((encoder.name.rpartition("/")[2], encoder.name)))
    own = (encoder.name,) if layer == preset.layers[0] else ()
    names = tuple(dict.fromkeys((*preset.trident.get(layer, ()), *own)))
    if not names:
        on_offer = sorted({*preset.trident, preset.layers[0]})
        raise PredictError(
            f"the model takes the layer {layer} of {encoder.name}, feature files have "
            f"{' or '.join(on_offer)}; {_GIVE_SLIDES}"
        )
    return names


def _require_own_input(encoder: EncoderRecord, config: ModelConfig) -> None:
    """Checks that the model gives its encoder tiles as everybody else does.

    Raises:
        PredictError: it scales pixels otherwise, or turns tiles.
    """
    preset = PRESETS.get(encoder.name)
    own = None if preset is None else (preset.transform.mean, preset.transform.std)
    if own is not None and own != (encoder.mean, encoder.std):
        raise PredictError(
            f"the model scales pixels by mean {encoder.mean} and deviation {encoder.std} (model.input_scaling), "
            f"feature files of {encoder.name} by {own[0]} and {own[1]}; {_GIVE_SLIDES}"
        )
    if config.test_turns:
        raise PredictError(
            f"the model turns tiles before it encodes them (model.test_turns), files do not; {_GIVE_SLIDES}"
        )
