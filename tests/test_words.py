"""Learnt words: files of diffusers and AUTOMATIC1111's web UI, read and written; what they say on both runtimes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_export import bundle, model_dir, translated
from test_stable_diffusion import draws_alike, networks, written
from tiny_stable_diffusion import refusal

from tinydiff import cli, export
from tinydiff.adapters import words
from tinydiff.adapters.words import Word
from tinydiff.backends import open_backend
from tinydiff.backends.onnx import OnnxBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.header import header
from tinydiff.checkpoints.source import Adapter, Source
from tinydiff.condition import of_branches
from tinydiff.errors import ModelError
from tinydiff.pipeline import Request, generate
from tinydiff.text.prompts import parse
from tinydiff.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a photo of <cat> on Grass", "(a <cat>:1.3)", "<cat>", "a dog", "easyneg, <CAT> and <cat>"]
REQUEST = Request(3, 3.0, "ddim", "trailing", 16, 16)


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return written("sd1", networks("sd1", 2), tmp_path_factory.mktemp("base"))


def stored(path: Path, vectors: np.ndarray) -> dict[str, Path]:
    """Files of one word in every form: by its form."""
    tensor = torch.from_numpy(vectors)
    forms: dict[str, Any] = {
        "diffusers.bin": {"<cat>": tensor},
        "a1111.pt": {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": tensor},
            "name": "<cat>",
            "step": 9,
            "sd_checkpoint": None,
        },
        "parameter.pt": {"string_to_param": {"*": torch.nn.Parameter(tensor)}, "name": "<cat>"},
    }
    for name, content in forms.items():
        torch.save(content, path / name)
    (path / "named").mkdir()
    save_file({"<cat>": vectors}, path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors}, path / "named" / "<cat>.safetensors")
    return {name: path / name for name in (*forms, "learned_embeds.safetensors", "named/<cat>.safetensors")}


@pytest.mark.peers
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_prompts_say_what_they_do_in_diffusers(count, base, tmp_path):
    """Two words; the ids, and the text encoder's vectors, of each form of file."""
    from diffusers import StableDiffusionPipeline

    files, other = stored(tmp_path, rows(count, 32)), tmp_path / "other.safetensors"
    save_file({"easyneg": rows(2, 32, 1)}, other)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_textual_inversion([str(files["learned_embeds.safetensors"]), str(other)])
    said = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in ("a <cat> here", "easyneg", *PROMPTS[:1])]
    theirs = pipe.tokenizer(said, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    wanted = pipe.text_encoder(theirs).last_hidden_state
    for name, file in files.items():
        source = Source(base, words=(file, other))
        ids = source.tokenizers["text_encoder"].encode(["a <cat> here", "easyneg", PROMPTS[0]])
        assert np.array_equal(ids, theirs), name
        assert np.array_equal(source.learnt[0].vectors["text_encoder"], rows(count, 32)), name
    source.check()
    ours = folder.load(source).networks["text_encoder"](torch.from_numpy(ids))[0]
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.std()
    plain = pipe.text_encoder(torch.from_numpy(ids.clip(max=49407))).last_hidden_state
    assert (wanted - plain).abs().max() > 0.1


@pytest.mark.peers
@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "a1111.pt"])
def test_diffusers_draws_the_same_picture(name, base, tmp_path):
    """Of a file in each style, with a second word."""
    from diffusers import StableDiffusionPipeline

    files, other, request = (
        stored(tmp_path, rows(3, 32)),
        tmp_path / "other.safetensors",
        Request(6, 7.5, "plms", "leading", 32, 32),
    )
    save_file({"easyneg": rows(2, 32, 1)}, other)
    pipe, said = StableDiffusionPipeline.from_pretrained(base), "a photo of <cat>, easyneg"
    plain = draws_alike(Source(base), pipe, request, said)
    pipe.load_textual_inversion([str(files[name]), str(other)])
    drawn = draws_alike(Source(base, words=(files[name], other)), pipe, request, said)
    assert (np.abs(drawn - plain) > 1).mean() > 0.3


@pytest.mark.peers
def test_words_of_a_folder_and_of_an_export_are_known(base, tmp_path):
    """What diffusers' pipeline with a word saves is read as it reads it; and so is our own export, by ours and theirs."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    words.write(tmp_path / "cat.safetensors", Word("<cat>", {"text_encoder": rows(3, 32)}))
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"))
    pipe.save_pretrained(tmp_path / "theirs")
    given = [str(base), "--format", "folder", "-o", str(tmp_path / "ours"), "--word", str(tmp_path / "cat.safetensors")]
    cli.app(["export", *given], standalone_mode=False)
    wanted = Source(base, words=(tmp_path / "cat.safetensors",))
    ids = wanted.tokenizers["text_encoder"].encode(PROMPTS)
    for name in ("theirs", "ours"):
        source = Source(tmp_path / name)
        source.check()
        assert np.array_equal(source.tokenizers["text_encoder"].encode(PROMPTS), ids)
        key = source.vectors("text_encoder")
        assert torch.equal(source.tensors("text_encoder")[key], wanted.tensors("text_encoder")[key])
    opened, some = CLIPTokenizer.from_pretrained(tmp_path / "ours" / "tokenizer"), PROMPTS[:-1]
    said = [pipe.maybe_convert_prompt(prompt, opened) for prompt in some]  # which of <CAT> makes one vector
    assert np.array_equal(opened(said, padding="max_length", max_length=77, truncation=True).input_ids, ids[:-1])


def text(source: Source, kind: str, prompts: list[str]) -> np.ndarray:
    backend = open_backend(source, kind, "cpu")
    return of_branches(backend, [parse(prompt)[0] for prompt in prompts])["encoder_hidden_states"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_reads_words_as_torch_does(precision, tmp_path):
    """Its text, and an image."""
    path = tmp_path / "cat.safetensors"
    words.write(path, Word("<cat>", {"text_encoder": rows(3, 12)}))
    source, own = Source(model_dir(), words=(path,)), Source(bundle(precision), words=(path,))
    ours, wanted = (text(each, kind, PROMPTS) for each, kind in ((own, "onnx"), (source, "torch")))
    assert np.abs(ours - wanted).max() <= (1e-4 if precision == "fp32" else 0.02) * wanted.std()
    said = [
        [text(each, "onnx", [prompt]) for each in (own, Source(bundle(precision)))] for prompt in ("<cat>", "a dog")
    ]
    assert [np.array_equal(*pair) for pair in said] == [False, True]
    drawn = generate(OnnxBackend(own, "cpu"), ["<cat>"], [3], REQUEST).astype(int)
    on_torch = generate(open_backend(source, "torch", "cpu"), ["<cat>"], [3], REQUEST)
    assert np.abs(drawn - on_torch).max() <= (1 if precision == "fp32" else 3)


def test_a_bundle_that_is_exported_with_a_word(tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    words.write(path, Word("<cat>", {"text_encoder": rows(2, 12)}))
    own = {"text_encoder": export.translate}  # whose table is larger
    monkeypatch.setattr(export, "translate", lambda name, *rest: own.get(name, translated)(name, *rest))
    export.export(Source(model_dir(), words=(path,)), tmp_path / "merged")
    assert Tokenizer.load(tmp_path / "merged" / "tokenizer").runs
    ours = text(Source(bundle("fp32"), words=(path,)), "onnx", PROMPTS)
    assert np.array_equal(text(Source(tmp_path / "merged"), "onnx", PROMPTS), ours)


def test_files_there_and_back(tmp_path):
    both = {"text_encoder": rows(2, 8), "text_encoder_2": rows(2, 12, 1)}
    widths = {name: (100, len(each[0])) for name, each in both.items()}
    for style, count in (("diffusers", 1), ("a1111", 1), ("diffusers", 2)):
        word, path = Word("thing", dict([*both.items()][:count])), tmp_path / style / str(count) / "thing.safetensors"
        words.write(path, word, style)
        tables = {name: widths[name] for name in word.vectors}

        again = words.opened(path, tables, header)
        assert again.text == "thing" and all(np.array_equal(again.vectors[k], v) for k, v in word.vectors.items())
    assert load_file(tmp_path / "a1111" / "1" / "thing.safetensors").keys() == {"emb_params"}
    assert load_file(tmp_path / "diffusers" / "2" / "thing.safetensors").keys() == {"clip_l", "clip_g"}


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never-made-by-a-word"),))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another width": (
        lambda p: save_file({"<cat>": rows(1, 768)}, p),
        "768 numbers for text_encoder, and .* 12 numbers",
    ),
    "of two encoders": (
        lambda p: save_file({"clip_l": rows(1, 12), "clip_g": rows(1, 9)}, p),
        "9 numbers for text_encoder_2",
    ),
    "known": (lambda p: save_file({"a</w>": rows(1, 12)}, p), "is a word of the model already"),
    "two words": (lambda p: save_file({"a b": rows(1, 12)}, p), "is not one word"),
    "a LoRA": (
        lambda p: save_file({f"l.{i}.lora_up.weight": rows(1, 2) for i in range(9)}, p),
        "not a learnt word, it has l.0.lora_up",
    ),
    "nothing": (lambda p: save_file({}, p), "not a learnt word, it has nothing"),
    "no matrix": (lambda p: save_file({"x": rows(2, 2)[None]}, p), r"its tensors are \[\[1, 2, 2\]\]"),
    "NaN": (lambda p: save_file({"x": rows(1, 12) * np.nan}, p), "NaN or infinite"),
    "whole numbers": (lambda p: save_file({"x": np.ones((1, 12), np.int32)}, p), "only floating point"),
    "cut": (lambda p: p.write_bytes(b"\x40\0\0\0\0\0\0\0{"), "damaged"),
    "missing": (lambda p: None, "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_word_of_the_model_is_refused(case, tmp_path):
    make, says = BAD[case]
    make(path := tmp_path / "bad.safetensors")
    for model in (model_dir(), bundle("fp32")):
        source = Source(model, words=(path,))
        message = refusal(lambda source=source: (source.configs, source.tokenizers))
        assert re.search(says, message), message


def test_a_bundle_of_whole_numbers_reads_no_words(tmp_path):
    words.write(tmp_path / "cat.safetensors", Word("<cat>", {"text_encoder": rows(3, 12)}))
    with pytest.raises(
        ModelError, match="weights are int8; give the model that it is of, or export that with .*--word"
    ):
        OnnxBackend(Source(bundle("int8"), words=(tmp_path / "cat.safetensors",)), "cpu")


@pytest.mark.parametrize("place", [Path("/dev/null"), Path()])
def test_what_is_there_and_no_file_is_called_so(place):
    for source in (Source(model_dir(), words=(place,)), Source(model_dir(), adapters=(Adapter(place),))):
        said = "a folder, and a file is wanted" if place.is_dir() else "not a regular file; give a .safetensors file"
        assert said in refusal(lambda source=source: (source.configs, source.loras))


def test_two_files_of_one_word_are_refused(tmp_path):
    for name, word in (("one", "<cat>"), ("two", "<cat>"), ("three", "<dog>")):
        save_file({word: rows(1, 12)}, tmp_path / f"{name}.safetensors")
    for names in (("one", "two", "three"), ("three", "one", "one")):
        source = Source(model_dir(), words=tuple(tmp_path / f"{name}.safetensors" for name in names))
        assert "both hold the word '<cat>'" in refusal(lambda source=source: source.tokenizers)


def test_a_pickle_runs_no_code(tmp_path):
    for name, content in {"evil.pt": {"<cat>": Evil()}, "other.bin": [1, 2], "deep.pt": {"string_to_param": 3}}.items():
        torch.save(content, tmp_path / name)
        source = Source(model_dir(), words=(tmp_path / name,))
        assert re.search("no tensors alone|not a learnt word", refusal(lambda source=source: source.configs))
    assert not Path("/tmp/never-made-by-a-word").exists()
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    assert "no tensors alone" in refusal(lambda: Source(model_dir(), words=(tmp_path / "cut.pt",)).configs)


def test_a_word_that_no_prompt_says_is_noted(tmp_path, capsys):
    words.write(tmp_path / "cat.safetensors", Word("<cat>", {"text_encoder": rows(2, 12)}))
    given = ["-m", str(bundle("fp32")), "--word", str(tmp_path / "cat.safetensors"), "--steps", "1", "-o"]
    cli.app(["generate", "a dog", *given, str(tmp_path / "a.png")], standalone_mode=False)
    assert "note: no prompt says <cat>" in capsys.readouterr().err
    cli.app(["generate", "a <CAT>", *given, str(tmp_path / "b.png")], standalone_mode=False)
    assert "note" not in capsys.readouterr().err
