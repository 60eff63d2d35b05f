"""Guidance against its formula, and the claim that guiding x0 is guiding any prediction."""

from __future__ import annotations

import numpy as np
import pytest

from tinydiff.diffusion.guidance import classifier_free, complexity, composed, growing, rescale, within
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


def test_scale_of_one_asks_the_conditional_model_alone():
    asked = []
    denoise = classifier_free(
        lambda x, level: asked.append("both") or (U, C),
        within(lambda level: 3.0, 0.2, 0.8, 1000),
        lambda x, level: asked.append("one") or C,
    )
    found = [denoise(np.zeros(3), Level(0.6, 0.8, t)) for t in (900.0, 500.0, 200.0, 100.0)]
    assert asked == ["one", "both", "both", "one"]
    np.testing.assert_array_equal(found, [C, U + 3 * (C - U), U + 3 * (C - U), C])


def test_growing_is_a_line_in_time():
    scale = growing(2.0, 6.0, 1000)
    assert [scale(Level(0.6, 0.8, t)) for t in (1000.0, 500.0, 0.0)] == [2.0, 4.0, 6.0]


def test_composition_is_linear():
    """One condition of weight 1 is itself; weights of the same condition add; 0 leaves it out."""
    np.testing.assert_allclose(composed(U, [(1.0, C)]), C)
    np.testing.assert_allclose(composed(U, [(0.5, C), (0.7, C), (0.0, U * 9)]), U + 1.2 * (C - U))


def test_an_array_guides_each_image_by_its_own_scale():
    u, c = np.zeros((2, 3, 1, 1)), np.ones((2, 3, 1, 1))
    found = classifier_free(lambda x, level: (u, c), np.array([1.0, 4.0])[:, None, None, None])(u, Level(0.6, 0.8, 5.0))
    np.testing.assert_array_equal(found[:, 0, 0, 0], [1.0, 4.0])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PREDICTIONS)
def test_rescale_is_that_of_diffusers(name):
    """Their rescale_noise_cfg works on the network's output, ours on x0."""
    import torch
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as diffusers

    rng, level = np.random.default_rng(0), Level(0.6, 0.8, 5.0)
    x, u, c = rng.standard_normal((3, 2, 4, 5, 5))
    to_x0 = PREDICTIONS[name].to_x0

    def both(x, level):
        return tuple(to_x0(output, x, level.alpha, level.sigma) for output in (u, c))

    ours = classifier_free(both, 7.5, None, rescale(PREDICTIONS[name], 0.7))(x, level)
    theirs = diffusers.rescale_noise_cfg(torch.tensor(u + 7.5 * (c - u)), torch.tensor(c), 0.7).numpy()
    np.testing.assert_allclose(ours, to_x0(theirs, x, level.alpha, level.sigma), rtol=1e-9, atol=1e-9)


def test_complexity_counts_different_words():
    assert complexity([]) == 0 and complexity(["a", "of", "it"]) == 0
    assert complexity(["red", "heart"]) == complexity(["red", "Heart", "red", "heart"]) == 0.25
    assert (
        0.5
        < complexity(["a", "large", "red", "circle", "left", "of", "a", "small", "blue", "square"])
        < complexity([str(n) for n in range(100, 200)])
    )
