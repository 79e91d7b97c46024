"""The targets that predictions are scored in: the model's own first, each once."""

import pytest

from mclstexp.data.genes import Normaliser
from mclstexp.evaluation.sections import TARGETS, scored_targets


@pytest.mark.parametrize(("name", "unit"), [("per_spot", "ln"), ("per_gene", "log10")])
def test_the_models_own_target_comes_first_and_once(name: str, unit: str) -> None:
    found = scored_targets(TARGETS[name], TARGETS[name])
    assert list(found) == [name, *({"per_spot", "per_gene"} - {name})]
    assert found[name].unit().startswith(unit)


def test_a_target_without_a_name_is_called_by_its_unit() -> None:
    own = Normaliser("per_spot_all", 1e6, "e")
    assert list(scored_targets(own, own)) == [own.unit(), "per_spot", "per_gene"]


def test_what_the_spots_were_seen_in_is_stated_too() -> None:
    published = TARGETS["per_gene"], TARGETS["per_spot_panel"]
    assert list(scored_targets(*published)) == ["per_gene", "per_spot", "per_spot_panel"]
