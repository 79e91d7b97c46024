"""The program model of a run: fitted to the stored features of its training sections, after its towers are trained."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mclstexp.data.measured import read_measured
from mclstexp.model.bank import Bank, drawn_sections, ood_similarity
from mclstexp.model.choose_blend import ValidationSlide
from mclstexp.model.fit_blend import fit_program_model
from mclstexp.model.fit_calibration import fit_calibration
from mclstexp.model.retrieval import resolve
from mclstexp.model.spot_keys import TowerEmbeddings, TrainedTowers
from mclstexp.model.tower_keys import image_embeddings
from mclstexp.model.towers import TwoTowers, build_network
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.version import ModelVersion
from mclstexp.progress import Show
from mclstexp.training.run import Run
from mclstexp.training.tower_loader import TowerLoader, spot_embeddings, tower_loader

Weights = Mapping[str, torch.Tensor]
"""State dict of the two towers."""


def with_programs(
    run: Run, version: ModelVersion, spots: TrainingSpots, without: Sequence[Weights], show: Show
) -> ModelVersion:
    """Returns the version with the program model of its training sections, its bank, threshold and calibration.

    It keeps its towers if they have a share in answers.

    Args:
        run: has stored features.
        version: without bank, of the same run; its weights are those of its towers, empty if it trained none.
        spots: its training sections.
        without: the weights of towers that did not see a fold of the spots, fold by fold.
        show: takes progress.
    """
    towers = _towers(run, spots, version.weights, without) if version.weights else None
    features = run.reader.features
    assert features is not None, "a run with programs has a frozen encoder, whose features are stored"
    validation = [
        ValidationSlide(read_measured(run.reader, name), features.read_section(name)) for name in run.split.validation
    ]
    fitted = fit_program_model(spots, run.config.retrieval, towers, validation, show)
    if towers is not None:
        print(_shares(fitted.model.share, fitted.model.tower_share), flush=True)
    version.programs, version.bank = fitted.model, program_bank(spots, fitted.keys)
    version.calibration = fit_calibration(spots, fitted)
    version.config = run.config.model_copy(update={"retrieval": resolve(run.config.retrieval, len(version.bank))})
    drawn = drawn_sections({name: run.manifest.section(name).num_spots for name in run.split.train})
    queries = {name: version.programs.queries(spots.features(name)) for name in drawn}
    version.ood_similarity = ood_similarity(queries, version.bank)
    if fitted.model.towers is None:
        version.weights = {}
    return version


def _towers(run: Run, spots: TrainingSpots, weights: Weights, without: Sequence[Weights]) -> TrainedTowers:
    loader = tower_loader(run.config, run.reader, spots).keeping()
    return embedded([_network(run, each) for each in (weights, *without)], spots, loader)


def _network(run: Run, weights: Weights) -> TwoTowers:
    network = build_network(run.config.model, len(run.panel), 0, run.manifest.tile_size_px)
    assert isinstance(network, TwoTowers), "a program model's network is two towers"
    network.load_state_dict(weights)
    return network.eval()


def embedded(networks: Sequence[TwoTowers], spots: TrainingSpots, loader: TowerLoader) -> TrainedTowers:
    """Returns what towers make of the training spots.

    Args:
        networks: the towers of all training spots, then those without each fold; on the CPU, in evaluation mode.
        spots: the training sections.
        loader: of these sections.
    """
    names = [each.section_id for each in spots.sections]

    def of(network: TwoTowers) -> TowerEmbeddings:
        images = [image_embeddings(network.image_head, spots.features(name)) for name in names]
        return TowerEmbeddings(np.concatenate(images), spot_embeddings(network, loader, names))

    whole, *without = (of(each) for each in networks)
    return TrainedTowers(networks[0].image_head, whole, tuple(without))


def _shares(share: float, tower_share: float) -> str:
    if not tower_share:
        return f"programs: the towers add nothing and are left out; retrieval by features has {share:.0%} of answers"
    return f"programs: retrieval has {share:.0%} of answers, and the towers {tower_share:.0%} of its similarity"


def program_bank(spots: TrainingSpots, keys: np.ndarray) -> Bank:
    """Returns the bank of training spots, with the keys (N, D) of all of them in order."""
    names = np.concatenate([each.spot_id for each in spots.sections])
    return Bank.of(keys, spots.expression, spots.section_id, spots.patient_id, names)
