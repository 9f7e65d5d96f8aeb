"""The recipe: composing on the grid, the quantiser, the delay pattern, and every stage for a few
steps on sines, ending in a folder that transformers loads."""

import ast
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from musicgen_ui.engine.delay_pattern import delayed
from training import codec as codecs
from training import evaluated, fast, pack, pictures
from training.__main__ import main
from training.assemble import build
from training.captions import caption, misspelt
from training.card_codec import CardCodec
from training.card_lm import CardDecoder, Songs
from training.card_plan import Clips, Plan
from training.codec_losses import mel_bank
from training.composer import compose
from training.dataset import CUT_FRAMES, Dataset, composed
from training.lm import code_logits, make_model, widen_to_stereo
from training.more_styles import MORE_STYLES
from training.presets import PRESETS
from training.render import SoundfontRenderer, find_soundfont, load_metas, render_sines
from training.sketch import DRUM_CHANNEL
from training.styles import STYLES
from training.tokenizer import UNKNOWN, make_tokenizer
from training.train_codec import CodecTrainer
from training.train_lm import Run, Trainer

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered, encoded, trained and assembled, mono and stereo, with the preset for tests."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("training")
    common = ["--out", str(out), "--preset", "tiny", "--device", "cpu"]
    main(["render", *common, "--soundfont", "sines", "--workers", "1"])
    main(["codec", *common])
    for stereo in ([], ["--stereo"]):
        for stage in ("encode", "lm", "assemble"):
            main([stage, *common, *stereo])
    return out


def test_songs_repeat_exactly_on_the_grid_and_come_in_variety():
    seen = defaultdict(set)
    for seed in range(400):
        style = list(STYLES)[seed % 12]
        song = compose(seed, style, 12.0)
        meta = song.meta
        end = meta.change or 600
        start = {(n.frame, n.channel, n.key, n.velocity) for n in song.notes if n.frame < meta.loop}
        second = {
            (n.frame - meta.loop, n.channel, n.key, n.velocity)
            for n in song.notes
            if meta.loop <= n.frame < 2 * meta.loop
        }
        if end >= 3 * meta.loop:  # the loop before a change may hold a fill
            assert start == second, (seed, style)
        seen[style].add((meta.mode, meta.key))
        seen[style + " tempi"].add(meta.bpm)
        seen[style + " instruments"].add(tuple(sorted(song.programs.items())))
    assert compose(7) == compose(7)
    for style in STYLES:
        assert len({key for _, key in seen[style]}) >= 4
        assert len({mode for mode, _ in seen[style]}) == 2
        assert len(seen[style + " tempi"]) == 5
        assert len(seen[style + " instruments"]) >= 3


def test_songs_at_any_tempo_are_loops_of_whole_frames():
    keys, rng = set(), random.Random(0)
    for seed, style in enumerate([*STYLES, *MORE_STYLES] * 8):
        bpm = rng.uniform(60, 170)
        song = compose(seed, style, 12.0, keys=12, bpm=bpm)
        meta, beats = song.meta, 4 if bpm <= 100 else 8
        assert 60 * beats / (meta.loop * 0.02) == pytest.approx(bpm, rel=0.005)
        assert meta.bpm == pytest.approx(bpm, abs=1)
        assert min(note.frame for note in song.notes) == 0, (seed, style)  # no silent opening
        start = {(n.frame, n.channel, n.key, n.velocity) for n in song.notes if n.frame < meta.loop}
        last = (meta.change or 600) // meta.loop * meta.loop - 2 * meta.loop  # before any fill
        later = {
            (n.frame - last, n.channel, n.key, n.velocity)
            for n in song.notes
            if last <= n.frame < last + meta.loop
        }
        assert last < 0 or start == later, (seed, style)
        keys.add((meta.mode, meta.key))
    assert len(keys) == 24


def test_a_song_begins_alike_at_every_tempo():
    for seed, style in enumerate(STYLES):
        songs = [compose(seed, style, tempo=tempo) for tempo in range(5)]
        starts = {
            frozenset((n.channel, n.key, n.velocity) for n in song.notes if n.frame == 0)
            for song in songs
        }
        assert len(starts) == 1, style
        assert [song.meta.speed for song in songs] == ["slow", "slow", "medium", "fast", "fast"]
        assert len({song.meta.bpm for song in songs}) == 5


def test_a_song_without_drums_has_none_and_its_captions_never_claim_them():
    rng = random.Random(0)
    song = compose(3, "rock", drums=False)
    assert all(note.channel != DRUM_CHANNEL for note in song.notes)
    texts = [caption(song.meta, rng) for _ in range(200)]
    assert not any("heavy drums" in text for text in texts)
    assert any("no drums" in text for text in texts)
    assert len(set(texts)) > 150


def test_every_caption_word_is_one_token_and_any_word_is_spelt():
    tokenizer, rng = make_tokenizer(), random.Random(1)
    for seed, style in enumerate([*STYLES, *MORE_STYLES] * 16):
        text = caption(compose(seed, style, keys=12, bpm=rng.uniform(60, 170)).meta, rng)
        words = text.replace(",", " ").replace(". ", " ").rstrip(".")
        tokens = tokenizer.tokenize(words)
        assert len(tokens) == len(words.split()), (text, tokens)
    wrong = {misspelt("gentle flute melody", rng) for _ in range(50)}
    assert len(wrong) > 30
    assert UNKNOWN not in tokenizer.tokenize("Ñandú plays the ukulele @ 3am, café-style!")


def test_the_renderers_follow_the_pan():
    song = replace(compose(5, "folk"), pans={0: 0, 2: 0})
    font = find_soundfont()
    renderers = [render_sines] if font == "sines" else [render_sines, SoundfontRenderer(font)]
    for renderer in renderers:
        left, right = np.abs(renderer(song, 2.0)).mean(1)
        assert left > 3 * right


def test_the_quantizer_gives_what_transformers_decodes_from_its_codes():
    torch.manual_seed(0)
    codec = codecs.make_codec(TINY.codec).eval()
    quantizer = codecs.ResidualQuantizer(codec, decay=1.0)
    latent = torch.randn(4, TINY.codec.hidden, 50)
    left = quantizer.start(latent.transpose(1, 2).flatten(0, 1))
    assert left < 0.3
    codes = codec.quantizer.encode(latent, codec.config.target_bandwidths[0])
    expected = codec.quantizer.decode(codes)
    made, commitment = quantizer(latent.requires_grad_())
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    made.sum().backward()  # straight through
    torch.testing.assert_close(latent.grad, torch.ones_like(latent))
    assert commitment > 0


def test_codes_that_are_hardly_chosen_are_moved_however_large_a_batch_is():
    torch.manual_seed(0)
    quantizer = codecs.ResidualQuantizer(codecs.make_codec(TINY.codec))
    quantizer.start(torch.randn(3000, TINY.codec.hidden))
    book = quantizer.codebooks[0]
    book.cluster_size.fill_(0.1)
    book.embed[:32] += 100  # where one latent in 800 is
    book.embed_avg.copy_(book.embed * 0.1)
    for _ in range(160):
        latent = torch.randn(4000, TINY.codec.hidden)
        latent[:5] = book.embed[torch.randperm(32)[:5]]
        quantizer(latent.view(80, 50, -1).transpose(1, 2))
    assert (book.embed.norm(dim=1) > 50).sum() < 16


def test_a_gpu_codec_has_its_whole_schedule_however_slowly_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Choosing kernels may take as long as the time that is meant for the codec."""
    plan = Plan(tmp_path, tmp_path, tmp_path, TINY, budget_s=60, device="cpu")
    audio = torch.randint(-9000, 9000, (8, 2, 4 * TINY.codec.sampling_rate), dtype=torch.int16)
    metas = [compose(seed).meta for seed in range(8)]
    codec = CardCodec(plan, Clips(audio, torch.zeros(8, 1, 4, dtype=torch.int16), metas))
    shares, update = [], codec.update

    def slow_at_first():
        time.sleep(0 if shares else 0.5)
        shares.append(codec.share)
        return update()

    monkeypatch.setattr(codec, "update", slow_at_first)
    monkeypatch.setattr("training.card_codec.FEWEST_STEPS", 2)
    codec.train(0.4)
    assert shares[1] < 0.2


def test_a_gpu_decoder_keeps_the_weights_that_did_best_on_held_out_songs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = Plan(tmp_path, tmp_path / "out", tmp_path / "keep", TINY, budget_s=60, device="cpu")
    codes = torch.randint(0, 64, (12, 4, 200), dtype=torch.int16)
    clips = Clips(torch.zeros(12, 2, 4), torch.ones(12, 1, 4, dtype=torch.int16),
                  [compose(seed).meta for seed in range(12)])  # fmt: skip
    songs = Songs.of(plan, codes, clips)
    decoder = CardDecoder(plan, codecs.make_codec(TINY.codec).config, songs, stereo=False)
    losses, name = iter([3.0, 3.0, 2.0, 2.0, 4.0, 4.0]), "enc_to_dec_proj.weight"
    monkeypatch.setattr(decoder, "losses", lambda *_: torch.full((4,), next(losses)))
    for value in (1.0, 2.0, 3.0):
        decoder.average[name].fill_(value)
        decoder.check()
    decoder.save()
    kept = pack.read(plan.keep, "mono")[name]
    torch.testing.assert_close(kept, torch.full_like(kept, 2.0), atol=0.02, rtol=0)


@pytest.mark.parametrize("stereo", [False, True])
def test_the_delay_pattern_is_the_one_that_generate_undoes(stereo: bool):
    model = build(TINY, stereo=stereo)
    rows, channels = model.decoder.num_codebooks, 2 if stereo else 1
    codes = torch.randint(0, 64, (2, rows, 12))
    ours = delayed(codes, codes.shape[-1], channels, 64)
    longest = ours.shape[-1]
    given = torch.cat([torch.full((2, rows, 1), 64), codes], -1).flatten(0, 1)
    ids, mask = model.decoder.build_delay_pattern_mask(given, 64, max_length=longest)
    full = model.decoder.apply_delay_pattern_mask(ours.flatten(0, 1), mask)
    assert torch.equal(full, ours.flatten(0, 1))  # nothing of ours is where the pattern has padding
    assert torch.equal(ids, ours.flatten(0, 1)[:, : ids.shape[1]])


def test_matching_heads_go_on_with_a_loop_of_any_length():
    size = replace(TINY.decoder, hidden=448, heads=7, layers=2)
    config = codecs.make_codec(TINY.codec).config
    for loop in (37, 53):
        torch.manual_seed(loop)
        codes = torch.randint(0, 64, (2, 4, loop)).repeat(1, 1, 200 // loop + 1)[..., :200]
        inputs, late = delayed(codes, codes.shape[-1], 1, 64)[..., :-1], {}
        for name, loops in (("matching", False), ("fixed lags", True)):
            model = make_model(config, 100, size, loops=loops).eval()
            with torch.no_grad():
                logits = fast.code_logits(
                    model, inputs, torch.zeros(2, 3, 32), torch.ones(2, 3), 200
                )
            right = [(z.argmax(-1) == codes[:, k])[:, 120:] for k, z in enumerate(logits)]
            late[name] = torch.stack(right).float().mean().item()
        assert late["matching"] > 0.85 and late["fixed lags"] < 0.3, (loop, late)


def test_the_first_heads_look_back_by_their_lag():
    from training.lm import lag_plan

    size = replace(TINY.decoder, hidden=128, heads=4, layers=4)
    codec = codecs.make_codec(TINY.codec)
    torch.manual_seed(0)
    model = make_model(codec.config, 100, size).eval()
    model.decoder.set_attn_implementation("eager")
    codes = torch.randint(0, 64, (4, 300))
    seen = {}
    attention = model.decoder.model.decoder.layers[1].self_attn
    attention.register_forward_hook(lambda module, given, result: seen.update(weights=result[1]))
    with torch.no_grad():
        model.decoder.model(codes, encoder_hidden_states=torch.zeros(1, 2, 128), use_cache=False)
    for head, (lag, _) in enumerate(lag_plan(size.heads, size.layers)[1]):
        steps = torch.arange(lag, 300)
        near = sum(seen["weights"][0, head, steps, steps - lag + d].mean() for d in (-1, 0, 1))
        assert near > 0.5, (lag, near)


def test_fast_passes_are_those_of_transformers():
    torch.manual_seed(0)
    codec = codecs.make_codec(TINY.codec).eval()
    codecs.scale_layers(codec, torch.randn(2, 1, 20 * TINY.codec.hop))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    audio = torch.randn(2, 12 * TINY.codec.hop)
    with torch.no_grad():
        latent = codec.encoder(audio[:, None])
        torch.testing.assert_close(fast.through_codec(codec.encoder.layers, audio[:, None]), latent)
        made = fast.through_codec(codec.decoder.layers, latent)
        torch.testing.assert_close(made, codec.decoder(latent))
        assert torch.equal(fast.to_codes(codec, audio), codecs.to_codes(codec, audio))
        for stereo in (False, True):
            model = make_model(codec.config, 100, TINY.decoder, stereo=stereo).eval()
            for weight in model.text_encoder.parameters():
                weight.normal_(0, 0.3)
            inputs = torch.randint(0, 64, (3, 8 if stereo else 4, 40))
            tokens, mask = torch.randint(2, 90, (3, 7)), torch.ones(3, 7)
            mask[1, 4:] = 0
            words = model.text_encoder(input_ids=tokens, attention_mask=mask)[0]
            ours = fast.text_states(model.text_encoder, tokens, mask)
            torch.testing.assert_close(ours * mask[..., None], words * mask[..., None])
            mask[0] = 0  # the null condition
            pairs = zip(
                fast.code_logits(model, inputs, words, mask, 36),
                code_logits(model, inputs, words, mask, 36),
                strict=True,
            )
            for fast_one, stock in pairs:
                torch.testing.assert_close(fast_one, stock, atol=1e-4, rtol=1e-4)


def test_mel_filters_are_librosas():
    ours, theirs = mel_bank(32_000, 1024, 80), librosa.filters.mel(
        sr=32_000, n_fft=1024, n_mels=80, fmin=20, fmax=16_000
    )  # fmt: skip
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-7)


def test_packed_weights_come_back_in_small_files(tmp_path: Path):
    state = {"matrix": torch.randn(64, 128) * 0.05, "scale": torch.randn(64)}
    folder, work = tmp_path / "kept", tmp_path / "work"
    folder.mkdir(), work.mkdir()
    with_small_files = pytest.MonkeyPatch()
    with_small_files.setattr(pack, "LARGEST_FILE", 4096)
    size = pack.write(state, folder, "mono", work)
    with_small_files.undo()
    assert size < 64 * 128 * 1.3 and len(list(folder.iterdir())) > 1
    back = pack.read(folder, "mono")
    assert set(back) == set(state)
    assert (back["matrix"] - state["matrix"]).norm() < 0.01 * state["matrix"].norm()
    torch.testing.assert_close(back["scale"], state["scale"], atol=1e-3, rtol=1e-3)


def test_a_gpu_recipe_goes_on_from_what_it_kept(tmp_path: Path):
    common = ["--out", str(tmp_path), "--preset", "tiny", "--device", "cpu", "--budget-s"]
    main(["render", *common, "0.1", "--workers", "1", "--clips", "32", "--soundfont", "sines"])
    kept = tmp_path / "first", tmp_path / "second"
    main(["all", *common, "1", "--keep", str(kept[0])])
    main(["all", *common, "1", "--keep", str(kept[1]), "--resume", str(kept[0])])
    for folder in kept:
        stages = {json.loads(line)["stage"] for line in (folder / "log.jsonl").open()}
        assert {"loaded", "encoded", "mono held out", "stereo held out"} <= stages
        assert len(list(folder.iterdir())) == 4  # three files of weights and the log
    codec, again = (pack.read(folder, "codec") for folder in kept)
    assert all(torch.equal(codec[name], again[name]) for name in codec)  # codes stay what they were
    mono, later = (pack.read(folder, "mono") for folder in kept)
    assert not torch.equal(mono["enc_to_dec_proj.weight"], later["enc_to_dec_proj.weight"])
    longer = ["--resume", str(kept[1]), "--codec", str(tmp_path / "codec" / "codec.pt")]
    main(["codec", *common[:6], *longer[:2], "--steps", "1", "--batch", "1", "--spectral-only"])
    for stereo, codec in (([], longer), (["--stereo"], longer[:2])):
        main(["assemble", *common[:4], *stereo, *codec])
    for name, channels in (("checkpoint", 1), ("checkpoint-stereo", 2)):
        model = MusicgenForConditionalGeneration.from_pretrained(tmp_path / name)
        assert model.config.decoder.audio_channels == channels
        state = model.state_dict()
        for key in ("text_encoder.shared.weight", "text_encoder.encoder.final_layer_norm.weight"):
            torch.testing.assert_close(state[key].float(), later[key], atol=1e-2, rtol=1e-2)


def test_a_gpu_recipe_needs_only_what_a_rented_machine_has():
    """torch, transformers and scientific Python; no audio library, no page. Of the app, what comes
    with the checkout and needs torch alone.
    """
    there = {"torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers", "__future__"}
    there |= set(sys.stdlib_module_names)
    todo, seen = ["card", "card_codec", "card_lm", "songs", "pack", "fast", "assemble"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        path = Path(__file__).parents[2] / "training" / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for found in names:
                top, _, own = found.partition(".")
                if found == "musicgen_ui.engine.delay_pattern":
                    continue
                if top == "training":
                    todo += [part for part in [own or "__init__"] if part not in seen]
                else:
                    assert top in there, f"training/{name}.py imports {found}"


def test_windows_go_on_by_the_last_loop():
    codes = np.arange(400, dtype=np.int16)[None]
    material = Dataset([codes], lambda clip, rng: "", [100], [0], 0)
    window = material.window(0, 700, 50)[0]
    end = 400 - CUT_FRAMES
    assert (window[: end - 50] == np.arange(50, end)).all()
    assert (window[end - 50 :] == window[end - 150 : -100]).all()


def test_half_of_the_batches_are_openings_of_many_clips(tmp_path: Path):
    size = replace(TINY.decoder, long_windows=())
    clips = [np.arange(400, dtype=np.int16)[None] % 64 for _ in range(20)]
    material = Dataset(clips, lambda clip, rng: "", [100] * 20, [0] * 20, 2)
    model = make_model(codecs.make_codec(TINY.codec).config, len(make_tokenizer()), size)
    trainer = Trainer(model, make_tokenizer(), material, size, Run(tmp_path, 1))
    shapes = [trainer.batch()[0] for _ in range(60)]
    short = [codes for codes in shapes if codes.shape[2] < size.window]
    assert 15 < len(short) < 45
    for codes in shapes:
        assert codes.shape[0] * codes.shape[2] == size.batch * size.window  # as much work a batch
    assert all((codes[:, 0, 0] == 0).all() for codes in short)
    assert any((codes[:, 0, 0] > 0).any() for codes in shapes if codes.shape[2] == size.window)


def test_the_set_has_a_song_at_several_tempi(made: Path):
    metas = load_metas(made / "data")
    for slow, faster in zip(metas[:12], metas[12:24], strict=True):
        assert (slow.seed, slow.style, slow.key) == (faster.seed, faster.style, faster.key)
        assert slow.bpm < faster.bpm


def test_stages_make_checkpoints_that_transformers_loads(made: Path):
    for name, channels in (("checkpoint", 1), ("checkpoint-stereo", 2)):
        model = MusicgenForConditionalGeneration.from_pretrained(made / name, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(made / name)
        assert model.generation_config.do_sample
        assert model.config.decoder.audio_channels == channels
        inputs = processor(text=["fast techno"], return_tensors="pt")
        audio = model.generate(**inputs, max_new_tokens=23)
        assert audio.shape == (1, channels, 20 * TINY.codec.hop)
        assert torch.isfinite(audio).all()
    for stage in ("lm", "lm_stereo"):
        losses = [json.loads(line) for line in (made / stage / "log.jsonl").open()]
        assert losses[-1]["kind"] == "held out"
        assert len(losses[-1]["losses"]) == (8 if "stereo" in stage else 4)


def test_stereo_starts_from_mono_and_codes_of_one_side_differ_from_the_other(made: Path):
    mono = torch.load(made / "lm" / "best.pt", weights_only=True)["model"]
    wide = widen_to_stereo(mono)
    model = build(TINY, stereo=True)
    assert set(wide) == {k for k in model.state_dict() if not k.startswith("audio_encoder.")}
    codes = np.stack(composed(made / "data", stereo=True).codes)
    assert codes.shape[1] == 8
    assert (codes[:, ::2] != codes[:, 1::2]).any()


def test_training_goes_on_where_it_was_left(made: Path, tmp_path: Path):
    folder = tmp_path / "again"
    shutil.copytree(made, folder)
    common = ["--out", str(folder), "--preset", "tiny", "--device", "cpu"]
    main(["lm", *common, "--steps", "6"])
    steps = torch.load(folder / "lm" / "state.pt", weights_only=True)["step"]
    assert steps == 6
    kept = ["--codec", str(made / "codec/codec.pt")]
    main(["codec", *common, "--decoder-only", "--steps", "2", *kept])
    before = torch.load(made / "codec/codec.pt", weights_only=True)
    after = torch.load(folder / "codec_decoder/codec.pt", weights_only=True)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}  # the codes stay
    shutil.rmtree(folder / "codec")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CodecTrainer, "update", lambda trainer: sys.exit(143))  # told to stop
        main(["codec", *common])
    assert (folder / "codec" / "codec_state.pt").exists()


def test_evaluate_prints_its_table(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluated, "SECONDS", 2.0)
    main([
        "evaluate", "--out", str(made), "--preset", "tiny", "--parts", "codec",
        "--soundfont", "sines", "--judge-clips", "2",
    ])  # fmt: skip
    table = json.loads((made / "checkpoint.json").read_text())
    assert table["judge on held-out rendered clips (ceiling)"] > 0.5
    assert "log-mel distance, dB" in capsys.readouterr().out


def test_pictures_are_sheets_of_a_take_a_style(made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "SECONDS", 1.0)
    main(["pictures", "--out", str(made), "--preset", "tiny", "--parts", "drums,flute,jazz"])
    with Image.open(made / "takes.png") as sheet:
        drawn = np.asarray(sheet.convert("L"))
    halves = [half for row in np.array_split(drawn, 2) for half in np.array_split(row, 2, axis=1)]
    inked = [float((half < 250).mean()) for half in halves]
    assert min(inked[:3]) > 0.5 and inked[3] == 0  # three spectrograms on four places
