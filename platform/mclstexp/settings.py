"""The blocks of the configuration: every setting with its default, bounds and the text that `--help` shows."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mclstexp.errors import ConfigError


class ConfigBlock(BaseModel):
    """Base of all blocks: frozen, no unknown keys, no NaN, field docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _without_password(uri: str) -> str:
    """Returns a URI without a password: settings are logged, stored and shown."""
    if urlsplit(uri).password:
        raise ConfigError(
            "an address among the settings contains a password; give it in the environment (MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    return uri


FITTED_PANELS = ("hvg", "hvg_union")
"""Values of `genes.panel` that do not name a file."""

Address = Annotated[str, AfterValidator(_without_password)]


class StorageConfig(ConfigBlock):
    """How `s3://` URIs are reached. Secrets come from the standard AWS environment variables or a named profile."""

    endpoint_url: Address | None = None
    """URL of an S3-compatible server; empty: AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = None
    """S3 region; empty: AWS_REGION or AWS_DEFAULT_REGION, else us-east-1."""
    profile: str | None = None
    """Profile in the AWS credentials file, which every node must have; empty: the environment's credentials."""
    shared_paths: bool = False
    """Whether all nodes see the same local paths (a shared file system)."""

    def environment(self) -> dict[str, str]:
        """Returns the block as AWS environment variables (no secrets), for the driver and all workers."""
        values = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), self.endpoint_url)
        values |= dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), self.region) | {"AWS_PROFILE": self.profile}
        return {name: value for name, value in values.items() if value}


class ClusterConfig(ConfigBlock):
    """What Ray may use."""

    local_cpus: int | None = Field(None, ge=2)
    """Logical CPUs of a Ray started on this machine; default enough for the run. Unused on a cluster."""
    object_store_mb: int = Field(1024, ge=128)
    """Object store of a Ray started on this machine, in MiB. Unused on a cluster."""
    data_cpus: int = Field(1, ge=1)
    """CPUs that each training worker's data stream may use for reading and decoding."""
    data_pool: str | None = None
    """Value of the Ray node label `pool` on which tiles are decoded and no worker trains; empty: any node."""
    wait_s: float = Field(0.0, ge=0)
    """Seconds to wait for an autoscaler to add nodes before a run that does not fit is refused."""


class TilesConfig(ConfigBlock):
    """How slides are cut into tiles."""

    size_px: int = Field(224, ge=16, le=2048)
    """Edge of a tile in pixels."""
    mpp: float | None = Field(None, gt=0)
    """Micrometres per tile pixel; empty: the sections' own, if all agree within 2 %."""
    allow_upsampling: bool = False
    """Whether slides may be enlarged by more than 1.5 to reach `mpp`."""
    encoding: Literal["jpeg", "png"] = "jpeg"
    """Encoding of stored tiles: jpeg (small, lossy) or png (exact)."""
    jpeg_quality: int = Field(85, ge=1, le=100)
    """JPEG quality of stored tiles."""
    sentence_length: int = Field(128, ge=2, le=4096)
    """Maximum number of spots in a sentence, the unit of reading and of attention."""
    min_tissue: float = Field(0.1, ge=0, le=1)
    """Minimum share of tissue in a tile; tiles and measured spots with less are rejected."""
    wide_um: float | None = Field(618.0, gt=0)
    """Edge in micrometres of a second, wider view of each spot; none: tiles have one view."""
    wide_px: int = Field(112, ge=16, le=2048)
    """Edge of the wide view in pixels."""


class GenesConfig(ConfigBlock):
    """Which genes are predicted, and in which unit."""

    panel: str = "hvg"
    """`hvg`: most variable over the training sections; `hvg_union`: within any of them (paper); or a text file with one
    gene per line."""
    num_genes: int = Field(1000, ge=1)
    """Number of genes in an `hvg` panel; number that each section adds to an `hvg_union`."""
    min_spots: int = Field(0, ge=0)
    """Minimum number of training spots with counts for a gene of an `hvg` or `hvg_union` panel."""
    min_sections: float = Field(0.8, ge=0, le=1)
    """Minimum share of training sections that must measure a gene of an `hvg` panel (`hvg_union`: always all)."""
    missing: Literal["error", "drop"] = "error"
    """What to do with genes of a panel file that no training section measures: refuse the file, or drop these genes."""
    input: Literal["per_spot_all", "per_spot_panel", "per_gene"] = "per_spot_all"
    """Divisor of counts: the spot's total over all genes or over the panel, or the gene's total in the section."""
    target: Literal["per_spot_all", "per_spot_panel", "per_gene"] = "per_spot_all"
    """Divisor of the counts that are retrieved, predicted and scored."""
    total: Literal["all", "shared"] = "all"
    """Genes that make the spot's total of `per_spot_all`: all that the section measures, or those that all training
    sections measure, for assays with different genes."""
    scale: float = Field(1e4, gt=0)
    """Total of each spot (or gene) after division, before the logarithm."""
    log_base: Literal["e", "10"] = "e"
    """Base of log(1 + x)."""


class SplitConfig(ConfigBlock):
    """What is held out. Held-out data enters neither panel, normaliser, bank nor training."""

    protocol: Literal["patient", "reference"] = "patient"
    """`patient`: no patient is on both sides. `reference` (as published): other sections of a test patient train."""
    test_sections: tuple[str, ...] = ()
    """Held-out sections."""
    test_patients: tuple[str, ...] = ()
    """Held-out patients, with all their sections."""
    validation_patients: tuple[str, ...] = ()
    """Patients kept from training to choose the epoch, the retrieval's k and temperature, and settings in a sweep."""
    num_validation_patients: int = Field(0, ge=0)
    """Number of validation patients to draw from the non-test patients; redrawn for each fold."""


class ModelConfig(ConfigBlock):
    """The two towers."""

    image_encoder: str = "densenet121"
    """A preset (densenet121, uni2-h, virchow2, h-optimus-0, ...; docs/encoders.md lists them) or timm/NAME."""
    image_weights: str = "random"
    """`random`, `imagenet` (torchvision's cache or download), `hub` (the preset's place on the Hugging Face hub), or a
    file (.safetensors, .pth, .bin; local or s3://)."""
    image_layers: tuple[str, ...] = ()
    """Pooled layers of the encoder that are joined to a view's features; empty: the preset's own pooled feature."""
    image_views: tuple[Literal["image", "image_wide", "all"], ...] = Field(("image",), min_length=1)
    """Views of a spot whose features are joined: `image`, `image_wide` (needs a tile table with wide views), both, or
    `all` that the tile table has."""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """Number format of the stored features of a frozen encoder."""
    input_scaling: Literal["imagenet", "unit", "bgr255"] | None = None
    """Pixels normalised with ImageNet's mean and deviation, only scaled to [0, 1], or blue first from 0 to 255; empty:
    as the encoder was trained."""
    test_turns: bool = False
    """Whether tiles are also flipped and turned, each in a fixed way, when they are embedded (published for Visium)."""
    predictor: Literal["retrieval", "programs", "regression"] = "retrieval"
    """Reads expression from the most similar measured spots; reads gene programs from them and from a ridge, and knows
    a tile's neighbours and its slide (needs `freeze_encoder`); or regresses it directly from the tile (ST-Net)."""
    freeze_encoder: bool = False
    """Whether the image encoder keeps its weights: its features are computed once, and only the layers on top learn."""
    spot_layers: int = Field(4, ge=0, le=48)
    """Transformer blocks of the spot tower (its depth); 0: each spot is embedded on its own."""
    spot_width: int | None = Field(256, ge=8)
    """Width of the spot tower; empty: the number of genes, with no input map (as published)."""
    spot_heads: int = Field(8, ge=1)
    """Attention heads of a block."""
    spot_head_dim: int = Field(64, ge=4)
    """Channels of an attention head."""
    spot_ffn_ratio: float = Field(2.0, gt=0)
    """Hidden width of a block's feed-forward layer, as a multiple of the tower's width."""
    spot_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout in the spot tower."""
    position: Literal["sinusoidal", "table", "pixel_table", "distance", "none"] = "sinusoidal"
    """Sines of the distance from the sentence's centre, learnt tables of array or pixel column and row, attention that
    falls with the distance between spots, or none."""
    image_directions: int | None = Field(None, ge=2, le=256)
    """Leading directions of the standardised features that a frozen encoder's images are embedded from; empty: all
    features as they are. Programs with towers need it."""
    input_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what the towers read: expression, and the image's directions."""
    embedding_dim: int = Field(256, ge=2)
    """Width of the common space."""
    l2_normalise: bool = True
    """Whether embeddings have unit length."""
    temperature: float = Field(0.07, ge=1e-4, le=100)
    """Divides the logits; the start value if it is learnt."""
    learn_temperature: bool = True
    """Whether the temperature is learnt."""
    max_logit_scale: float = Field(100.0, gt=0)
    """Upper limit of 1/temperature if it is learnt."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch statistics of each worker, of all workers (GPU), or the fixed running ones."""


class TrainConfig(ConfigBlock):
    """Contrastive training."""

    epochs: int = Field(30, ge=0)
    """Passes over the training sentences. 0, with `model.predictor=programs`: no towers are trained, and spots are
    found by the features of the frozen encoder alone."""
    min_steps: int = Field(0, ge=0)
    """Fewest optimiser steps: epochs are added until they take as many. 0: as many as `epochs` take."""
    cross_fit: int = Field(5, ge=3, le=5)
    """Folds of the training patients (or sections) of a program model, at most: penalties, shares and intervals are
    fitted to spots of folds that were left out, and towers are trained again without each."""
    batching: Literal["sentences", "random_spots"] = "sentences"
    """A batch is a set of neighbourhoods, or random spots of all sections that attend to each other (as published)."""
    batch_sentences: int = Field(4, ge=1)
    """Sentences of a global batch, over all workers. Unused with `random_spots`."""
    batch_spots: int = Field(128, ge=2)
    """Spots of a global batch with `random_spots`, over all workers."""
    positives: str = "pairs"
    """`pairs`: a tile's only positive is its own spot; `soft`: every spot, weighted by similarity (BLEEP)."""
    drop_spots: float = Field(0.3, ge=0, lt=1)
    """Largest share of a sentence's spots left out, redrawn for each sentence and epoch. Unused with `random_spots`."""
    augmentation: Literal["none", "default", "reference", "flips"] = "default"
    """Flips, quarter turns and mild colour and stain jitter; the published recipe (Visium's: `flips`); or none. With
    `freeze_encoder` only the stored draws are augmented (`feature_draws`)."""
    feature_draws: int = Field(0, ge=0, le=64)
    """Augmented draws of each tile whose features are stored; 0: the plain tile. Towers take them in turn; programs are
    fitted to all of them and the plain tile. Needs `model.freeze_encoder`."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Optimiser."""
    tower_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of both towers."""
    head_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the projection heads and the temperature."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; adamw applies none to norms, biases and the temperature."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    shuffle_pairs: bool = False
    """Whether each image is paired with another spot's expression: a control that must learn nothing."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the towers; auto: bf16 if the device computes it natively."""
    compile: bool = False
    """Whether the image tower is compiled (torch.compile); of no effect on a frozen one, whose features are stored."""
    validate_every: int = Field(1, ge=0)
    """Epochs between scores on the validation patients, if there are any; the last epoch is always scored.
    0: no scores, and no early stopping."""
    patience: int = Field(10, ge=0)
    """Scores without improvement that end training, before `min_steps` too; the model is the best checkpoint. 0: all
    epochs, the last one."""
    num_workers: int = Field(1, ge=1)
    """Training workers."""
    use_gpu: bool = False
    """GPU workers (nccl); else CPU workers (gloo)."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Share of a GPU for each worker with `use_gpu`; below 1 only with one worker, so that several runs share a GPU."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs, and threads, of each training worker; empty: all cores for the only worker of a run on this machine, else
    1."""
    micro_batch: int | None = Field(None, ge=1)
    """Tiles of a worker's batch that the image tower takes at a time, which limits memory; a second forward pass is the
    price. Results change by rounding alone, except that an encoder with dropout draws anew for each part. Needs a
    trained encoder with `model.batch_norm=frozen`. Empty: as many as fit into half of the free memory; set it where
    several runs share a machine without GPUs (sweeps, cross-validation), of which each would take that half."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints within an epoch; each epoch ends with one. With `model.freeze_encoder` some are left
    out, so that checkpoints take at most a twentieth of the time."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep: the newest; with early stopping the best ones, and the newest."""
    max_failures: int = Field(3, ge=0)
    """Restarts of the worker group before the run fails."""
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout and initial weights."""


class RetrievalConfig(ConfigBlock):
    """How a tile's expression is read from the bank."""

    k: int | None = Field(None, ge=1)
    """Nearest spots that are averaged; empty: chosen on the validation patients, or 200 without any; 400 with
    `fixed_number`."""
    weighting: Literal["softmax", "fixed_number", "inverse_square", "mean"] = "softmax"
    """Softmax of cosine over `temperature`; the same with each query's own temperature, so that all have
    `effective_donors`; 1/d^2 of un-normalised vectors (as published); or equal weights."""
    effective_donors: float = Field(50.0, ge=1)
    """Effective number of spots, 1 / sum of squared weights, behind each answer with `fixed_number`."""
    temperature: float | None = Field(None, gt=0)
    """Temperature of the softmax; empty: chosen on the validation patients, or 0.1 without any."""
    distance: Literal["l1", "l2"] = "l2"
    """Distance d of `inverse_square`."""


class PredictConfig(ConfigBlock):
    """How slides are cut and predicted; a model fixes the tiles themselves."""

    overlap: float = Field(0.0, ge=0, lt=1)
    """Share of its edge that a tile has in common with its neighbour."""
    min_tissue: float = Field(0.1, ge=0, le=1)
    """Smallest share of tissue for a tile to be predicted."""
    allow_upsampling: bool = False
    """Whether slides may be enlarged by more than 1.5 to reach the model's resolution."""
    other_stains: bool = False
    """Whether images that do not look like H&E are predicted, with a flag, instead of quarantined."""
    intervals: bool = False
    """Whether h5ad files have the ends of 90 % intervals as layers `lower` and `upper`, which makes them three times as
    large; of a calibrated model (`model.predictor=programs`). Its tables state what they follow from in any case."""
    retry_quarantined: bool = False
    """Whether slides that an earlier run quarantined are tried again."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of the run: one inspects slides, the others read and, without GPUs, embed; empty: all of the cluster."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs that embed; empty: all of the cluster. `cluster.wait_s` limits how long to wait for CPUs and GPUs."""
    scratch: str | None = None
    """Folder on every node for copies of remote slides; default in the system's temporary folder."""
    scratch_gb: float = Field(50.0, gt=0)
    """Disk limit for these copies on each node, in GB."""


class TuneConfig(ConfigBlock):
    """How a sweep spends its trials."""

    grace_epochs: int = Field(4, ge=1)
    """Epochs that every trial gets before it may be stopped."""
    reduction: int = Field(3, ge=2)
    """One in this many of the trials at a rung continues; each rung is this factor later than the one before."""
    max_concurrent: int | None = Field(None, ge=1)
    """Limit of trials at once; empty: as many as fit on the cluster."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""
    retry_failed: bool = False
    """Whether a resumed sweep retries its failed trials."""
    replicates: int = Field(3, ge=3)
    """Trainings of the best settings, each with its own seed, to compare with the champion."""
    block_um: float = Field(1000.0, gt=0)
    """Edge of the blocks of tissue that this comparison resamples, in micrometres."""


class TrackingConfig(ConfigBlock):
    """MLflow."""

    uri: Address = "sqlite:///mlflow.db"
    """Tracking and registry URI: `sqlite:///FILE` on one machine, `http(s)://` on a cluster."""
    experiment: str = "mclstexp"
    """Experiment that runs are logged to."""
    artifacts: str | None = None
    """URI under which a new experiment keeps its artifacts; default the server's, or beside the SQLite file."""
    model_name: str = "mclstexp"
    """Registered model that a finished run adds a version to."""
