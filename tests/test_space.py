"""Search spaces: what a file may say, and what its faults are called."""

from pathlib import Path

import pytest
import tune

from mclstexp.config import Config
from mclstexp.errors import ConfigError
from tuning.space import Choice, Range, Space, load_space, num_trials, param_space

ROOT = Path(__file__).parents[1]


def _load(folder: Path, text: str) -> Space:
    (folder / "space.yaml").write_text(text)
    return load_space(folder / "space.yaml", Config())


def test_lists_are_choices_and_low_to_high_are_ranges(tmp_path: Path) -> None:
    space = _load(
        tmp_path,
        "model.spot_layers: [1, 2]\nmodel.temperature: {low: 0.01, high: 1, log: true}\nretrieval.k: [5, null]\n",
    )
    assert space == {
        "model.spot_layers": Choice((1, 2)),
        "model.temperature": Range(0.01, 1, log=True),
        "retrieval.k": Choice((5, None)),
    }


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    space = _load(tmp_path, "train.tower_lr: {low: 1e-5, high: 1e-3, log: true}\nmodel.temperature: [5e-2, 1]\n")
    assert space == {"train.tower_lr": Range(1e-5, 1e-3, log=True), "model.temperature": Choice((0.05, 1))}


def test_a_range_is_whole_where_its_setting_is_however_its_ends_are_spelt(tmp_path: Path) -> None:
    space = _load(
        tmp_path, "retrieval.k: {low: 10, high: 1e3, log: true}\nmodel.temperature: {low: 1, high: 10, log: true}\n"
    )
    domains = param_space(space, "random")
    assert {type(domains["retrieval.k"].sample()) for _ in range(50)} == {int}
    assert any(domains["model.temperature"].sample() % 1 for _ in range(50))
    with pytest.raises(ConfigError, match=r"retrieval\.k=10\.5"):
        _load(tmp_path, "retrieval.k: {low: 10.5, high: 100}\n")
    with pytest.raises(ConfigError, match=r"retrieval\.k=inf"):
        _load(tmp_path, "retrieval.k: {low: 10, high: .inf}\n")


def test_the_shipped_space_is_one() -> None:
    space = load_space(ROOT / "jobs" / "configs" / "sweep.yaml", Config())
    assert {"model.temperature", "model.spot_layers"} <= set(space)
    assert num_trials(space, "random", 20) == 20


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(
            tmp_path,
            "model.spot_layrs: [1]\ngenes.num_genes: [10, 20]\ntrain.epochs: [1, 2]\nmodel.temperature: [0.1, -1]\n"
            "model.spot_width: {low: 64, high: 32}\ntrain.tower_lr: {low: 0, high: 1, log: true}\n"
            "model.spot_heads: 8\ntrain.patience: [0, 3]\nmodel.image_encoder: [resnet18, resnet9]\n"
            "train.positives: [pairs, soft, sift]\n",
        )
    text = str(caught.value)
    assert "10 fault(s)" in text
    for part in (
        "did you mean model.spot_layers?",
        "genes.num_genes cannot vary",
        "train.epochs cannot vary",
        "train.patience cannot vary",
        "model.temperature=-1",
        "model.spot_width: {'low': 64, 'high': 32} is neither",
        "train.tower_lr",
        "model.spot_heads: 8 is neither",
        "model.image_encoder=resnet9 is neither",
        "train.positives=sift is not a loss; did you mean soft?",
    ):
        assert part in text, part


def test_a_grid_has_a_trial_for_each_point_and_takes_no_ranges() -> None:
    space: Space = {"model.spot_layers": Choice((1, 2, 4)), "model.temperature": Choice((0.1, 1.0))}
    assert num_trials(space, "grid", 20) == 6
    assert param_space(space, "grid")["model.spot_layers"] == {"grid_search": [1, 2, 4]}
    with pytest.raises(ConfigError, match=r"a grid needs lists of values, not from 0\.1 to 1"):
        param_space({"model.temperature": Range(0.1, 1.0, log=False)}, "grid")


def test_ranges_are_drawn_within_their_ends_and_whole_where_both_are() -> None:
    domains = param_space(
        {"model.temperature": Range(0.01, 1, log=True), "retrieval.k": Range(3, 5, log=False)}, "random"
    )
    drawn = [domains["model.temperature"].sample() for _ in range(400)]
    assert min(drawn) >= 0.01
    assert max(drawn) <= 1
    assert 0.35 < sum(value < 0.1 for value in drawn) / len(drawn) < 0.65  # half of the logarithm
    assert {domains["retrieval.k"].sample() for _ in range(200)} == {3, 4, 5}


@pytest.mark.parametrize(("search", "trials"), [("best", "3"), ("random", "0"), ("random", "many")])
def test_an_unknown_search_or_number_of_trials_is_refused(
    search: str, trials: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tune.py", "--data", "none", "--space", "none.yaml", "--search", search, "--trials", trials]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(ConfigError, match=r"search='best': .*'random', 'grid' or 'optuna'|trials='(0|many)': "):
        tune.main()
