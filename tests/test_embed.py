"""The image side of a model, and the embedding of a table: shares of the cluster, and processes that die."""

import os
import threading

import numpy as np
import pytest
import ray
import torch
from ray.data import ExecutionResources
from small_table import empty_manifest

from mclstexp.cluster import ordered
from mclstexp.data.schema import load_manifest
from mclstexp.errors import ResourceError
from mclstexp.model.embed import ImageHead, ImageNetwork, embed_sections
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.towers import ImageTower, ProjectionHead, TwoTowers
from mclstexp.settings import ModelConfig

CPU = torch.device("cpu")
TILES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


def _config(**changes: object) -> ModelConfig:
    return ModelConfig(image_encoder="small_cnn", spot_layers=1, spot_width=16, embedding_dim=8, **changes)


def _network(config: ModelConfig, kind: type[ImageNetwork] = ImageNetwork) -> ImageNetwork:
    towers = _towers(config)
    parts = (towers.image_tower.state_dict(), towers.image_head.state_dict())
    return kind(config.model_dump(mode="json"), 32, *parts, precision="fp32")


def _towers(config: ModelConfig) -> TwoTowers:
    """Returns two towers whose batch statistics differ from a new network's."""
    torch.manual_seed(3)
    towers = TwoTowers(config, 4, 0, 32)
    towers.embed_images(torch.rand(16, 3, 32, 32))
    return towers.eval()


@pytest.mark.parametrize("l2_normalise", [True, False])
def test_the_image_side_alone_embeds_as_the_two_towers_do(l2_normalise: bool) -> None:
    config = _config(l2_normalise=l2_normalise)
    towers = _towers(config)
    with torch.inference_mode():
        expected = towers.embed_images(torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255).numpy()
    found = _network(config).build(CPU)(TILES)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)


def test_other_tiles_do_not_change_an_embedding() -> None:
    embed = _network(_config()).build(CPU)
    assert embed(TILES)[2:3] == pytest.approx(embed(TILES[2:3]), abs=1e-6)


def test_with_test_turns_embedded_tiles_are_turned() -> None:
    plain, turning = (_network(_config(test_turns=turns)).build(CPU) for turns in (False, True))
    sides = [np.rot90(side, turns, (1, 2)) for side in (TILES, TILES[:, ::-1]) for turns in range(4)]
    by_side = np.stack([plain(np.ascontiguousarray(side)) for side in sides])
    found = turning(TILES)
    nearest = np.abs(by_side - found).max(axis=2)
    assert nearest.min(axis=0) == pytest.approx(np.zeros(len(TILES)), abs=1e-6)
    assert len(set(nearest.argmin(axis=0))) > 1
    assert turning(TILES[::-1].copy()) == pytest.approx(found[::-1], abs=1e-6)
    assert turning(TILES[2:3]) == pytest.approx(found[2:3], abs=1e-6)


def test_the_views_of_a_spot_are_joined_before_the_head() -> None:
    config = _config(freeze_encoder=True, image_views=("image", "image_wide"))
    encoder, wide = frozen_encoder(config, 32, seed=3), TILES[:, ::2, ::2].copy()
    torch.manual_seed(4)
    head = ProjectionHead(256, 8, config.l2_normalise).eval()
    tower = {f"encoder.{name}": value for name, value in encoder.state().items()}
    network = ImageNetwork(config.model_dump(mode="json"), 32, tower, head.state_dict(), "fp32")
    torch.manual_seed(3)
    alone = ImageTower(config, 32).eval()
    with torch.inference_mode():
        parts = [alone(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255).numpy() for tiles in (TILES, wide)]
        features = np.concatenate(parts, axis=1)
        expected = head(torch.from_numpy(features)).numpy()
    assert network.build(CPU)(TILES, wide) == pytest.approx(expected, abs=1e-5)
    by_head = ImageHead(config.model_dump(mode="json"), 256, head.state_dict(), "fp32")
    assert by_head.build(CPU)(features) == pytest.approx(expected, abs=1e-6)


def test_a_cluster_without_a_cpu_for_decoding_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = empty_manifest()
    network = _network(_config())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(ResourceError, match=r"needs 2 CPU\(s\), the cluster has 1; raise cluster\.local_cpus"):
        list(embed_sections("", empty, [], network))


@ray.remote(num_cpus=4)
class _OtherRuns:
    """Occupies the CPUs outside a run's share."""

    def ready(self) -> None:
        """Returns once it occupies them."""


@pytest.mark.ray
def test_a_run_embeds_within_its_share_while_others_use_the_rest(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mclstexp.model.tile_stream._MIN_TILES_PER_ACTOR", 1
    )  # as many actors as a large table would start
    manifest = load_manifest(tiles)
    names, network, found, reports = [manifest.sections[0].section_id], _network(_config()), {}, []
    others = _OtherRuns.remote()  # 4 of the session's 6 CPUs: half of all would leave none to read on
    ray.get(others.ready.remote())

    def embed() -> None:
        found.update(embed_sections(tiles, manifest, names, network, lambda *report: reports.append(report)))

    try:
        with ordered(ExecutionResources.for_limits(cpu=2)):
            thread = threading.Thread(target=embed, daemon=True)
            thread.start()
            thread.join(timeout=120)
            hangs = thread.is_alive()
    finally:
        ray.kill(others)
    assert not hangs
    num_spots = manifest.sections[0].num_spots
    assert len(found[names[0]]["embedding"]) == num_spots
    assert reports[-1] == ("embedding: tiles", num_spots, num_spots)


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_that_keeps_dying_ends_the_job(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mclstexp.model.tile_stream.MAX_RETRIES", 1)  # each takes the start of a process

    class Deadly(ImageNetwork):  # local, so that it travels to the worker by value
        def build(self, device: torch.device) -> object:
            return lambda images: os._exit(1)

    manifest = load_manifest(tiles)
    network = _network(_config(), kind=Deadly)
    names = [manifest.sections[0].section_id]
    with pytest.raises(Exception, match=r"(?i)died|crashed|exit"):
        list(embed_sections(tiles, manifest, names, network))
