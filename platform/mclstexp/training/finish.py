"""From a run's checkpoint to a model version: bank, retrieval settings and threshold in one folder."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from mclstexp import storage
from mclstexp.data.spots import num_positions
from mclstexp.model.bank import Bank, build_bank, drawn_sections, ood_similarity
from mclstexp.model.embed import embed_sections, network_of
from mclstexp.model.retrieval import resolve
from mclstexp.model.towers import TwoTowers
from mclstexp.model.version import FILES, ModelVersion, TrainingRecord
from mclstexp.settings import RetrievalConfig
from mclstexp.training.checkpoint import STATE, WEIGHTS
from mclstexp.training.run import Run
from mclstexp.training.validation import ValidationSection, choose

FOLDER = "model"


def model_uri(run: Run) -> str:
    """Returns where a run's model version lies."""
    return storage.join(run.uri, FOLDER)


def is_finished(run: Run) -> bool:
    """Tells whether the run's model version was published."""
    return storage.exists(storage.join(model_uri(run), FILES))


def finish(run: Run, checkpoint_uri: str) -> None:
    """Builds the bank, settles the retrieval on the validation patients and publishes the version under the run."""
    with tempfile.TemporaryDirectory() as scratch:
        weights_file = Path(scratch, WEIGHTS)
        storage.download(storage.join(checkpoint_uri, WEIGHTS), weights_file)
        state = json.loads(storage.read(storage.join(checkpoint_uri, STATE)))
        version = _version(run, load_file(weights_file), state["epoch"] + 1)
        folder = Path(scratch, FOLDER)
        folder.mkdir()
        version.save(folder)
        files = sorted(folder.iterdir(), key=lambda path: path.name == FILES)  # the list of files last
        for path in files:
            storage.upload(path, storage.join(model_uri(run), path.name))


def _version(run: Run, weights: dict[str, torch.Tensor], epochs: int) -> ModelVersion:
    config, manifest = run.config, run.manifest
    version = ModelVersion(
        config=config,
        panel=run.panel,
        geometry=(manifest.tile_size_px, manifest.mpp),
        num_positions=num_positions(run.reader),
        training=_record(run, epochs),
        weights=weights,
        bank=None,
    )
    if config.model.predictor == "regression":
        return version
    version.bank = bank = _bank(run, version.towers())
    validation = run.split.validation if _is_open(config.retrieval) else ()
    drawn = drawn_sections({name: manifest.section(name).num_spots for name in run.split.train})
    queries = _embedded(run, version, [*validation, *drawn])
    settled = _retrieval(run, {name: queries[name] for name in validation}, bank)
    version.config = config.model_copy(update={"retrieval": settled})
    version.ood_similarity = ood_similarity({name: queries[name] for name in drawn}, bank)
    return version


def _bank(run: Run, towers: TwoTowers) -> Bank:
    with Progress() as bar:
        task = bar.add_task("bank: sections", total=len(run.split.train))
        random_spots = run.config.train.batching == "random_spots"
        return build_bank(towers, run.reader, run.split.train, random_spots, lambda: bar.advance(task))


def _is_open(config: RetrievalConfig) -> bool:
    """Tells whether the configuration leaves something to be chosen on validation patients."""
    return not (config.k and (config.temperature or config.weighting != "softmax"))


def _embedded(run: Run, version: ModelVersion, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the image embeddings of sections by their names, float32 (N, D) each."""
    if not names:
        return {}
    total = sum(run.manifest.section(name).num_spots for name in names)
    with Progress() as bar:
        task = bar.add_task("embedding: tiles", total=total)
        network = network_of(version)
        parts = embed_sections(run.reader.root, run.manifest, names, network, lambda spots: bar.advance(task, spots))
        return {name: arrays["embedding"] for name, arrays in parts}


def _retrieval(run: Run, queries: Mapping[str, np.ndarray], bank: Bank) -> RetrievalConfig:
    """Returns the retrieval's settings, chosen on embedded validation sections where there are any."""
    if not queries:
        return resolve(run.config.retrieval, len(bank))
    sections = [
        ValidationSection(run.manifest.section(name).patient_id, embedding, run.reader.read_section(name)["payload"])
        for name, embedding in queries.items()
    ]
    return choose(sections, bank, run.config.retrieval)


def _record(run: Run, epochs: int) -> TrainingRecord:
    trained, validated = (
        tuple(sorted({run.manifest.section(name).patient_id for name in names}))
        for names in (run.split.train, run.split.validation)
    )
    return TrainingRecord(
        manifest_digest=run.manifest.digest(),
        protocol=run.config.split.protocol,
        sections=run.split.train,
        patients=trained,
        validation_sections=run.split.validation,
        validation_patients=validated,
        test_sections=run.split.test,
        epochs=epochs,
    )
