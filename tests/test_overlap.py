"""Prediction keeps its slowest stage busy: all other stages work meanwhile."""

import pytest
from sleeping_stages import Slow, predict_slowly


@pytest.mark.ray
@pytest.mark.slow
def test_the_rate_is_that_of_the_slowest_stage(ray_session, tmp_path):
    slow = Slow(network=0.6, weighing=0.4, store=1.5)  # a part takes 2.5 s, the network alone 0.6
    rate = predict_slowly(tmp_path, slow, num_slides=5)
    assert rate >= 0.85 / slow.network
