"""Parts of messages that many errors share."""

from mclstexp.messages import did_you_mean, some_of


def test_the_nearest_names_are_offered_whatever_their_case() -> None:
    assert did_you_mean("epohcs", ["epochs", "seed"]) == "did you mean epochs?"
    assert did_you_mean("erbb2", ["ERBB2", "ERBB3", "GNAS"], 2) == "did you mean ERBB2 or ERBB3?"
    assert did_you_mean("zzz", ["A", "B"]) == "known: A, B"
    assert did_you_mean("A", []) == "there are none"


def test_long_lists_name_the_first_and_count_the_others() -> None:
    assert some_of(["A", "B"]) == "A, B"
    assert some_of([str(number) for number in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
    assert some_of({"A": 1, "B": 2, "C": 3}, 1) == "A and 2 more"
    assert some_of([]) == ""
