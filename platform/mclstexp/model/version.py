"""A model version as a folder: everything a prediction needs, and nothing that must be unpickled.

Weights and bank are safetensors, the rest JSON and Parquet; a direct regression has no bank. `files.json` has every
file's checksum, and its own digest names the version. A folder with a missing or edited file is refused, and so is a
bank made for other weights, genes, tiles or normalisers, whatever the checksums say. The price is that loading reads
every byte once, also of a bank that is then read by memory map.

Schema 6 may have a program model beside its bank, with the calibration of its answers. Schema 5 keeps a frozen encoder
apart from what was learnt: its record always, its tensors where its licence allows a copy. Schema 4 stores the
directions of the bank's keys. Earlier versions load too: without stored directions (1 to 3, they are computed), without
a note of what the bank was made for (1 and 2), and without `ood_similarity` (1, so that tiles are not flagged as out of
distribution).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mclstexp.config import Config, recorded_config
from mclstexp.data.features import EncoderRecord
from mclstexp.data.genes import GenePanel, normalisers
from mclstexp.data.schema import IMAGE_WIDE, Manifest
from mclstexp.errors import ModelError, RunError
from mclstexp.messages import AGAINST_DIVERGENCE
from mclstexp.model.bank import ARRAYS, DONORS, Bank, made_for
from mclstexp.model.blend import FILE as PROGRAMS
from mclstexp.model.blend import ProgramModel
from mclstexp.model.calibration import FILE as CALIBRATION
from mclstexp.model.calibration import Calibration
from mclstexp.model.encoders import preset_of
from mclstexp.model.frozen import FrozenEncoder, encoder_from_state
from mclstexp.model.retrieval import Retrieved, regressed, resolve, retrieve
from mclstexp.model.towers import TwoTowers, feature_width, image_projection, plain_tensors
from mclstexp.model.weights import weights_digest
from mclstexp.settings import ModelConfig, TilesConfig

MODEL_SCHEMA = 6
_READ_SCHEMAS = (1, 2, 3, 4, 5, MODEL_SCHEMA)
_RETRAIN = "train it again with jobs/train.py"
_FIX = f"use the code that wrote it, or {_RETRAIN}"
FILES, MODEL, WEIGHTS = "files.json", "model.json", "weights.safetensors"
ENCODER = "encoder.safetensors"
"""Tensors of a frozen encoder, where its licence allows a copy."""
MPP_TOLERANCE = 0.02
"""Largest relative difference between the resolutions of a model's tiles and a table's."""


class TrainingRecord(BaseModel):
    """What the version was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest_digest: str
    protocol: str
    sections: tuple[str, ...]
    patients: tuple[str, ...]
    validation_sections: tuple[str, ...]
    validation_patients: tuple[str, ...] = ()
    """Patients of `validation_sections`; empty in versions that do not record them."""
    test_sections: tuple[str, ...]
    epochs: int
    species: tuple[str, ...] = ()
    """Species of `sections`; empty if none is stated."""
    organs: tuple[str, ...] = ()
    """Organs of `sections`; empty if none is stated."""


class _ModelFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    config: dict[str, object]
    panel: str
    tile_size_px: int
    mpp: float
    num_positions: int
    training: TrainingRecord
    ood_similarity: float | None = None
    encoder: EncoderRecord | None = None
    wide: tuple[int, float] | None = None
    total_genes: str | None = None


class ModelVersion:
    """A trained model with its bank, panel, normalisers and tile geometry."""

    def __init__(
        self,
        config: Config,
        panel: GenePanel,
        geometry: tuple[int, float],
        num_positions: int,
        training: TrainingRecord,
        weights: dict[str, torch.Tensor],
        bank: Bank | None,
        ood_similarity: float | None = None,
        encoder: FrozenEncoder | None = None,
        wide: tuple[int, float] | None = None,
        programs: ProgramModel | None = None,
        calibration: Calibration | None = None,
        total_genes: GenePanel | None = None,
    ) -> None:
        self.config, self.panel, self.training, self.bank = config, panel, training, bank
        self.programs = programs
        """What answers in gene programs; None for a model that retrieves or regresses expression itself."""
        self.calibration = calibration
        """What programs know of their errors; None for other models."""
        self.tile_size_px, self.mpp = geometry
        self.num_positions = num_positions
        self.weights = weights
        self.ood_similarity = ood_similarity
        """Best cosine below which a tile is out of distribution; None if unknown."""
        self.encoder = encoder
        """The frozen image encoder; None if it was trained, so that its tensors are among `weights`."""
        self.wide = wide
        """Edge of the wide view in pixels and its micrometres per pixel; None: the model sees one view."""
        self.total_genes = total_genes
        """Genes that make a spot's total; None: all that a section counts (genes.total=all)."""
        self.digest = ""
        """12 hex digits that name the version's content; empty until it is saved or loaded."""

    def predict(self, embedding: np.ndarray, xy_um: np.ndarray) -> Retrieved:
        """Returns the version's answer to the tiles of one slide.

        Args:
            embedding: of all tiles of the slide, by `embed.network_of`, float32 (N, D).
            xy_um: their centres in micrometres, (N, 2), which only programs look at.
        """
        bank = self.searched_bank
        if bank is None:
            return regressed(embedding)
        retrieval = resolve(self.config.retrieval, len(bank))
        if self.programs is None:
            return retrieve(embedding, bank, retrieval)
        return self.programs.answer(embedding, xy_um, bank, retrieval)

    @property
    def searched_bank(self) -> Bank | None:
        """The bank as predictions search it: its payload is expression or, with programs, their scores."""
        return self.bank if self.bank is None or self.programs is None else self.programs.bank(self.bank)

    @property
    def licence(self) -> str:
        """Licence of the pretrained weights that the version holds or needs; empty if it began with random ones."""
        if self.config.model.image_weights == "random":
            return ""
        return preset_of(self.config.model.image_encoder).licence

    def needed_blocks(self) -> dict[str, int]:
        """Returns the blocks of features that stand for a tile, with their widths; none if the encoder was trained."""
        if self.encoder is None:
            return {}
        record, views = self.encoder.record, self.config.model.image_views
        return {name: width for view in views for name, width in record.blocks(view).items()}

    def view_px(self, view: str) -> int:
        """Returns the edge in pixels of the tiles of a view."""
        return self.wide[0] if view == IMAGE_WIDE and self.wide else self.tile_size_px

    def use_weights(self, weights: str) -> None:
        """Takes a frozen encoder's tensors from where `model.image_weights` says instead of looking for them.

        Args:
            weights: `random`, the setting's default, changes nothing, and neither does what the model was trained with
                if it contains its encoder.

        Raises:
            ModelError: they are another encoder's, or the version's encoder was trained and is stored in it.
        """
        if weights == "random":
            return
        if self.encoder is not None:
            self.encoder = self.encoder.with_weights(weights)
        elif weights != self.config.model.image_weights:
            raise ModelError(
                f"model.image_weights={weights} is of no use: the model trained its image encoder and contains it"
            )

    def towers(self) -> TwoTowers:
        """Returns the two towers with the version's weights, in evaluation mode on the CPU."""
        model = TwoTowers(self.config.model, len(self.panel), self.num_positions, self.tile_size_px)
        model.load_state_dict(self.weights)
        return model.eval()

    def save(self, folder: str | Path) -> None:
        """Writes the version into an existing empty local folder.

        Raises:
            RunError: a weight or a number of the bank is not finite; nothing was written.
        """
        if found := self._not_finite():
            raise RunError(
                f"{found} is not finite: training has diverged, and no model version was written; {AGAINST_DIVERGENCE}"
            )
        folder = Path(folder)
        record = _ModelFile(
            schema_version=MODEL_SCHEMA,
            config=self.config.model_dump(mode="json"),
            panel=self.panel.to_json(),
            tile_size_px=self.tile_size_px,
            mpp=self.mpp,
            num_positions=self.num_positions,
            training=self.training,
            ood_similarity=self.ood_similarity,
            encoder=self.encoder.record if self.encoder else None,
            wide=self.wide,
            total_genes=self.total_genes.to_json() if self.total_genes else None,
        )
        (folder / MODEL).write_text(record.model_dump_json(indent=1))
        save_file(plain_tensors(self.weights), folder / WEIGHTS)
        if self.encoder is not None and self.encoder.record.stores_weights:
            save_file(self.encoder.state(), folder / ENCODER)
        if self.programs is not None:
            self.programs.save(folder)
        if self.calibration is not None:
            self.calibration.save(folder, self.panel)
        if self.bank is not None:
            self.bank.save(folder, self._identity(folder))
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / FILES).write_text(json.dumps(files, indent=1))
        self.digest = _sha256(folder / FILES)[:12]

    @classmethod
    def load(cls, folder: str | Path) -> "ModelVersion":
        """Returns the version that `save` wrote, in this or an earlier schema.

        Raises:
            ModelError: a file is missing or was edited, the schema is unknown, the bank belongs to another version, or
                a number is not finite.
        """
        folder = Path(folder)
        _verify(folder)
        try:
            tree = json.loads((folder / MODEL).read_text())
            if tree["schema_version"] not in _READ_SCHEMAS:
                readable = ", ".join(map(str, _READ_SCHEMAS))
                raise ModelError(
                    f"{folder} has model schema {tree['schema_version']}, this code reads {readable}; {_FIX}"
                )
            record = _ModelFile.model_validate(tree)
            panel = GenePanel.from_json(record.panel)
            total_genes = GenePanel.from_json(record.total_genes) if record.total_genes else None
            weights = load_file(folder / WEIGHTS)
            stored = load_file(folder / ENCODER) if (folder / ENCODER).is_file() else None
            bank = Bank.load(folder) if (folder / ARRAYS).is_file() else None
            calibration = Calibration.load(folder, panel) if (folder / CALIBRATION).is_file() else None
        except (ValidationError, ValueError, SafetensorError, OSError, KeyError, TypeError) as error:
            raise ModelError(f"{folder} is not a model version that this code reads: {error}; {_FIX}") from error
        config = recorded_config(_without_turned_features(record), str(folder))
        encoder, weights = _encoder(config.model, record, weights, stored)
        programs = _programs(folder, config.model, record.tile_size_px, weights)
        if stored is not None and encoder is not None and (own := weights_digest(stored)) != encoder.record.digest:
            raise ModelError(
                f"{ENCODER} of {folder} is not the version's frozen encoder: its digest is {own[:12]}..., the "
                f"recorded one {encoder.record.digest[:12]}...; fetch it again"
            )
        version = cls(
            config=config,
            panel=panel,
            geometry=(record.tile_size_px, record.mpp),
            num_positions=record.num_positions,
            training=record.training,
            weights=weights,
            bank=bank,
            ood_similarity=record.ood_similarity,
            encoder=encoder,
            wide=record.wide,
            programs=programs,
            calibration=calibration,
            total_genes=total_genes,
        )
        if (total_genes is None) != (config.genes.total == "all"):
            has = "no genes" if total_genes is None else f"{len(total_genes)} genes"
            raise ModelError(f"{folder} has {has} of spot totals, and genes.total={config.genes.total}; fetch it again")
        version._require_own_bank(folder)
        if found := version._not_finite():
            raise ModelError(f"{found} of the model version {folder} is not finite, so no answer would be; {_RETRAIN}")
        version.digest = _sha256(folder / FILES)[:12]
        return version

    def require_table(self, manifest: Manifest) -> None:
        """Checks that a table's tiles were cut like the model's.

        Raises:
            ModelError: tile size, resolution or encoding differ; names both values.
        """
        if manifest.tile_size_px != self.tile_size_px:
            raise ModelError(
                f"the model takes tiles of {self.tile_size_px} px, the table has {manifest.tile_size_px} px; prepare "
                f"it with --tiles.size_px {self.tile_size_px}"
            )
        if abs(manifest.mpp / self.mpp - 1) > MPP_TOLERANCE:
            raise ModelError(
                f"the model takes tiles of {self.mpp:.4g} um/px, the table has {manifest.mpp:.4g}; prepare it with "
                f"--tiles.mpp {self.mpp:.4g}"
            )
        self._require_wide_view(manifest)
        own, other = (_encoding(source) for source in (self.config.tiles, manifest))
        if own != other:
            raise ModelError(
                f"the model's tiles are {own}, the table's {other}, which changes fine texture; prepare it with "
                f"--tiles.encoding {self.config.tiles.encoding} --tiles.jpeg_quality {self.config.tiles.jpeg_quality}"
            )

    def _not_finite(self) -> str | None:
        """Returns the name of the first array with a number that is not finite; None if there is none."""
        if self.ood_similarity is not None and not np.isfinite(self.ood_similarity):
            return "ood_similarity"
        for name, value in self.weights.items():
            if not torch.isfinite(value).all():
                return f"the weight {name}"
        if self.encoder is not None and (found := self.encoder.not_finite()):
            return f"the weight {found} of the frozen encoder"
        for part in (self.programs, self.calibration):
            if part is not None and (found := part.not_finite()):
                return found
        return None if self.bank is None else self.bank.not_finite()

    def _require_wide_view(self, manifest: Manifest) -> None:
        if self.wide is None:
            return
        size_px, mpp = self.wide
        if manifest.wide_px != size_px or abs(manifest.view_mpp(IMAGE_WIDE) / mpp - 1) > MPP_TOLERANCE:
            found = "none" if manifest.wide_px is None else f"{manifest.wide_px} px at {manifest.wide_mpp:.4g} um/px"
            raise ModelError(
                f"the model sees a wide view of {size_px} px at {mpp:.4g} um/px, the table has {found}; prepare it "
                f"with --tiles.wide_um {size_px * mpp:.6g} --tiles.wide_px {size_px}"
            )

    def _identity(self, folder: Path) -> dict[str, str]:
        """Returns the properties of this version that its bank depends on, by name."""
        spot, target = normalisers(self.config.genes)
        identity = {
            "weights": f"with SHA-256 {_sha256(folder / WEIGHTS)[:12]}...",
            "a panel": f"of {len(self.panel)} genes with SHA-256 {_sha256_of(self.panel.to_json())[:12]}...",
            "tiles": f"of {self.tile_size_px} px at {self.mpp!r} um/px",
            "spots": f"in {spot.unit()}",
            "a target": f"in {target.unit()}",
        }
        if self.total_genes is not None:
            genes = _sha256_of(self.total_genes.to_json())[:12]
            identity["spot totals"] = f"over {len(self.total_genes)} genes with SHA-256 {genes}..."
        if self.encoder is not None:
            identity["a frozen encoder"] = f"with digest {self.encoder.record.digest[:12]}..."
        if self.programs is not None:
            identity["programs"] = f"with SHA-256 {_sha256(folder / PROGRAMS)[:12]}..."
        return identity

    def _require_own_bank(self, folder: Path) -> None:
        """Checks that there is a bank if and only if the version retrieves, and that it was made for this version."""
        bank, predictor = self.bank, self.config.model.predictor
        if (self.programs is None) != (predictor != "programs"):
            has = "no programs" if self.programs is None else "programs"
            raise ModelError(f"{folder} has {has}, and model.predictor={predictor}; fetch it again")
        if (bank is None) != (predictor == "regression"):
            has = "no bank" if bank is None else "a bank"
            raise ModelError(f"{folder} has {has}, and model.predictor={predictor}; fetch it again")
        if bank is None:
            return
        if bank.payload.shape[1] != len(self.panel):
            raise ModelError(f"the bank of {folder} has {bank.payload.shape[1]} genes, its panel {len(self.panel)}")
        own = self._identity(folder)
        for name, value in made_for(folder).items():
            if own.get(name) != value:
                raise ModelError(
                    f"the bank of {folder} does not belong to it: it was made for {name} {value}, the model version "
                    f"has {name} {own.get(name)}; fetch it again"
                )


def _without_turned_features(record: _ModelFile) -> dict[str, object]:
    """Returns a version's settings; earlier schemas have frozen encoders that see turned tiles.

    Stored features are of plain tiles, so that such a version counts as one that contains its encoder like a trained
    one, and answers as it did.
    """
    model = record.config.get("model")
    if record.encoder is None and isinstance(model, dict) and model.get("test_turns"):
        return record.config | {"model": model | {"freeze_encoder": False}}
    return record.config


def _encoder(
    config: ModelConfig,
    record: _ModelFile,
    weights: dict[str, torch.Tensor],
    stored: dict[str, torch.Tensor] | None,
) -> tuple[FrozenEncoder | None, dict[str, torch.Tensor]]:
    """Returns a version's frozen encoder, if it has one, and its learnt tensors; earlier schemas mixed the two."""
    if record.encoder is not None:
        return FrozenEncoder(record.encoder, stored), weights
    if not config.freeze_encoder:
        return None, weights
    prefix = "image_tower.encoder."
    frozen = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    learnt = {name: value for name, value in weights.items() if not name.startswith("image_tower.")}
    return encoder_from_state(config, record.tile_size_px, frozen), learnt


def _encoding(source: TilesConfig | Manifest) -> str:
    return f"jpeg of quality {source.jpeg_quality}" if source.encoding == "jpeg" else source.encoding


def _verify(folder: Path) -> None:
    """Checks that every file is listed in `files.json`, is there and has its checksum."""
    try:
        files = json.loads((folder / FILES).read_text())
        unlisted = {
            MODEL,
            WEIGHTS,
            *(name for name in (ARRAYS, DONORS, ENCODER) if (folder / name).exists()),
        } - files.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder} is not a model version: {FILES} cannot be read ({error})") from error
    if unlisted:
        raise ModelError(f"{FILES} of the model version {folder} does not list {', '.join(sorted(unlisted))}")
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ModelError(f"the model version {folder} is incomplete: {name} is missing; fetch it again")
        if (found := _sha256(path)) != expected:
            raise ModelError(
                f"{name} of the model version {folder} was changed after it was saved: it has SHA-256 {found[:12]}..., "
                f"{FILES} says {str(expected)[:12]}...; fetch it again"
            )


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _programs(
    folder: Path, config: ModelConfig, tile_size_px: int, weights: dict[str, torch.Tensor]
) -> ProgramModel | None:
    """Returns the program model of a version, with its towers if it has weights; None for other versions.

    Raises:
        ModelError: its file or a tensor of its towers is missing, or cannot be read.
    """
    if not (folder / PROGRAMS).is_file():
        return None
    prefix, head = "image_head.", None
    try:
        if weights:
            head = image_projection(config, feature_width(config, tile_size_px)).eval()
            own = {name for name in weights if name.startswith(prefix)}
            head.load_state_dict({name.removeprefix(prefix): weights[name] for name in own})
        return ProgramModel.load(folder, head)
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder} is not a model version that this code reads: {error}; {_FIX}") from error
