"""The stored features that runs of a frozen encoder read: found, or made first, on the driver's side.

Every job that trains comes here before its workers start, so that features are made once, by one process.
"""

from collections.abc import Iterable
from dataclasses import replace

from mclstexp import storage
from mclstexp.config import Config
from mclstexp.data.schema import load_manifest
from mclstexp.errors import ConfigError
from mclstexp.model.extract import features, wanted
from mclstexp.model.frozen import frozen_encoder
from mclstexp.progress import Show, hidden
from mclstexp.training.run import Run


def with_features(run: Run, show: Show = hidden) -> Run:
    """Returns the run with the stored features of its training and validation sections; makes those that are missing.

    Its encoder lets go of its tensors: many runs side by side would each keep them. A run that trains its encoder is
    returned as it is.

    Raises:
        ConfigError, ModelError: as `extract.features`.
    """
    if run.encoder is None or run.reader.features is not None:
        return run
    sections = (*run.split.train, *run.split.validation)
    found = features(run.reader.root, run.manifest, sections, run.encoder, wanted(run.config), show)
    return replace(run, reader=replace(run.reader, features=found), encoder=run.encoder.without_tensors())


def store_features(
    data: str, section_ids: Iterable[str], configs: Iterable[Config], show: Show = hidden, make: bool = True
) -> None:
    """Makes the missing features of some sections, for runs with these settings that start side by side afterwards.

    Args:
        data: the tile table.
        section_ids: all sections that any of the runs reads.
        configs: the runs' settings, one for each encoder among them; those that train their encoder need nothing.
        show: takes progress.
        make: whether missing features are made, which needs Ray; else they are an error.

    Raises:
        ConfigError: without `make`, features are missing (the message has the command that makes them), or settings
            train their encoder; or as `extract.features`.
        ModelError: as `extract.features`.
    """
    manifest, sections = load_manifest(data), sorted(set(section_ids))
    for config in configs:
        if config.model.freeze_encoder:
            encoder = frozen_encoder(config.model, manifest.tile_size_px, config.train.seed)
            features(storage.absolute(data), manifest, sections, encoder, wanted(config), show, make)
        elif not make:
            raise ConfigError(
                "--features require needs model.freeze_encoder=true: an encoder that is trained reads tiles; leave "
                "--features out, or freeze the encoder"
            )
