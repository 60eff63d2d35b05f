"""Image to image, inpainting, outpainting: what must hold exactly, on a model with random weights and on a fake one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_backend import REQUEST, Fake
from PIL import Image

from tinydiff import images
from tinydiff.backends import open_backend
from tinydiff.checkpoints import scheduler
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion import noise
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.editing import Edit, cells, extended, read
from tinydiff.errors import UsageError
from tinydiff.pipeline import Request, generate

SIDE = 16


IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


LEFT = np.zeros((SIDE, SIDE), np.float32)


LEFT[:, : SIDE // 2] = 1


@pytest.fixture(scope="module")
def request_(backend):
    return Request(6, 2.0, "dpmpp_2m", "trailing", SIDE, SIDE)


def test_strength_0_is_the_autoencoder_there_and_back(backend, request_):
    moments = backend.encode_image(images.to_pixels(IMAGE[None]))
    there_and_back = images.to_uint8(backend.decode(moments[:, : backend.description.latent_channels]))
    found = generate(backend, ["red"], [3], request_, edit=Edit(IMAGE, 0.0))
    assert np.abs(found.astype(int) - there_and_back).max() <= 1  # times the scaling factor and back


def test_strength_1_is_text_to_image(backend, request_):
    found = generate(backend, ["red"], [3], request_, edit=Edit(IMAGE, 1.0))
    np.testing.assert_array_equal(found, generate(backend, ["red"], [3], request_))


def test_strength_is_the_share_of_steps():
    """Each strength asks the network at the last levels only, and starts at exactly that level of noise."""
    for strength, times in ((0.5, [499, 249]), (0.25, [249]), (0.3, [249]), (1.0, [999, 749, 499, 249]), (0.1, [])):
        fake = Fake()
        fake.encode_image = lambda pixels: np.zeros((1, 6, 4, 4), np.float32)
        generate(fake, ["a"], [0], REQUEST, edit=Edit(IMAGE[:8, :8], strength))
        assert [t for _, t in fake.calls] == times


@pytest.mark.parametrize("noisy", [True, False], ids=["noise left at the end", "none left"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_less_than_a_step_is_the_image_whatever_the_seed(name, noisy):
    """Also where the last level still has noise, as with `set_alpha_to_one` false; no network is asked."""
    found = []
    for strength, seeds in ((0.0, [1, 2]), (0.24, [3, 4])):
        fake = Fake()
        ends = scheduler.read({"set_alpha_to_one": not noisy, "clip_sample": False, "steps_offset": 1})
        fake.description = replace(fake.description, scheduler=ends)
        fake.encode_image = lambda pixels: np.concatenate([pixels[..., ::2, ::2]] * 2, axis=1)
        found += [
            *generate(fake, ["a", "b"], seeds, replace(REQUEST, sampler=name), edit=Edit(IMAGE[:8, :8], strength))
        ]
        assert fake.calls == []
    wanted = IMAGE[:8:2, :8:2].repeat(2, axis=0).repeat(2, axis=1)
    assert all(np.abs(image.astype(int) - wanted).max() <= 1 for image in found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_not_masked_stays_bit_for_bit(backend, request_, name):
    request_ = replace(request_, sampler=name)
    found = generate(backend, ["red", "blue"], [3, 4], request_, edit=Edit(IMAGE, 1.0, LEFT))
    assert all((image[:, SIDE // 2 :] == IMAGE[:, SIDE // 2 :]).all() for image in found)
    assert (found[0] != found[1])[:, : SIDE // 2].any() and (found[0] != IMAGE)[:, : SIDE // 2].any()


def test_a_mask_of_nothing_and_of_everything(backend, request_):
    nothing = generate(backend, ["red"], [3], request_, edit=Edit(IMAGE, 1.0, np.zeros_like(LEFT)))
    np.testing.assert_array_equal(nothing[0], IMAGE)
    everything = generate(backend, ["red"], [3], request_, edit=Edit(IMAGE, 1.0, np.ones_like(LEFT)))
    plain = generate(backend, ["red"], [3], request_)
    assert np.abs(everything.astype(int) - plain).max() <= 1  # known + (x0 - known) rounds


def test_soft_masks_mix():
    edit = Edit(np.full((2, 2, 3), 100, np.uint8), 1.0, np.array([[0.0, 0.25], [0.5, 1.0]], np.float32))
    drawn = np.full((1, 2, 2, 3), 200, np.uint8)
    assert edit.over(drawn)[0, ..., 0].tolist() == [[100, 125], [150, 200]]


def test_known_latents_stand_still_and_the_rest_is_drawn():
    """With the fake model, whose latents are pixels, the part that is kept comes out of the decoder as it went in."""
    fake, seen = Fake(1.0), []
    fake.encode_image = lambda pixels: np.concatenate(
        [pixels[..., ::2, ::2], np.zeros((1, 3, 4, 4), np.float32)], axis=1
    )
    fake.decode = lambda z: seen.append(z) or z.repeat(2, axis=2).repeat(2, axis=3)
    picture = IMAGE[:8, :8].repeat(2, axis=0).repeat(2, axis=1)[:8, :8]
    mask = LEFT[:8, 4:12]
    generate(fake, ["abcd"], [0], replace(REQUEST, cfg_scale=1.0), edit=Edit(picture, 1.0, mask))
    wanted = images.to_pixels(picture)[..., ::2, ::2].copy()
    wanted[..., :2] = 0.04
    np.testing.assert_allclose(seen[0][0], wanted, atol=1e-5)


def test_cells_miss_no_pixel():
    mask = np.zeros((8, 8), np.float32)
    mask[3, 5], mask[7, 0] = 1.0, 0.5
    assert cells(mask, 4).tolist() == [[0, 1], [0.5, 0]]


def test_an_inpainting_model_reads_mask_and_masked_image():
    """Nine channels in Stable Diffusion: latents, mask, latents of the image with what is masked in grey."""
    fake, seen = Fake(), []
    fake.description = replace(fake.description, in_channels=7)
    fake.encode_image = lambda pixels: np.concatenate(
        [pixels[..., ::2, ::2], np.zeros((1, 3, 4, 4), np.float32)], axis=1
    )

    def denoise(x, t, condition):
        seen.append(x)
        return np.zeros_like(x[:, :3])

    fake.denoise = denoise
    generate(fake, ["a"], [0], REQUEST, edit=Edit(IMAGE[:8, :8], 1.0, LEFT[:8, 4:12]))
    x = seen[0]
    assert x.shape == (2, 7, 4, 4) and (x[0] == x[1]).all()
    assert x[0, 3].tolist() == [[1, 1, 0, 0]] * 4
    pixels = images.to_pixels(IMAGE[:8, :8])[..., ::2, ::2] * 0.5
    np.testing.assert_allclose(x[0, 4:, :, 2:], pixels[..., 2:], rtol=1e-6)
    np.testing.assert_allclose(x[0, 4:, :, :2], 0, atol=0.01)


def test_an_inpainting_model_is_told_a_mask_of_0_and_1():
    """diffusers' own mask processor and interpolation give the same mask, and the same image without what is masked."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    fake, seen = Fake(), []
    fake.description = replace(fake.description, in_channels=7)
    fake.encode_image = lambda pixels: seen.append(pixels) or np.concatenate([pixels[..., ::2, ::2]] * 2, axis=1)
    told = []
    fake.denoise = lambda x, t, condition: told.append(x[0, 3]) or np.zeros_like(x[:, :3])
    soft = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    generate(fake, ["a"], [0], REQUEST, edit=Edit(IMAGE[:8, :8], 1.0, soft))
    processor = diffusers.image_processor.VaeImageProcessor(
        vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    mask = processor.preprocess(torch.from_numpy(soft)[None, None])
    wanted = torch.nn.functional.interpolate(mask, size=(4, 4))[0, 0].numpy()
    assert all((each == wanted).all() for each in told) and set(wanted.ravel()) == {0, 1}
    (masked,) = seen[:1]
    np.testing.assert_array_equal(masked, images.to_pixels(IMAGE[None, :8, :8]) * (mask < 0.5).numpy())


def test_extending():
    canvas, mask = extended(IMAGE, (2, 0, 4, 1), 3)
    assert canvas.shape == (SIDE + 1, SIDE + 6, 3) and mask.shape == canvas.shape[:2]
    np.testing.assert_array_equal(canvas[:SIDE, 2 : 2 + SIDE], IMAGE)
    np.testing.assert_array_equal(canvas[:SIDE, 0], IMAGE[:, 0])
    assert (mask[:, :2] == 1).all() and (mask[:, -4:] == 1).all() and (mask[-1] == 1).all()
    np.testing.assert_allclose(mask[0, 2:8], [0.75, 0.5, 0.25, 0, 0, 0])
    np.testing.assert_allclose(mask[:, 8], [0] * (SIDE - 3) + [0.25, 0.5, 0.75, 1])


def saved(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def test_reading(tmp_path):
    image = saved(tmp_path / "image.png", IMAGE)
    mask = saved(tmp_path / "mask.png", (LEFT * 255).astype(np.uint8))
    edit = read(image, 0.4, mask)
    np.testing.assert_array_equal(edit.image, IMAGE)
    np.testing.assert_array_equal(edit.mask, LEFT)
    assert edit.strength == 0.4 and read(image, 0.4).mask is None
    wider = read(image, 1.0, mask, (0, 0, 8, 0), factor=2)
    assert wider.image.shape == (SIDE, SIDE + 8, 3) and wider.mask is not None
    assert (wider.mask[:, :8] == 1).all() and (wider.mask[:, 8:11] == 0).all() and (wider.mask[:, SIDE:] == 1).all()
    fitted = read(image, 1.0, saved(tmp_path / "other.png", np.zeros((9, 30, 3), np.uint8)), size=(8, 4))
    assert fitted.image.shape == (4, 8, 3) and fitted.mask is not None and fitted.mask.shape == (4, 8)


def test_a_mask_of_another_size_is_refused(tmp_path):
    image, mask = saved(tmp_path / "a.png", IMAGE), saved(tmp_path / "b.png", IMAGE[:8])
    with pytest.raises(UsageError, match=r"b\.png: the mask is 16x8 and the image 16x16.*--fit"):
        read(image, 1.0, mask)


SOFT = np.clip(np.linspace(1.7, -0.9, SIDE), 0, 1).astype(np.float32).repeat(SIDE).reshape(SIDE, SIDE).T


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", [LEFT, SOFT], ids=["hard", "soft"])
def test_diffusers_paints_the_same_with_an_inpainting_model(make_model, tiny_config, monkeypatch, area):
    """A network of nine channels with random weights. Theirs draws the masked image's latents where ours takes the mean, and
    hands back the decoded image where ours puts in the pixels that were kept."""
    import json

    import torch
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

    cfg = replace(tiny_config, generate=replace(tiny_config.generate, sampler="ddim"))
    path = make_model(cfg)
    (path / "manifest.json").unlink()
    torch.manual_seed(0)
    settings = json.loads((path / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(settings).save_pretrained(path / "unet")
    parts = StableDiffusionPipeline.from_pretrained(path).components
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    scaling = pipe.vae.config.scaling_factor
    monkeypatch.setattr(
        pipe, "_encode_vae_image", lambda image, generator: pipe.vae.encode(image).latent_dist.mean * scaling
    )
    backend, mask = open_backend(Source(path), "torch", "cpu"), Image.fromarray(np.rint(area * 255).astype(np.uint8))
    latents = noise.normal([3], (4, 8, 8)) * np.float32(backend.description.schedule[-1].sigma)
    theirs = pipe(
        "a red square",
        image=Image.fromarray(IMAGE),
        mask_image=mask,
        latents=torch.from_numpy(latents),
        strength=1.0,
        height=SIDE,
        width=SIDE,
        num_inference_steps=10,
        guidance_scale=2.0,
        output_type="np",
    ).images[0]
    request = Request(10, 2.0, "ddim", "trailing", SIDE, SIDE)
    ours = generate(backend, ["a red square"], [3], request, edit=Edit(IMAGE, 1.0, area))[0]
    drawn = area == 1
    assert drawn.any() and ours[drawn].std() > 5
    assert (np.abs(ours[drawn] - np.rint(theirs[drawn] * 255)) <= 1).mean() >= 0.999
