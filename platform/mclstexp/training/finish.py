"""From a run's checkpoint to a model version: bank, retrieval settings and threshold in one folder.

Everything but the weights is made once, after training: bank and retrieval fit the final weights, at the price of
embedding validation and training tiles again.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mclstexp import storage
from mclstexp.data.schema import IMAGE_WIDE, Manifest
from mclstexp.data.spots import num_positions, total_genes
from mclstexp.errors import RunError
from mclstexp.messages import AGAINST_DIVERGENCE
from mclstexp.model.bank import Bank, build_bank, drawn_sections, ood_similarity
from mclstexp.model.embed import embed_sections, head_of, network_of
from mclstexp.model.retrieval import resolve
from mclstexp.model.towers import TwoTowers
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.version import FILES, ModelVersion, TrainingRecord
from mclstexp.progress import Metrics, Show, hidden
from mclstexp.settings import RetrievalConfig
from mclstexp.training.checkpoint import learnt, read_checkpoint
from mclstexp.training.fit_programs import with_programs
from mclstexp.training.history import local_checkpoint
from mclstexp.training.run import Run, last_checkpoint
from mclstexp.training.stored import with_features
from mclstexp.training.trainer import LeftOutFold, fit
from mclstexp.training.training_sections import training_spots
from mclstexp.training.validation import ValidationSection, choose_retrieval

FOLDER = "model"


def model_uri(run: Run) -> str:
    """Returns the folder of a run's model version."""
    return storage.join(run.uri, FOLDER)


def is_finished(run: Run) -> bool:
    """Returns whether the run's model version was published."""
    return storage.exists(storage.join(model_uri(run), FILES))


def load_model(run: Run) -> ModelVersion:
    """Returns the model version of a finished run."""
    uri = model_uri(run)
    if not storage.is_s3(uri):
        return ModelVersion.load(uri)
    with tempfile.TemporaryDirectory() as scratch:
        for file in storage.list_files(uri):
            storage.download(file, Path(scratch, file.rpartition("/")[2]))
        return ModelVersion.load(scratch)


def finished_model(run: Run, show: Show = hidden) -> ModelVersion | None:
    """Returns the model version of the run's newest checkpoint, trained to its end or not; None if it has none."""
    if not is_finished(run):
        checkpoint = last_checkpoint(run)
        if checkpoint is None:
            return None
        finish(run, checkpoint.uri, show)
    return load_model(run)


def finish(run: Run, checkpoint_uri: str | None, show: Show = hidden) -> None:
    """Builds bank and programs, chooses settings on the validation patients and publishes the model version.

    A program model with towers trains them again without each fold of the training spots first.

    Args:
        run: as `open_run` returns it.
        checkpoint_uri: the checkpoint of its towers; None if it trains none (train.epochs=0).
        show: takes progress.

    Raises:
        UserError: as `trainer.fit`.
        RunError: the checkpoint is damaged, or weights, bank or embeddings are not finite; nothing is published.
    """
    run = with_features(run, show)
    with tempfile.TemporaryDirectory() as scratch:
        weights, epochs = _trained(run, checkpoint_uri)
        version = _version(run, weights, epochs, show)
        require_finite_answer(version)
        folder = Path(scratch, FOLDER)
        folder.mkdir()
        version.save(folder)
        storage.upload_folder(folder, model_uri(run), last=FILES)


def require_finite_answer(version: ModelVersion) -> None:
    """Checks that the model answers a grey tile, or features of zeros, with finite numbers.

    Raises:
        RunError: it does not.
    """
    cpu = torch.device("cpu")
    if version.encoder is None:
        grey = np.full((1, version.tile_size_px, version.tile_size_px, 3), 128, np.uint8)
        embedding = network_of(version).build(cpu)(*[grey] * len(version.config.model.image_views))
    else:
        head = head_of(version)
        embedding = head.build(cpu)(np.zeros((1, head.num_features), np.float32))
    if not (
        np.isfinite(embedding).all() and np.isfinite(version.predict(embedding, np.zeros((1, 2))).prediction).all()
    ):
        raise RunError(
            "the model's answer to a probe is not finite: training has diverged, and no model version was written; "
            f"{AGAINST_DIVERGENCE}"
        )


def _trained(run: Run, checkpoint_uri: str | None) -> tuple[dict[str, torch.Tensor], int]:
    """Returns what a run learnt by gradient descent, and the epochs that it took."""
    if checkpoint_uri is None:
        return {}, 0
    with local_checkpoint(checkpoint_uri) as stored:
        checkpoint = read_checkpoint(stored)
    weights = learnt(checkpoint.weights, ()) if run.config.model.freeze_encoder else checkpoint.weights
    return weights, checkpoint.state.epoch + 1


def _version(run: Run, weights: dict[str, torch.Tensor], epochs: int, show: Show) -> ModelVersion:
    config, manifest = run.config, run.manifest
    version = ModelVersion(
        config=config,
        panel=run.panel,
        geometry=(manifest.tile_size_px, manifest.mpp),
        num_positions=num_positions(run.reader),
        training=_training_record(run, epochs),
        weights=weights,
        bank=None,
        encoder=run.encoder,
        wide=_wide(manifest) if IMAGE_WIDE in config.model.image_views else None,
        total_genes=total_genes(run.reader),
    )
    if config.model.predictor == "regression":
        return version
    if config.model.predictor == "programs":
        spots = training_spots(run.reader, run.split.train, config.train)
        without = [_trained(run, uri)[0] for uri in _left_out(run, spots, show)] if weights else []
        return with_programs(run, version, spots, without, show)
    version.bank = bank = _bank(run, version.towers(), show)
    validation = run.split.validation if _is_open(config.retrieval) else ()
    drawn = drawn_sections({name: manifest.section(name).num_spots for name in run.split.train})
    queries = _embedded(run, version, [*validation, *drawn], show)
    chosen = _retrieval(run, {name: queries[name] for name in validation}, bank)
    version.config = config.model_copy(update={"retrieval": chosen})
    version.ood_similarity = ood_similarity({name: queries[name] for name in drawn}, bank)
    return version


def _left_out(run: Run, spots: TrainingSpots, show: Show) -> list[str]:
    """Returns the checkpoints of towers that are trained without a fold of the training spots, fold by fold.

    Each is a run inside the run's folder, and goes on where it was left.
    """
    folds = [LeftOutFold(spots, fold) for fold in range(spots.folds.num_folds)]
    runs = [replace(run, out=run.uri, name=f"without-{each.fold}") for each in folds]
    return [fit(inner, _not_logged, show, left_out=each) for inner, each in zip(runs, folds, strict=True)]


def _not_logged(step: int, metrics: Metrics) -> None:
    """Takes the metrics of towers that only tell what the run's own towers are worth."""


def _wide(manifest: Manifest) -> tuple[int, float]:
    assert manifest.wide_px is not None, "a run that reads the wide view has a table with it"
    return manifest.wide_px, manifest.view_mpp(IMAGE_WIDE)


def _training_record(run: Run, epochs: int) -> TrainingRecord:
    trained = [run.manifest.section(name) for name in run.split.train]
    return TrainingRecord(
        manifest_digest=run.manifest.digest(),
        protocol=run.config.split.protocol,
        sections=run.split.train,
        patients=tuple(sorted(run.manifest.patients(run.split.train))),
        validation_sections=run.split.validation,
        validation_patients=tuple(sorted(run.manifest.patients(run.split.validation))),
        test_sections=run.split.test,
        epochs=epochs,
        species=tuple(sorted({entry.species for entry in trained if entry.species})),
        organs=tuple(sorted({entry.organ for entry in trained if entry.organ})),
    )


def _bank(run: Run, towers: TwoTowers, show: Show) -> Bank:
    random_spots = run.config.train.batching == "random_spots"
    return build_bank(towers, run.reader, run.split.train, random_spots, show)


def _is_open(config: RetrievalConfig) -> bool:
    """Returns whether the configuration leaves a setting to be chosen on validation patients."""
    return not (config.k and (config.temperature or config.weighting != "softmax"))


def _embedded(run: Run, version: ModelVersion, names: Sequence[str], show: Show) -> dict[str, np.ndarray]:
    """Returns the image embeddings of sections by their names, float32 (N, D) each."""
    if not names:
        return {}
    if run.reader.features is not None:
        embed = head_of(version).build(torch.device("cpu"))
        return {name: embed(run.reader.features.read_section(name)) for name in names}
    parts = embed_sections(run.reader.root, run.manifest, names, network_of(version), show)
    return {name: arrays["embedding"] for name, arrays in parts}


def _retrieval(run: Run, queries: Mapping[str, np.ndarray], bank: Bank) -> RetrievalConfig:
    """Returns the retrieval settings, chosen on the embedded validation sections if there are any."""
    if not queries:
        return resolve(run.config.retrieval, len(bank))
    sections = [
        ValidationSection(run.manifest.section(name).patient_id, embedding, run.reader.read_section(name)["payload"])
        for name, embedding in queries.items()
    ]
    return choose_retrieval(sections, bank, run.config.retrieval)
