"""Guidance against its formula, and the claim that guiding x0 is guiding any prediction."""

from __future__ import annotations

import numpy as np
import pytest

from tinydiff.diffusion.guidance import classifier_free
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.schedules import Level

U, C = np.array([1.0, -2.0, 0.5]), np.array([3.0, 4.0, 0.25])


@pytest.mark.parametrize(("scale", "wanted"), [(0, U), (1, C), (3, U + 3 * (C - U)), (0.5, (U + C) / 2)])
def test_scale(scale, wanted):
    denoise = classifier_free(lambda x, level: (U, C), scale)
    np.testing.assert_allclose(denoise(np.zeros(3), Level(0.6, 0.8, 5.0)), wanted, rtol=1e-15)


def test_point_and_level_reach_the_model():
    seen = []
    level, x = Level(0.6, 0.8, 5.0), np.ones(3)
    classifier_free(lambda *arguments: seen.append(arguments) or (U, C), 2.0)(x, level)
    assert len(seen) == 1 and seen[0][0] is x and seen[0][1] is level


@pytest.mark.parametrize("level", [Level(0.6, 0.8, 0.0), Level(0.3, 0.7, 0.0), Level(1.0, 5.0, 0.0)])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_guiding_x0_is_guiding_the_output(name, level):
    x, to_x0 = np.array([0.1, 0.2, 0.3]), PREDICTIONS[name].to_x0

    def both(x, level):
        return tuple(to_x0(output, x, level.alpha, level.sigma) for output in (U, C))

    guided_output = U + 2.5 * (C - U)
    wanted = to_x0(guided_output, x, level.alpha, level.sigma)
    np.testing.assert_allclose(classifier_free(both, 2.5)(x, level), wanted, rtol=1e-12)
