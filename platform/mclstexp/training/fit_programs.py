"""The program model of a run: fitted to the stored features of its training sections, after its towers are trained."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from mclstexp.data.measured import MeasuredSection, read_measured
from mclstexp.data.spots import SpotReader
from mclstexp.model.bank import Bank, drawn_sections, ood_similarity
from mclstexp.model.fit_blend import FeatureBlocks, TrainingSpots, fit_program_model
from mclstexp.model.fit_calibration import fit_calibration
from mclstexp.model.retrieval import resolve
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show
from mclstexp.training.run import Run


def with_programs(run: Run, version: ModelVersion, show: Show) -> ModelVersion:
    """Returns the version with the program model of its training sections, its bank, threshold and calibration.

    Args:
        run: has stored features.
        version: without bank, of the same run.
        show: takes progress.
    """
    spots = training_spots(run.reader, run.split.train, run.config.train.feature_draws)
    fitted = fit_program_model(spots, run.config.retrieval, show)
    version.programs, version.bank = fitted.model, program_bank(spots.sections, spots.expression, fitted.keys)
    version.calibration = fit_calibration(spots, fitted)
    version.config = run.config.model_copy(update={"retrieval": resolve(run.config.retrieval, len(version.bank))})
    drawn = drawn_sections({name: run.manifest.section(name).num_spots for name in run.split.train})
    queries = {name: version.programs.queries(spots.features(name)) for name in drawn}
    version.ood_similarity = ood_similarity(queries, version.bank)
    version.weights = {}
    return version


def training_spots(reader: SpotReader, section_ids: Sequence[str], num_draws: int) -> TrainingSpots:
    """Returns training sections with their stored features, of the plain tiles and of augmented draws."""
    features = reader.features
    assert features is not None, "a run with programs has a frozen encoder, whose features are stored"
    sections = [read_measured(reader, name) for name in section_ids]
    blocks = feature_blocks(features.manifest.encoder.widths, len(features.views))
    draws = [partial(features.read_section, draw=draw) for draw in range(num_draws)]
    return TrainingSpots(sections, features.read_section, blocks, reader.target, draws)


def feature_blocks(layer_widths: tuple[int, ...], num_views: int) -> FeatureBlocks:
    """Returns the blocks of a model's features: neighbours see the last and the first layer of the first view.

    The slide's level is read from the last layer of the first view.
    """
    last = len(layer_widths) - 1
    return FeatureBlocks(layer_widths * num_views, tuple(dict.fromkeys((last, 0))), last)


def program_bank(sections: Sequence[MeasuredSection], expression: np.ndarray, keys: np.ndarray) -> Bank:
    """Returns the bank of training sections, with expression (N, G) and keys (N, D) of all their spots in order."""
    names = {
        name: np.concatenate([np.full(len(each), getattr(each, name), object) for each in sections])
        for name in ("section_id", "patient_id")
    }
    return Bank.of(keys, expression, spot_id=np.concatenate([each.spot_id for each in sections]), **names)
