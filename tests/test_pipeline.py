"""Text to image: over a backend whose answers are known, over torch, and against diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_backend import REQUEST, Fake

from tinydiff.backends import find_model, open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.condition import encode
from tinydiff.diffusion import noise
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import Level
from tinydiff.editing import Edit
from tinydiff.errors import DivergedError, ModelError, UsageError
from tinydiff.networks.network import HIDDEN, Array
from tinydiff.pipeline import Request, check_size, generate, scale
from tinydiff.text.prompts import blend, parse

PARTS = {
    "text encoder": "encode_text",
    "denoiser at step 1 of 2": "denoise",
    "autoencoder's encoder": "encode_image",
    "autoencoder's decoder": "decode",
}


def near(a, b):
    """uint8 images equal to within one level: a batch is summed in another order than one image."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"tcd"}))  # which ends on the cleanest training level
def test_image_is_the_guided_answer_over_the_scaling_factor(sampler):
    images = generate(Fake(), ["1234567", "1"], [0, 1], replace(REQUEST, sampler=sampler), ["12", "12"])
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    for image, prompt in zip(images, (0.07, 0.01), strict=True):
        guided = 0.02 + 3 * (prompt - 0.02)
        wanted = round((guided / 0.5 / 2 + 0.5) * 255)
        assert (image == wanted).all()


def test_plain_guidance_is_one_call_of_one_batch():
    fake = Fake()
    generate(fake, ["a", "bb"], [0, 1], replace(REQUEST, cfg_scale=1.0))
    assert [n for n, _ in fake.calls] == [2, 2, 2, 2] and fake.texts == [[1, 2]]


def test_guidance_is_one_call_of_two_batches():
    fake = Fake()
    generate(fake, ["a", "bb"], [0, 1], REQUEST)
    assert [n for n, _ in fake.calls] == [4, 4, 4, 4]
    assert [t for _, t in fake.calls] == [999, 749, 499, 249]


def test_equal_texts_are_encoded_once():
    fake = Fake()
    generate(fake, ["abc"] * 5, range(5), REQUEST)
    assert fake.texts == [[0, 3]]  # the empty prompt and the one prompt


def contexts(texts):
    """What `encode` makes of texts with the fake backend, whose vectors are a hundredth of the ids: (B, K T)."""
    said = encode(Fake(), [parse(text)[0].pieces for text in texts])
    return np.round(100 * said["encoder_hidden_states"][..., 0], 3).tolist()


def test_weights_move_vectors_from_those_of_the_empty_prompt():
    assert contexts(["(abc:2) de [f]"]) == [[0, 6, 2, pytest.approx(1 / 1.1, abs=1e-3), 0]]
    assert contexts(["(abc:0) de f"]) == [[0, 0, 2, 1, 0]]


def test_long_prompts_are_chunks_side_by_side_and_short_ones_filled_up():
    assert contexts(["a bb ccc dddd", "ee"]) == [[0, 1, 2, 3, 0, 0, 4, 0, 0, 0], [0, 2, 0, 0, 0] + [0] * 5]


def test_negative_prompts_have_the_syntax_of_prompts():
    """Weights and long prompts as in `contexts`; branches composed on the empty prompt, whose answer is 0."""

    def drawn(negative, prompt="abcd"):
        return generate(Fake(), [prompt], [0], REQUEST, [negative]).reshape(-1)[0]

    def level(u, c=0.04):
        return round((u + 3 * (c - u)) / 0.5 / 2 * 255 + 127.5)

    assert drawn(parse("(ab:1.0)")) == drawn("ab") == level(0.02)
    assert drawn(parse("((ab))(:1)")) != drawn("((ab))(:1)")
    assert drawn(parse("ab AND abc :2")) == level(0.02 + 2 * 0.03)
    assert drawn(parse("ab AND abc :-1"), parse("a AND bb")) == level(-0.01, 0.01 + 0.02 + 0.01)
    fake = Fake()
    generate(fake, ["a", "bb"], [0, 1], REQUEST, [parse("c AND dd"), "eee"])
    assert {n for n, _ in fake.calls} == {2 + 3 + 2}  # the empty prompts, the negative ones, the prompts


@pytest.mark.parametrize("given", [{"cfg_scale": s} for s in (0.0, 0.3, 1.0)] + [{"cfg_scale": 0.0, "cfg_max": 0.5}])
def test_there_is_no_guidance_at_a_scale_of_1_nor_below(given):
    """As in diffusers, whose distilled models are drawn with 0: the prompt counts, and the negative one does not."""
    fake = Fake()
    found = generate(fake, ["abcd"], [0], replace(REQUEST, **given), ["e" * 40])
    assert (found == round(0.04 / 0.5 / 2 * 255 + 127.5)).all() and [n for n, _ in fake.calls] == [1] * 4


def test_scales_below_1_join_those_above():
    def drawn(**given):
        return generate(Fake(), ["abcd"], [0], replace(REQUEST, **given), ["ab"]).reshape(-1)[0].astype(int)

    levels = [drawn(cfg_scale=s) for s in np.linspace(0, 3, 61).tolist()]
    assert np.diff(levels).min() >= 0 and np.diff(levels).max() <= 1
    assert drawn(cfg_scale=0.0, cfg_complex=0.5) == drawn(cfg_scale=1.0)


def test_branches_are_composed_by_their_weights():
    """ "abc" AND "abcdefg" :2 under guidance 3: u + 3 (c1 - u + 2 (c2 - u)), in one call of four rows."""
    fake = Fake()
    image = generate(fake, [parse("abc AND abcdefg :2"), "abcd"], [0, 1], REQUEST, ["ab", "ab"])
    for found, guided in zip(image, (0.02 + 3 * (0.01 + 2 * 0.05), 0.02 + 3 * 0.02), strict=True):
        assert (found == round((guided / 0.5 / 2 + 0.5) * 255)).all()
    assert {n for n, _ in fake.calls} == {5}


def test_on_the_way_between_prompts_vectors_are_mixed():
    fake = Fake()
    images = generate(fake, [blend("abcd", "abcdefgh", share) for share in (0.0, 0.25, 1.0)], [0, 0, 0], REQUEST)
    for image, prompt in zip(images, (0.04, 0.05, 0.08), strict=True):
        assert (image == round((3 * prompt / 0.5 / 2 + 0.5) * 255)).all()
    with pytest.raises(UsageError, match="AND"):
        blend("a", "b AND c", 0.5)


def test_the_ends_of_a_way_are_the_images_themselves(backend):
    request = Request(3, 2.0, "dpmpp_2m", "trailing", 16, 16)
    ends = generate(backend, ["red", "blue"], [1, 2], request)
    way = generate(backend, [blend("red", "blue", 0.0), blend("red", "blue", 1.0)], [(1, 2, 0.0), (1, 2, 1.0)], request)
    assert near(ends, way)


def test_a_plain_string_has_no_syntax():
    fake = Fake()
    generate(fake, ["(a :) AND"], [0], REQUEST)
    assert fake.texts == [[0, 9]]


def test_guidance_that_depends_on_level_and_prompt():
    """Half-way between cfg_scale and cfg_complex for six words; only within the interval; growing to cfg_max."""
    six = "one two three four five six"
    request = replace(REQUEST, cfg_complex=5.0, sampler="ddim")
    for level, strength in ((Level(0.0, 1.0, 1000.0), 2.0), (Level(1.0, 0.0, 0.0), 6.0), (Level(0.7, 0.7, 500.0), 4.0)):
        assert scale(replace(REQUEST, cfg_scale=2.0, cfg_max=6.0), [], 1000)(level) == strength
    fake = Fake()
    generate(fake, ["a"], [0], replace(REQUEST, cfg_interval=(0.4, 0.8)))
    assert [n for n, _ in fake.calls] == [1, 2, 2, 1]  # at t = 999, 749, 499, 249
    found = scale(request, [parse(six), parse("a")], 1000)
    assert found.ravel().tolist() == [4.0, 3.0]


@pytest.mark.parametrize(("width", "height"), [(8, 16), (4, 4)])
def test_width_and_height(width, height):
    assert generate(Fake(), ["a"], [0], replace(REQUEST, width=width, height=height)).shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("value", "nearest"), [(6, "4 and 8"), (9, "8 and 12"), (1, "4 and 8"), (0, "4 and 8"), (-3, "4 and 8")]
)
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_that_does_not_fit_is_refused(side, value, nearest):
    fake = Fake()
    with pytest.raises(UsageError, match=f"{side} {value} is no multiple of 4.*nearest are {nearest}"):
        generate(fake, ["a"], [0], replace(REQUEST, **{side: value}))
    assert fake.calls == fake.texts == []


def test_a_size_that_fits_is_not():
    check_size(Fake().description, 4, 400)


@pytest.mark.parametrize(("part", "call"), PARTS.items())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_names_its_part_and_warns_nobody(part, call, bad):
    """One bad value of one image of a batch, out of any part of the model; pytest raises numpy's warnings."""
    fake = Fake()
    fake.encode_image = lambda pixels: np.zeros((len(pixels), 6, 4, 4), np.float32)
    fine = getattr(fake, call)

    def spoilt(*given):
        array = given_back = fine(*given)
        if call == "encode_text":
            (array,) = given_back.values()
        array.reshape(-1)[0] = bad
        return given_back

    setattr(fake, call, spoilt)
    edit = Edit(np.zeros((8, 8, 3), np.uint8), 0.5)
    with pytest.raises(DivergedError, match=f"^the {part} .*NaN or infinite values; use fp32 weights"):
        generate(fake, ["a", "bb"], [0, 1], REQUEST, edit=edit)


def test_weights_that_no_float_holds_are_named():
    with pytest.raises(DivergedError, match="text encoder.*smaller weights in the prompt"):
        generate(Fake(), [parse(f"({'a' * 300}:3e38)")], [0], replace(REQUEST, cfg_scale=1.0))
    with pytest.raises(DivergedError, match="denoiser at step 1 of 4.*smaller weights in the prompt"):
        generate(Fake(), [parse(f"{'a' * 300} :3e38 AND b")], [0], REQUEST)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_name_their_step(bad):
    fake = Fake()
    fine, heard = fake.denoise, []
    fake.denoise = lambda x, t, condition: fine(x, t, condition) if len(fake.calls) < 2 else np.full_like(x, bad)
    with pytest.raises(DivergedError, match="step 3 of 4"):
        generate(fake, ["a"], [0], REQUEST, on_step=heard.append)
    assert heard == [1, 2]


def test_every_step_draws_its_own_noise(monkeypatch):
    asked, real = [], noise.normal
    monkeypatch.setattr(noise, "normal", lambda seeds, shape, step=0: asked.append(step) or real(seeds, shape, step))
    generate(Fake(), ["a"], [0], replace(REQUEST, sampler="euler_ancestral"))
    assert asked == [0, 1, 2, 3]  # the start, then one after each step but the last


def test_every_step_is_heard_of():
    heard = []
    generate(Fake(), ["a"], [0], REQUEST, on_step=heard.append)
    assert heard == [1, 2, 3, 4]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(backend, sampler):
    request = replace(REQUEST, sampler=sampler, width=16, height=16)
    prompts = ["a red square", "a blue corner", "a red square"]
    together = generate(backend, prompts, [5, 6, 7], request)
    for i, prompt in enumerate(prompts):
        assert near(together[i : i + 1], generate(backend, [prompt], [5 + i], request))
    assert not near(together[0], together[2])  # another seed is another image


def test_what_changes_an_image(backend):
    request = replace(REQUEST, width=16, height=16)
    image = generate(backend, ["a red square"], [5], request)
    assert near(image, generate(backend, ["a red square"], [5], request, [""]))
    for other in (
        generate(backend, ["a blue corner"], [5], request),
        generate(backend, ["a red square"], [5], request, ["a blue corner"]),
        generate(backend, ["a red square"], [5], replace(request, cfg_scale=1.0)),
        generate(backend, ["a red square"], [5], replace(request, steps=5)),
    ):
        assert not near(image, other)


def test_a_negative_prompt_that_is_the_prompt_is_no_guidance(backend):
    request = replace(REQUEST, width=16, height=16)
    guided = generate(backend, ["a red square"], [5], request, ["a red square"])
    assert near(guided, generate(backend, ["a red square"], [5], replace(request, cfg_scale=1.0)))


def test_a_model_is_found_by_folder_and_by_run(tiny_model):
    assert find_model(str(tiny_model)) == tiny_model
    assert find_model(str(tiny_model.parent)) == tiny_model  # a run, which holds model/
    with pytest.raises(ModelError, match="no such model"):
        find_model("nowhere/at/all")
    with pytest.raises(ModelError, match="no ONNX graphs"):
        open_backend(Source(tiny_model), "onnx")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sampler", "spacing", "schedule", "prediction"),
    [
        ("ddim", "trailing", "cosine", "v"),
        ("euler", "trailing", "cosine", "v"),
        ("euler", "exponential", "cosine", "v"),
        ("dpmpp_2m", "trailing", "cosine", "v"),
        ("dpmpp_2m", "trailing", "scaled_linear", "epsilon"),
        ("heun", "trailing", "scaled_linear", "v"),
        ("unipc", "log_snr", "cosine", "v"),
        ("deis", "log_snr", "cosine", "v"),
        ("unipc", "log_snr", "scaled_linear", "epsilon"),
    ],
)
def test_diffusers_draws_the_same_image(make_model, tiny_config, monkeypatch, sampler, spacing, schedule, prediction):
    """From the folder alone, its own scheduler included, and the same latents.

    Their UniPC and DEIS tell the network only the whole part of a level's time, found in float32: 998 for the last, 999.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    cfg = replace(
        tiny_config,
        diffusion=replace(tiny_config.diffusion, schedule=schedule, prediction=prediction),
        generate=replace(tiny_config.generate, sampler=sampler, spacing=spacing),
    )
    path = make_model(cfg)
    backend, prompts, seeds = open_backend(Source(path), "torch", "cpu"), ["a red square", "a blue corner"], [3, 4]
    if sampler in ("unipc", "deis"):
        own = backend.denoise
        monkeypatch.setattr(backend, "denoise", lambda x, t, condition: own(x, float(int(t - 1e-3)), condition))
    request = Request(20, 3.0, sampler, cfg.generate.spacing, 16, 16)
    ours = generate(backend, prompts, seeds, request)

    pipe = StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    # Their Euler and Heun scale unit noise themselves; the others take the latents as they come.
    scale = 1.0 if sampler in ("euler", "heun") else backend.description.levels(sampler, 20, spacing)[0].sigma
    latents = torch.from_numpy(noise.normal(seeds, (4, 8, 8)) * np.float32(scale))
    size = {"height": 16, "width": 16, "num_inference_steps": 20, "guidance_scale": 3.0}
    theirs = np.rint(pipe(prompts, latents=latents, output_type="np", **size).images * 255)
    assert ours.std() > 10
    assert (np.abs(ours - theirs) <= 1).mean() >= 0.999


CONDITIONS = {"encoder_hidden_states": Array(("batch", "sequence", 2), of=HIDDEN)}
