"""audiocraft's checkpoints, converted, are what audiocraft makes of them; all else is refused.

`golden/` has checkpoints that audiocraft wrote, with random weights, and what it computes with
them (facebookresearch/audiocraft 896ec7c, float32, CPU).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from musicgen_ui import __main__ as cli
from musicgen_ui.audio.clip import Clip
from musicgen_ui.backends.local import load_scheduler
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import hub, registry
from musicgen_ui.checkpoints.audiocraft import config as audiocraft
from musicgen_ui.checkpoints.audiocraft import convert
from musicgen_ui.checkpoints.audiocraft import weights as exported
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError
from musicgen_ui.request import GenerationRequest
from tests.helpers.engine import generated, make_batch, run, run_job, whole
from tests.helpers.melody import needs_generate

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT_ENCODER = GOLDEN / "text_encoder"
CPU = devices.choose("cpu", "float32")


def quiet(_: str) -> None:
    pass


def converted(folder: Path, destination: Path, text_encoder: Path | None = TEXT_ENCODER) -> Path:
    convert.convert(folder, destination, str(text_encoder) if text_encoder else None, quiet)
    return destination


@pytest.fixture(scope="module", params=["mono", "stereo"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return converted(GOLDEN / kind, tmp_path_factory.mktemp("converted") / kind)


@pytest.fixture(scope="module")
def expected(kind):
    return dict(np.load(GOLDEN / kind / "expected.npz"))


@pytest.fixture(scope="module")
def batch(folder):
    return make_batch(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return convert_model(folder)


def convert_model(folder: Path) -> Any:
    from transformers import AutoModelForTextToWaveform

    return AutoModelForTextToWaveform.from_pretrained(folder).eval()


def greedy(batch, prompt: str, frames: int = 40, **settings: Any) -> torch.Tensor:
    request = GenerationRequest(prompt, duration_s=frames / 50, do_sample=False, **settings)
    return run_job(batch, request)[1]


# The same music


def test_greedy_tokens_are_audiocrafts(folder, batch, reference, expected):
    for prompt, codes in zip(expected["prompts"], expected["greedy_single"], strict=True):
        assert len(np.unique(codes)) > 10  # a sequence that says something
        assert np.array_equal(greedy(batch, str(prompt)), codes)
        theirs, _ = generated(reference, folder, [str(prompt)], 40, 3.0)
        assert np.array_equal(theirs[0], codes)
    prompt, codes = str(expected["prompts"][0]), expected["greedy_unguided"][0]
    assert np.array_equal(greedy(batch, prompt, guidance_scale=1), codes)
    assert np.array_equal(generated(reference, folder, [prompt], 40, 1.0)[0][0], codes)


def test_a_clips_codes_and_what_follows_it_are_audiocrafts(folder, batch, reference, expected):
    clip, codes = expected["clip"], expected["clip_codes"][0]
    assert np.array_equal(batch.codec.encode(torch.from_numpy(clip)), codes)
    prompt, whole = str(expected["prompts"][0]), expected["continuation"][0]
    assert np.array_equal(greedy(batch, prompt, 30, audio_prompt=Clip(clip, 32_000)), whole)
    assert np.array_equal(generated(reference, folder, [prompt], 30, 3.0, clip)[0][0], whole)


def test_codes_sound_as_in_audiocraft(batch, reference, expected):
    for codes, audio in zip(expected["greedy_batch"], expected["audio_batch"], strict=True):
        made = batch.codec.decode(torch.from_numpy(codes)).numpy()
        assert np.abs(audio).max() > 0.01
        assert np.abs(made - audio).max() < 1e-4
        channels = batch.codec.channels
        sides = [torch.from_numpy(codes[side::channels])[None, None] for side in range(channels)]
        with torch.no_grad():
            theirs = [reference.audio_encoder.decode(side, [None])[0][0, 0] for side in sides]
        assert np.abs(torch.stack(theirs).numpy() - audio).max() < 1e-4


def test_melody_checkpoints_give_audiocrafts_tokens_in_transformers(tmp_path):
    from transformers import AutoTokenizer, MusicgenMelodyForConditionalGeneration

    out = converted(GOLDEN / "melody", tmp_path / "melody")
    model, found = MusicgenMelodyForConditionalGeneration.from_pretrained(
        out, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert (model.config.num_chroma, model.config.chroma_length) == (12, 235)
    needs_generate()
    expected = np.load(GOLDEN / "melody" / "expected.npz")
    tokens = AutoTokenizer.from_pretrained(out)([str(expected["prompt"])], return_tensors="pt")
    for name, chroma in (("text_and_melody", expected["chroma"]), ("text_only", None)):
        inputs = {**tokens} | ({} if chroma is None else {"input_features": torch.tensor(chroma)})
        assert np.array_equal(melody_codes(model, inputs), expected[f"greedy_{name}"][0])
    extractor = json.loads((out / "processor_config.json").read_text())["feature_extractor"]
    assert (extractor["n_fft"], extractor["hop_length"], extractor["chunk_length"]) == (
        *(16384, 4096, 30),
    )


@pytest.mark.parametrize("as_it_is", [False, True])
def test_melody_checkpoints_give_audiocrafts_tokens_here(tmp_path, as_it_is):
    """Converted, and as audiocraft wrote it; with the clip itself, so the chroma is ours too."""
    if as_it_is:
        out = Path(shutil.copytree(GOLDEN / "melody", tmp_path / "melody"))
        shutil.copytree(TEXT_ENCODER, out / "text_encoder")
    else:
        out = converted(GOLDEN / "melody", tmp_path / "melody")
    loaded = registry.load(registry.resolve(str(out)), torch.float32, quiet)
    batch = Scheduler(
        loaded.model, loaded.tokenizer, checkpoint=loaded.name, extractor=loaded.extractor
    )
    expected = np.load(GOLDEN / "melody" / "expected.npz")
    prompt, clip = str(expected["prompt"]), Clip(expected["melody"], 32_000)
    request = GenerationRequest(prompt, melody=clip)
    heard = batch.conditioner.conditions(request).states[0][:235]
    assert np.abs(heard.numpy() - expected["melody_states"][0]).max() < 1e-5
    for name, melody in (("text_and_melody", clip), ("text_only", None)):
        codes = greedy(batch, prompt, melody=melody)
        assert np.array_equal(codes, expected[f"greedy_{name}"][0])


def test_chord_fine_tunes_are_converted(tmp_path):
    """Their chroma is that of chords, so silence is no pitch class at all."""
    folder = Path(shutil.copytree(GOLDEN / "melody", tmp_path / "chords"))
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    settings = yaml.safe_load(package["xp.cfg"])
    wave = settings["conditioners"]["self_wav"]
    wave["model"], wave["chroma_chord"] = "chroma_chord", wave.pop("chroma_stem")
    weights = package["best_state"]
    weights.pop(audiocraft.CHROMA_WINDOW, None)
    weights[audiocraft.CHORD_RECOGNITION + "output_layer.weight"] = torch.zeros(3, 2)
    torch.save(package | {"xp.cfg": yaml.safe_dump(settings)}, folder / "state_dict.bin")
    out = converted(folder, tmp_path / "out")
    loaded = registry.load(registry.resolve(str(out)), torch.float32, quiet)
    melody = Scheduler(
        loaded.model, loaded.tokenizer, checkpoint=loaded.name, extractor=loaded.extractor
    ).conditioner.melody
    assert melody.extractor.chords and not melody.silence.any()
    plain = weights_of(converted(GOLDEN / "melody", tmp_path / "plain"))
    assert all(torch.equal(weight, plain[key]) for key, weight in weights_of(out).items())


def melody_codes(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    seen, decode = [], model.audio_encoder.decode

    def spy(codes: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(codes[0, 0])
        return decode(codes, **kwargs)

    model.audio_encoder.decode = spy
    model.generate(**inputs, do_sample=False, guidance_scale=3.0, max_new_tokens=43)
    model.audio_encoder.decode = decode
    return seen[0].numpy()


# Every published architecture

# layers, heads, stereo, melody; https://huggingface.co/models?other=musicgen
PUBLISHED = {
    "small": (24, 16, False, False),
    "medium": (48, 24, False, False),
    "large": (48, 32, False, False),
    "melody": (48, 24, False, True),
    "melody-large": (48, 32, False, True),
    "stereo-small": (24, 16, True, False),
    "stereo-medium": (48, 24, True, False),
    "stereo-large": (48, 32, True, False),
    "stereo-melody": (48, 24, True, True),
    "stereo-melody-large": (48, 32, True, True),
}


def unpickled(kind: str, name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / kind / f"{name}.bin", weights_only=True)


def language_model(layers: int, heads: int, stereo: bool, melody: bool) -> dict[str, Any]:
    """What audiocraft exports of a model with that structure and heads of width 2: random."""
    width, books, codes = 2 * heads, 8 if stereo else 4, 2048
    shapes = {}
    if melody:
        shapes["condition_provider.conditioners.self_wav.output_proj.weight"] = (width, 12)
        shapes["condition_provider.conditioners.self_wav.output_proj.bias"] = (width,)
    shapes["condition_provider.conditioners.description.output_proj.weight"] = (width, 24)
    shapes["condition_provider.conditioners.description.output_proj.bias"] = (width,)
    shapes |= {f"emb.{book}.weight": (codes + 1, width) for book in range(books)}
    for layer in range(layers):
        attentions = ["self_attn"] if melody else ["self_attn", "cross_attention"]
        for attention in attentions:
            name = f"transformer.layers.{layer}.{attention}."
            shapes[name + "in_proj_weight"] = (3 * width, width)
            shapes[name + "out_proj.weight"] = (width, width)
        shapes[f"transformer.layers.{layer}.linear1.weight"] = (4 * width, width)
        shapes[f"transformer.layers.{layer}.linear2.weight"] = (width, 4 * width)
        for norm in ("norm1", "norm2") if melody else ("norm1", "norm2", "norm_cross"):
            shapes[f"transformer.layers.{layer}.{norm}.weight"] = (width,)
            shapes[f"transformer.layers.{layer}.{norm}.bias"] = (width,)
    shapes |= {"out_norm.weight": (width,), "out_norm.bias": (width,)}
    shapes |= {f"linears.{book}.weight": (codes, width) for book in range(books)}
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    if melody:
        weights[audiocraft.CHROMA_WINDOW] = torch.hann_window(16384).half()
    settings = yaml.safe_load(unpickled("melody" if melody else "stereo", "state_dict")["xp.cfg"])
    settings["channels"] = 2 if stereo else 1
    settings["interleave_stereo_codebooks"]["use"] = stereo
    delays = [0, 0, 1, 1, 2, 2, 3, 3] if stereo else [0, 1, 2, 3]
    settings["codebooks_pattern"]["delay"]["delays"] = delays
    settings["transformer_lm"] |= {"dim": width, "num_heads": heads, "num_layers": layers}
    settings["transformer_lm"] |= {"n_q": books, "card": codes}
    return {"best_state": weights, "xp.cfg": yaml.safe_dump(settings), "exported": True}


def codec_of_2048() -> dict[str, Any]:
    """The golden codec with codebooks as large as Meta's; values that point to each other."""
    package = unpickled("mono", "compression_state_dict")
    torch.manual_seed(1)
    weights = {
        name: torch.randn(2048, *w.shape[1:]) if w.shape[0] == 64 and "_codebook" in name else w
        for name, w in package["best_state"].items()
    }
    for name in weights:
        if name.endswith("inited"):
            weights[name] = torch.randn(1)
    settings = yaml.safe_load(package["xp.cfg"])
    settings["rvq"]["bins"] = 2048
    settings["channels"] = "${seanet.channels}"
    settings["seanet"] |= {"channels": "${encodec.channels}", "causal": "${encodec.causal}"}
    return package | {"best_state": weights, "xp.cfg": yaml.safe_dump(settings)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_architecture_converts_key_by_key(name, tmp_path):
    layers, heads, stereo, melody = PUBLISHED[name]
    model, codec = language_model(layers, heads, stereo, melody), codec_of_2048()
    torch.save(model, tmp_path / "state_dict.bin")
    torch.save(codec, tmp_path / "compression_state_dict.bin")
    out = converted(tmp_path, tmp_path / "out")
    made = {k: w for k, w in weights_of(out).items() if not k.startswith("text_encoder.")}
    places = {weight.numpy().tobytes(): key for key, weight in made.items()}
    assert len(places) == len(made)  # each is another one
    for source, weight in {**model["best_state"], **codec["best_state"]}.items():
        if source == audiocraft.CHROMA_WINDOW:
            continue
        parts = weight.chunk(3) if source.endswith("in_proj_weight") else [weight]
        keys = [places.pop(part.contiguous().numpy().tobytes()) for part in parts]
        assert all(numbers(key) == numbers(source) for key in keys), (source, keys)
        if len(keys) == 3:
            assert [key.split(".")[-2] for key in keys] == ["q_proj", "k_proj", "v_proj"]
    assert not places
    config = json.loads((out / "config.json").read_text())
    assert config["decoder"]["num_codebooks"] == (8 if stereo else 4)
    assert config["decoder"]["audio_channels"] == (2 if stereo else 1)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["top_k"], generation["guidance_scale"]) == (250, 3.0)
    assert generation["max_length"] == 30 * 50 + 3 and generation["bos_token_id"] == 2048
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}
    if not melody:
        description = registry.describe(registry.resolve(str(out)))
        assert description.stereo == ("always" if stereo else "never")


def numbers(name: str) -> list[str]:
    """Which layer, block or codebook a name is about; the thirds of a norm aside."""
    return [part for part in name.split(".") if part.isdigit()]


# The parts that a checkpoint only names


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of audiocraft that a test may break."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        shutil.copyfile(GOLDEN / "mono" / name, folder / name)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_pointer_takes_the_codec_of_that_name(checkpoint, tmp_path, monkeypatch):
    whole = converted(checkpoint, tmp_path / "whole")
    codec = tmp_path / "encodec"
    convert_model(whole).audio_encoder.save_pretrained(codec)
    pointer = {"pretrained": "facebook/encodec_32khz", "exported": True}
    torch.save(pointer, checkpoint / "compression_state_dict.bin")
    with pytest.raises(RequestError, match=r"facebook/encodec_32khz .* compression_state"):
        converted(checkpoint, tmp_path / "offline")
    asked = []
    monkeypatch.setattr(hub, "config_file", lambda name: codec / "config.json")
    monkeypatch.setattr(hub, "download", lambda name, say: asked.append(name) or codec)
    out = converted(checkpoint, tmp_path / "out")
    assert set(asked) == {"facebook/encodec_32khz"}
    expected = weights_of(whole)
    assert expected.keys() == weights_of(out).keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(out).items())


@pytest.mark.parametrize("name", ["../encodec", "//sig/123", "dac_44khz", 3, ["a/b"]])
def test_a_pointer_elsewhere_is_refused(checkpoint, tmp_path, name):
    torch.save({"pretrained": name}, checkpoint / "compression_state_dict.bin")
    with pytest.raises(RequestError, match="only names another codec"):
        converted(checkpoint, tmp_path / "out")


def test_the_text_encoder_is_given_or_beside_or_the_one_named(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"t5-base .*--text-encoder"):
        converted(checkpoint, tmp_path / "out", None)
    with pytest.raises(RequestError, match=r'no folder "nowhere".*--text-encoder'):
        convert.convert(checkpoint, tmp_path / "out", "./nowhere", quiet)
    with pytest.raises(RequestError, match=r"no readable config.json.*--text-encoder"):
        converted(checkpoint, tmp_path / "out", tmp_path)
    expected = weights_of(converted(checkpoint, tmp_path / "given"))
    with monkeypatch.context() as patched:
        asked = []
        patched.setattr(hub, "download", lambda name, say: asked.append(name) or TEXT_ENCODER)
        named = weights_of(converted(checkpoint, tmp_path / "named", None))
    assert asked == ["google-t5/t5-base"]
    shutil.copytree(TEXT_ENCODER, checkpoint / "text_encoder")
    beside = weights_of(converted(checkpoint, tmp_path / "beside", None))
    for found in (named, beside):
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_a_text_encoder_of_another_width_is_refused(checkpoint, tmp_path, tiny_mono):
    from transformers import AutoTokenizer

    other = tmp_path / "t5"
    convert_model(tiny_mono).text_encoder.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_mono).save_pretrained(other)
    with pytest.raises(RequestError, match=r"is 16 wide, .* of 24: name the right one"):
        converted(checkpoint, tmp_path / "out", other)


# What is refused


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def with_settings(folder: Path, path: str, value: Any, name: str = "state_dict.bin") -> None:
    package = torch.load(folder / name, weights_only=True)
    settings = yaml.safe_load(package["xp.cfg"])
    *parents, last = path.split(".")
    part = settings
    for key in parents:
        part = part[key]
    part[last] = value
    torch.save(package | {"xp.cfg": yaml.safe_dump(settings)}, folder / name)


@pytest.mark.parametrize("name", ["state_dict.bin", "compression_state_dict.bin"])
def test_a_missing_extra_or_misshapen_weight_is_named_and_nothing_written(
    checkpoint, tmp_path, name
):
    package = torch.load(checkpoint / name, weights_only=True)
    first, second, *_ = package["best_state"]
    found = list(package["best_state"].pop(first).shape)
    package["best_state"] |= {"lora.a": torch.zeros(2), second: torch.zeros(7, 7)}
    torch.save(package, checkpoint / name)
    with pytest.raises(RequestError) as error:
        converted(checkpoint, tmp_path / "out")
    said = str(error.value)
    if first.endswith("output_proj.weight"):
        assert found == [32, 24]
    assert f"missing: {first};" in said and "not known: lora.a;" in said
    assert f"of another shape: {second} [7, 7] instead of [" in said and name in said
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_another_count_of_layers_or_codebooks_is_refused(checkpoint, tmp_path):
    with_settings(checkpoint, "transformer_lm.num_layers", 3)
    with pytest.raises(RequestError, match=r"missing: transformer.layers.2.* and \d+ more"):
        converted(checkpoint, tmp_path / "out")
    with_settings(checkpoint, "rvq.n_q", 8, "compression_state_dict.bin")
    with pytest.raises(RequestError, match="writes 4 codebooks and its codec reads 8"):
        converted(checkpoint, tmp_path / "out")


OTHERS = {
    "transformer_lm.norm_first": False,
    "transformer_lm.activation": "relu",
    "transformer_lm.positional_embedding": "rope",
    "transformer_lm.past_context": 250,
    "transformer_lm.num_layers": 10**9,
    "transformer_lm.num_heads": 5,
    "transformer_lm.dim": "wide",
    "codebooks_pattern.modeling": "parallel",
    "codebooks_pattern.delay.delays": [0, 0, 0, 0],
    "channels": 2,
    "conditioners.description.model": "clap",
    "conditioners.description.t5.normalize_text": True,
    "conditioners.style": {"model": "style"},
    "conditioners": 3,
    "fuser.cross": [],
    "fuser.prepend": ["description", 1],
    "fuser.sum": ["description"],
    "classifier_free_guidance.inference_coef": "much",
    "lm_model": "${lm_model}",
}


@pytest.mark.parametrize("path", OTHERS)
def test_settings_that_compute_something_else_are_refused(checkpoint, tmp_path, path):
    with_settings(checkpoint, path, OTHERS[path])
    with pytest.raises(RequestError, match="cannot be converted: its setting"):
        converted(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seanet.causal", True),
        ("seanet.norm", "time_group_norm"),
        ("seanet.pad_mode", "replicate"),
        ("seanet.ratios", [8, 0]),
        ("seanet.lstm", 0),
        ("encodec.renormalize", True),
        ("compression_model", "dac"),
    ],
)
def test_codecs_that_compute_something_else_are_refused(checkpoint, tmp_path, path, value):
    with_settings(checkpoint, path, value, "compression_state_dict.bin")
    with pytest.raises(RequestError, match=f"cannot be converted: its setting {path}"):
        converted(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "text", [None, 3, "a: [", "[" * 5000, "a" * 300_000, "a: !!python/object/apply:os.getcwd []"]
)
def test_settings_that_cannot_be_read_are_refused(checkpoint, tmp_path, text):
    package = torch.load(checkpoint / "state_dict.bin", weights_only=True)
    torch.save(package | {"xp.cfg": text}, checkpoint / "state_dict.bin")
    with pytest.raises(RequestError, match="no readable settings"):
        converted(checkpoint, tmp_path / "out")


def test_settings_that_would_grow_without_end_are_a_sentence(checkpoint, tmp_path):
    """Each name means nine of the one before."""
    text = "a0: &a0 x\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    package = torch.load(checkpoint / "state_dict.bin", weights_only=True)
    text += "lm_model: *a29\nconditioners: *a29\nfuser: {cross: *a29}\n"
    torch.save(package | {"xp.cfg": text}, checkpoint / "state_dict.bin")
    with pytest.raises(RequestError, match="settings under"):
        converted(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["state_dict.bin", "compression_state_dict.bin"])
def test_a_pickle_with_code_is_refused_unrun(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"best_state": {"a": Bomb()}}, checkpoint / name)
    with pytest.raises(RequestError, match="more than weights and settings"):
        converted(checkpoint, tmp_path / "out")
    with pytest.raises(RequestError, match="more than weights and settings"):
        registry.describe(registry.resolve(str(checkpoint)))
    assert sorted(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("keep", [0, 1, 5000, 100_000])
def test_a_truncated_or_foreign_file_is_a_sentence(checkpoint, tmp_path, keep):
    file = checkpoint / "state_dict.bin"
    whole = file.read_bytes()
    for content in (whole[:keep], b"x" * keep, whole[: len(whole) - keep - 1]):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=r"damaged or cut short|is empty"):
            converted(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [torch.zeros(1)],
        {"emb.0.weight": "text"},
        {3: torch.zeros(1)},
        {"emb.0.weight": torch.zeros(3, dtype=torch.int64)},
        {"emb.0.weight": torch.zeros(1).expand(10**6, 10**6)},  # far more than the file has
        {"emb.0.weight": torch.zeros(3).to_sparse()},
        {"state": {"emb.0.weight": torch.zeros(3)}},
    ],
)
def test_a_pickle_that_holds_no_plain_weights_is_refused(checkpoint, tmp_path, weights):
    package = torch.load(checkpoint / "state_dict.bin", weights_only=True)
    torch.save(package | {"best_state": weights}, checkpoint / "state_dict.bin")
    with pytest.raises(RequestError, match="weights"):
        converted(checkpoint, tmp_path / "out")


def test_a_codec_that_is_not_there_and_a_folder_that_is_none_are_refused(checkpoint, tmp_path):
    (checkpoint / "compression_state_dict.bin").unlink()
    with_settings(checkpoint, "compression_model_checkpoint", "somewhere/else.th")
    with pytest.raises(RequestError, match=r"compression_state_dict.bin is missing"):
        converted(checkpoint, tmp_path / "out")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError, match=r"There is no state_dict.bin"):
            converted(folder, tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    assert weights_of(converted(checkpoint, tmp_path / "empty"))
    before = sorted((tmp_path / "empty").iterdir())
    for taken in (tmp_path / "empty", checkpoint / "state_dict.bin"):
        with pytest.raises(RequestError, match="exists already"):
            converted(checkpoint, taken)
    assert sorted((tmp_path / "empty").iterdir()) == before
    with pytest.raises(RequestError, match="cannot be written"):
        converted(checkpoint, checkpoint / "state_dict.bin" / "out")


# In the app


def test_a_folder_of_audiocraft_is_a_checkpoint_as_it_is(checkpoint, tmp_path):
    shutil.copytree(TEXT_ENCODER, checkpoint / "text_encoder")
    before = {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")}
    source = registry.resolve(str(checkpoint))
    description = registry.describe(source)
    assert (description.stereo, description.sampling_rate) == ("never", 32_000)
    loaded = registry.load(source, torch.float32, quiet)
    assert (loaded.sampling_rate, loaded.channels, loaded.model.training) == (32_000, 1, False)
    out = converted(checkpoint, tmp_path / "out", None)
    expected = registry.load(registry.resolve(str(out)), torch.float32, quiet).model
    assert expected.state_dict().keys() == loaded.model.state_dict().keys()
    for key, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[key])
    tokens = loaded.tokenizer("calm piano", return_tensors="pt")
    audio = [
        model.generate(**tokens, do_sample=False, max_new_tokens=8)
        for model in (loaded.model, expected)
    ]
    assert torch.equal(*audio)
    half = registry.load(source, torch.bfloat16, quiet).model
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")} == before


class Node:
    """OmegaConf's classes keep their values so."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state, _parent=None)


@pytest.fixture
def omegaconf(monkeypatch):
    """Its classes by name alone, for pickles that hold settings in them; it is not installed."""
    kinds = {}
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode"):
        module, kind = name.split(".")
        path = f"omegaconf.{module}"
        kinds[kind] = type(kind, (Node,), {"__module__": path})
        made = ModuleType(path)
        setattr(made, kind, kinds[kind])
        monkeypatch.setitem(sys.modules, path, made)

    def wrapped(value: Any) -> Any:
        if isinstance(value, dict):
            return kinds["DictConfig"](_content={k: wrapped(v) for k, v in value.items()})
        if isinstance(value, list):
            return kinds["ListConfig"](_content=[wrapped(v) for v in value])
        return kinds["AnyNode"](_val=value)

    return wrapped


def trained(omegaconf: Any, weights: str) -> dict[str, Any]:
    """dora's state, or what Replicate's fine-tuner keeps of it, with the best weights there."""
    package = unpickled("mono", "state_dict")
    best, last = package["best_state"], {k: w + 1 for k, w in package["best_state"].items()}
    state = {"xp.cfg": omegaconf(yaml.safe_load(package["xp.cfg"])), "xp.sig": "a1b2"}
    state |= {"history": [{"train": {"ce": 1.5}}]}
    if weights == "model":
        return state | {"model": best}
    state |= {"model": last, "best_state": {"model": last}, "fsdp_best_state": {}}
    return state | {weights: {"model": best}}


@pytest.mark.parametrize("weights", ["best_state", "fsdp_best_state", "model"])
def test_a_trainings_best_weights_and_settings_are_read(checkpoint, omegaconf, weights):
    expected = exported.read(checkpoint / "state_dict.bin")
    torch.save(trained(omegaconf, weights), checkpoint / "checkpoint.th")
    found = exported.read(checkpoint / "checkpoint.th")
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[k], weight) for k, weight in expected.weights.items())
    assert found.settings.values == expected.settings.values


def test_doras_state_is_a_checkpoint_as_it_is(checkpoint, omegaconf):
    shutil.copytree(TEXT_ENCODER, checkpoint / "text_encoder")
    expected = loaded(checkpoint).state_dict()
    (checkpoint / "state_dict.bin").unlink()
    torch.save(trained(omegaconf, "best_state"), checkpoint / "checkpoint.th")
    for key, weight in loaded(checkpoint).state_dict().items():
        assert torch.equal(weight, expected[key])
    assert registry.resolve(str(checkpoint / "checkpoint.th")).folder == checkpoint


def loaded(folder: Path) -> Any:
    return registry.load(registry.resolve(str(folder)), torch.float32, quiet).model


def test_a_codec_that_the_settings_name_need_not_be_copied(checkpoint, tmp_path, monkeypatch):
    codec = tmp_path / "encodec"
    convert_model(converted(checkpoint, tmp_path / "whole")).audio_encoder.save_pretrained(codec)
    (checkpoint / "compression_state_dict.bin").unlink()
    monkeypatch.setattr(hub, "config_file", lambda name: codec / "config.json")
    asked: list[str] = []
    monkeypatch.setattr(hub, "download", lambda name, say: asked.append(name) or codec)
    made, whole = (
        weights_of(converted(checkpoint, tmp_path / "out")),
        weights_of(tmp_path / "whole"),
    )
    assert set(asked) == {"facebook/encodec_32khz"}
    assert made.keys() == whole.keys()
    assert all(torch.equal(weight, whole[key]) for key, weight in made.items())


def test_names_that_training_wraps_are_unwrapped(checkpoint, tmp_path):
    expected = weights_of(converted(checkpoint, tmp_path / "plain"))
    package = unpickled("mono", "state_dict")
    wrapped = {f"_orig_mod.{name}": weight for name, weight in package["best_state"].items()}
    torch.save(package | {"best_state": wrapped}, checkpoint / "state_dict.bin")
    made = weights_of(converted(checkpoint, tmp_path / "out"))
    assert all(torch.equal(weight, expected[key]) for key, weight in made.items())


def test_a_folder_of_audiocraft_that_the_app_cannot_play_is_refused(checkpoint, tmp_path):
    with pytest.raises(RequestError, match=r"t5-base .*--text-encoder"):
        registry.load(registry.resolve(str(checkpoint)), torch.float32, quiet)


def test_the_commands_of_the_docs_make_music_of_an_audiocraft_checkpoint(
    checkpoint, tmp_path, monkeypatch, capsys
):
    page = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    text = page.read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("python -m musicgen_ui conv"))
    arguments = line.split()[3:]
    assert arguments[0] == "convert"
    monkeypatch.chdir(tmp_path)
    checkpoint.rename(tmp_path / arguments[1])
    shutil.copytree(TEXT_ENCODER, tmp_path / arguments[arguments.index("--text-encoder") + 1])
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == arguments[2]
    make = ["generate", "calm piano", "--duration", "0.8", "--device", "cpu", "--no-do-sample"]
    make += ["--precision", "float32", "--quiet"]
    assert cli.main([*make, "--checkpoint", arguments[2], "-o", "out.wav"]) == 0
    samples, rate = soundfile.read("out.wav", always_2d=True)
    assert (rate, samples.shape) == (32_000, (25_600, 1)) and samples.any()
    assert cli.main(["convert", arguments[1], arguments[2]]) == 2
    assert cli.main(["convert", arguments[1]]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_bandwidth_pays_for_its_codebooks_and_no_more():
    for codebooks in range(1, 33):
        for size in (64, 512, 1024, 2000, 2048):
            for rate, ratios in ((32_000, [8, 5, 4, 4]), (16_000, [8, 5, 4, 2]), (44_100, [7, 9])):
                bandwidth = audiocraft._bandwidth(codebooks, rate, ratios, size)
                codec = {"sampling_rate": rate, "upsampling_ratios": ratios}
                codec |= {"codebook_size": size, "target_bandwidths": [bandwidth]}
                assert configuration._codebooks(codec) == codebooks


# AudioGen: 16 kHz, t5-large by name, windows of 10 s


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """audiocraft's own layout, with its text encoder beside it."""
    folder = tmp_path_factory.mktemp("audiogen") / "audiogen"
    shutil.copytree(GOLDEN / "audiogen", folder)
    shutil.copytree(TEXT_ENCODER, folder / "text_encoder")
    return folder


def test_audiogen_gives_audiocrafts_tokens_and_sound(sounds, tmp_path):
    expected = np.load(GOLDEN / "audiogen" / "expected.npz")
    for folder in (sounds, converted(sounds, tmp_path / "converted", None)):
        batch = load_scheduler(registry.resolve(str(folder)), CPU, 2, quiet)
        assert (batch.codec.sampling_rate, batch.codec.frame_rate) == (16_000, 50)
        for prompt, codes in zip(expected["prompts"], expected["greedy_single"], strict=True):
            assert len(np.unique(codes)) > 10
            assert np.array_equal(greedy(batch, str(prompt)), codes)
        prompt, codes = str(expected["prompts"][0]), expected["greedy_unguided"][0]
        assert np.array_equal(greedy(batch, prompt, guidance_scale=1), codes)
        clip = Clip(expected["clip"], 16_000)
        encoded = batch.codec.encode(torch.from_numpy(clip.samples))
        assert np.array_equal(encoded, expected["clip_codes"][0])
        continued = greedy(batch, prompt, 30, audio_prompt=clip)
        assert np.array_equal(continued, expected["continuation"][0])
        for codes, audio in zip(expected["greedy_single"], expected["audio_single"], strict=True):
            made = batch.codec.decode(torch.from_numpy(codes)).numpy()
            assert np.abs(audio).max() > 0.01 and np.abs(made - audio).max() < 1e-4


def test_audiogen_goes_on_after_10_s_as_audiocraft_does(sounds):
    """12.5 s in windows of 10 s with a stride of 2 s: the window is the checkpoint's."""
    expected = np.load(GOLDEN / "audiogen" / "expected.npz")
    batch = load_scheduler(registry.resolve(str(sounds)), CPU, 1, quiet)
    assert batch.window_s == 10
    request = GenerationRequest(
        str(expected["prompts"][0]), duration_s=12.5, overlap_s=8, do_sample=False
    )
    windows, finished, _ = run(batch, request)
    assert list(windows) == [0, 100, 200]
    assert np.array_equal(whole(windows)[:, :625], expected["extended"][0][:, :625])
    assert finished.clip.duration_s == 12.5


def test_audiogen_is_described_as_sound_effects(sounds, tmp_path):
    out = converted(sounds, tmp_path / "converted", None)
    for folder in (sounds, out):
        described = registry.describe(registry.resolve(str(folder)))
        assert described.summary.startswith("sound effects · ")
        assert (described.window_s, described.sampling_rate) == (10, 16_000)
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 503
    for name in ("audiogen", "audiogen-medium", "facebook/audiogen-medium"):
        described = registry.describe(registry.resolve(name))
        assert described.checkpoint == "facebook/audiogen-medium" and described.window_s == 10
        assert "sound effects" in described.summary and "CC-BY-NC" in described.summary


def test_a_window_that_no_model_has_is_refused(sounds, tmp_path):
    out = converted(sounds, tmp_path / "converted", None)
    for value in (0, -1, 31, "10", True, None):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"window_s": value}))
        with pytest.raises(RequestError, match="window_s"):
            registry.describe(registry.resolve(str(out)))


# How often files are opened


def test_an_audiocraft_pickle_is_opened_once_a_load(sounds, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(sounds, tmp_path / "checkpoint"))
    opened: list[str] = []
    open_file = exported.read
    monkeypatch.setattr(exported, "read", lambda file: opened.append(file.name) or open_file(file))
    source = registry.resolve(str(folder))
    registry.load(source, torch.float32, quiet)
    assert sorted(opened) == ["compression_state_dict.bin", "state_dict.bin"]
    opened.clear()
    registry.describe(source)
    registry.fetch(source, quiet)
    assert opened == []  # the settings are known
    (folder / "state_dict.bin").touch()
    registry.describe(registry.resolve(str(folder)))
    assert len(opened) == 2  # another training may have written it
