"""Towers beside a program model: their loss, what they read, how spots are found by them, and their share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from program_version import program_version
from simulated_sections import BLOCKS, RETRIEVAL, TARGET, cohort, simulated_section

from mclstexp.config import Config, override
from mclstexp.errors import ConfigError
from mclstexp.model.choose_blend import SHARE, TOWER_SHARE, ValidationSlide
from mclstexp.model.fit_blend import fit_program_model
from mclstexp.model.losses import program_loss
from mclstexp.model.spot_keys import TowerEmbeddings, TrainedTowers
from mclstexp.model.tower_keys import join_keys
from mclstexp.model.towers import SpotTower, image_projection
from mclstexp.model.training_spots import TrainingSpots
from mclstexp.model.version import ModelVersion

TOWERS = {
    "model.predictor": "programs",
    "model.freeze_encoder": True,
    "model.image_encoder": "small_cnn",
    "model.image_directions": 4,
    "model.position": "distance",
    "model.spot_width": 8,
    "model.spot_layers": 1,
    "model.spot_heads": 2,
    "model.spot_head_dim": 4,
    "model.embedding_dim": 6,
}


def _loss_by_sentence(
    image: torch.Tensor, spot: torch.Tensor, scores: torch.Tensor, sentences: list[slice], scale: float
) -> torch.Tensor:
    """The same loss, a sentence at a time."""
    total, num_spots = image.sum() * 0, 0
    for rows in sentences:
        v, e, s = image[rows], spot[rows], F.normalize(scores[rows], dim=1)
        num_spots += len(v)
        if len(v) < 2:
            continue
        target = torch.softmax(s @ s.T / 0.1, dim=1)
        logits = scale * e @ v.T
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        total = total + len(v) * both / 2 / np.log(len(v))
    return total / num_spots


def test_the_loss_is_that_of_each_sentence_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    image, spot = (F.normalize(torch.randn(12, 5, generator=generator), dim=1).requires_grad_() for _ in range(2))
    scores = torch.randn(12, 3, generator=generator)
    valid = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    scale = torch.tensor(4.0)
    loss = program_loss(image, spot, valid, scale, scores, torch.arange(12) // 4)
    kept = [each[valid] for each in (image, spot, scores)]
    expected = _loss_by_sentence(*kept, [slice(0, 4), slice(4, 7), slice(7, 8)], 4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, other in zip(
        torch.autograd.grad(loss, (image, spot)), torch.autograd.grad(expected, (image, spot)), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-4)


def test_the_loss_of_no_spots_is_zero_with_gradients() -> None:
    image, spot = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    loss = program_loss(
        image, spot, torch.zeros(4, dtype=torch.bool), torch.tensor(1.0), torch.zeros(4, 3), torch.zeros(4)
    )
    loss.backward()
    assert loss.item() == 0
    assert not image.grad.any()


def test_similar_programs_are_positives() -> None:
    """Towers that confuse spots of the same scores lose less than towers that confuse others."""
    scores = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    spot, valid = torch.eye(4), torch.ones(4, dtype=torch.bool)

    def loss(order: list[int]) -> float:
        return program_loss(spot[order], spot, valid, torch.tensor(5.0), scores, torch.zeros(4)).item()

    assert loss([1, 0, 3, 2]) == pytest.approx(loss([0, 1, 2, 3]), rel=1e-5)
    assert loss([2, 3, 0, 1]) > 1.5 * loss([0, 1, 2, 3])


def _tower(**settings: object) -> SpotTower:
    torch.manual_seed(0)
    config = override(Config(), TOWERS | settings)
    return SpotTower(config.model, 7, 0).eval()


def test_attention_falls_with_distance_as_written_out() -> None:
    tower = _tower()
    tower.pitch_um.fill_(100.0)
    xy = torch.rand(1, 5, 2) * 400
    expression, mask = torch.randn(1, 5, 7), torch.tensor([[True, True, True, True, False]])
    block = tower.blocks[0]
    x = tower.embed(expression)[0, :4]
    q, k, v = (part.view(4, 2, 4).transpose(0, 1) for part in block.attention.qkv(block.attention_norm(x)).chunk(3, 1))
    squared = ((xy[0, :4, None] - xy[0, None, :4]) ** 2).sum(-1) / 100.0**2
    penalty = torch.log1p(torch.exp(block.attention.decay))
    logits = q @ k.transpose(1, 2) / 2 - penalty[:, None, None] * squared
    attended = block.attention.out((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    expected = x + attended
    expected = expected + block.ffn(block.ffn_norm(expected))
    torch.testing.assert_close(tower(expression, xy, mask)[0, :4], expected, atol=1e-5, rtol=1e-4)


def test_a_spot_far_away_tells_nothing() -> None:
    tower = _tower()
    tower.pitch_um.fill_(100.0)
    expression, mask = torch.randn(2, 3, 7), torch.ones(2, 3, dtype=torch.bool)
    expression[1, :2] = expression[0, :2]
    near = torch.tensor([[0.0, 0], [100, 0], [200, 0]]).expand(2, 3, 2)
    far = torch.tensor([[0.0, 0], [100, 0], [9000, 0]]).expand(2, 3, 2)
    assert (tower(expression, near, mask)[0, 0] - tower(expression, near, mask)[1, 0]).abs().max() > 1e-3
    torch.testing.assert_close(tower(expression, far, mask)[0, 0], tower(expression, far, mask)[1, 0])


def test_the_cosine_of_joined_keys_is_the_mean_of_both() -> None:
    rng = np.random.default_rng(0)
    first, second = ((rng.normal(size=(6, 5)), rng.normal(size=(6, 3))) for _ in range(2))

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    joined = [join_keys(*each, 0.3) for each in (first, second)]
    expected = 0.7 * cosine(first[0], second[0]) + 0.3 * cosine(first[1], second[1])
    np.testing.assert_allclose(cosine(*joined), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(joined[0], axis=1), 1, atol=1e-6)


def _towers_of(spots: TrainingSpots, images: np.ndarray, of_spots: np.ndarray) -> TrainedTowers:
    """Towers that give these embeddings, whatever they were trained without; the head gives the first image's."""
    config = override(Config(), TOWERS | {"model.embedding_dim": images.shape[1]})
    head = image_projection(config.model, sum(BLOCKS.widths)).eval()
    whole = TowerEmbeddings(images.astype(np.float32), of_spots.astype(np.float32))
    return TrainedTowers(head, whole, (whole,) * spots.folds.num_folds)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def patients() -> TrainingSpots:
    simulated = cohort(4)
    features = {section.section_id: values for section, values in simulated}
    return TrainingSpots([section for section, _ in simulated], features.__getitem__, BLOCKS, TARGET)


def test_towers_that_know_programs_get_a_share(patients: TrainingSpots) -> None:
    known = _unit(patients.scores[:, :6])
    found = fit_program_model(patients, RETRIEVAL, _towers_of(patients, known, known))
    assert found.model.share > 0
    assert found.model.tower_share > 0
    without = fit_program_model(patients, RETRIEVAL)
    truth = patients.scores
    errors = [((each.left_out_scores - truth) ** 2).mean() for each in (found, without)]
    assert errors[0] < 0.9 * errors[1]


def test_shares_are_fitted_to_towers_that_did_not_see_a_fold(patients: TrainingSpots) -> None:
    """Towers of all spots know everything here, those without a fold nothing; or each knows its own fold alone."""
    rng = np.random.default_rng(1)
    known, noise = _unit(patients.scores[:, :6]).astype(np.float32), _unit(rng.normal(size=(len(patients.scores), 6)))
    towers = _towers_of(patients, known, known)
    blind = replace(towers, without=(TowerEmbeddings(noise, noise[::-1]),) * patients.folds.num_folds)
    assert fit_program_model(patients, RETRIEVAL, blind).model.tower_share == 0

    def knowing(fold: int) -> TowerEmbeddings:
        inside = (patients.folds.fold == fold)[:, None]
        return TowerEmbeddings(np.where(inside, known, noise), np.where(inside, noise, known))

    own = replace(towers, without=tuple(map(knowing, range(patients.folds.num_folds))))
    assert fit_program_model(patients, RETRIEVAL, own).model.tower_share > 0
    turned = replace(own, without=(*own.without[1:], own.without[0]))
    assert fit_program_model(patients, RETRIEVAL, turned).model.tower_share == 0


@pytest.mark.odd
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.image_directions": None}, "set model.image_directions"),
        ({"model.embedding_dim": 256}, "model.embedding_dim=256 leaves no room"),
        ({"model.position": "table"}, "use distance, sinusoidal or none"),
        ({"genes.input": "per_gene"}, "genes.input=per_gene needs whole sections"),
        ({"train.shuffle_pairs": True}, "leave train.shuffle_pairs out"),
    ],
)
def test_settings_that_towers_cannot_have_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(Config(), TOWERS | settings)
    assert override(Config(), TOWERS | {"train.epochs": 0} | settings).train.epochs == 0


def test_towers_that_tell_nothing_get_none(patients: TrainingSpots) -> None:
    rng = np.random.default_rng(0)
    noise = [_unit(rng.normal(size=(len(patients.scores), 6))) for _ in range(2)]
    found = fit_program_model(patients, RETRIEVAL, _towers_of(patients, *noise))
    assert found.model.towers is None
    assert found.model.tower_share == 0


def test_with_few_patients_shares_are_not_chosen(patients: TrainingSpots) -> None:
    few = TrainingSpots(patients.sections[:2], patients.features, BLOCKS, TARGET)
    rng = np.random.default_rng(0)
    noise = [_unit(rng.normal(size=(len(few.scores), 6))) for _ in range(2)]
    found = fit_program_model(few, RETRIEVAL, _towers_of(few, *noise))
    assert (found.model.share, found.model.tower_share) == (SHARE, TOWER_SHARE)


def test_validation_patients_choose_where_there_are_any(patients: TrainingSpots) -> None:
    """They see the same answers as slides; here towers are right for training spots and useless for others."""
    known = _unit(patients.scores[:, :6])
    towers = _towers_of(patients, known, known)
    slides = [ValidationSlide(*simulated_section("V", "V", 77))]
    chosen = fit_program_model(patients, RETRIEVAL, towers, slides)
    assert chosen.model.tower_share == 0, "an untrained head finds nothing for a patient never seen"
    left_out = fit_program_model(patients, RETRIEVAL, towers)
    assert left_out.model.tower_share > 0


def test_a_version_keeps_its_towers(tmp_path: Path) -> None:
    version = program_version()
    features = np.random.default_rng(0).normal(size=(9, len(version.programs.own.mean))).astype(np.float32)
    xy = np.random.default_rng(1).uniform(0, 400, (9, 2))
    before = version.predict(features, xy).prediction
    version.save(tmp_path)
    loaded = ModelVersion.load(tmp_path)
    assert loaded.programs.tower_share == 0.5
    np.testing.assert_array_equal(loaded.programs.queries(features), version.programs.queries(features))
    np.testing.assert_allclose(loaded.predict(features, xy).prediction, before, atol=1e-6)
    own = replace(version.programs, towers=None).queries(features)
    with torch.inference_mode():
        embedding = version.towers().embed_images(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(version.programs.queries(features), join_keys(own, embedding, 0.5), atol=1e-6)
