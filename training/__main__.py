"""The recipe's commands: `python -m training all --out runs/first` rebuilds everything."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.presets import PRESETS, Preset
from training.render import find_soundfont


@dataclass(frozen=True)
class Job:
    """One invocation: where its files are and how much may be spent."""

    out: Path
    preset: Preset
    args: argparse.Namespace

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def codec(self) -> Path:
        return self.args.codec or self.out / "codec" / "codec.pt"

    @property
    def lm(self) -> Path:
        return self.out / ("lm_stereo" if self.args.stereo else "lm")


def do_render(job: Job) -> None:
    from training.render import render

    args, size = job.args, job.preset
    if args.budget_s:
        _render_for_a_while(job)
        return
    clips = args.clips or size.clips
    render(
        job.data,
        clips,
        size.seconds,
        size.codec.sampling_rate,
        args.soundfont,
        size.keys,
        workers=args.workers,
    )


def _render_for_a_while(job: Job) -> None:
    from training.songs import SONG_SEED, SongJob, render_songs

    args, size = job.args, job.preset
    songs = SongJob(
        job.data,
        size.seconds,
        size.codec.sampling_rate,
        args.soundfont,
        args.clips or size.clips,
        time.time() + args.budget_s,
        SONG_SEED + args.seed * 10_000_000,
    )
    print(f"{render_songs(songs, args.workers)} songs", flush=True)


def do_codec(job: Job) -> None:
    from training.render import load_audio, load_metas
    from training.train_codec import SOFT_STYLES, CodecTrainer

    args, size = job.args, job.preset.codec
    out = job.out / ("codec_decoder" if args.decoder_only else "codec")
    if (out / "codec.pt").exists():
        print(f"{out / 'codec.pt'} exists: kept")
        return
    audio, metas = load_audio(job.data), load_metas(job.data)
    places = [(part, clip) for part, clips in enumerate(audio) for clip in range(len(clips))]
    soft = [at for at, meta in zip(places, metas, strict=True) if meta.style in SOFT_STYLES]
    size = replace(
        size,
        batch=args.batch or size.batch,
        discriminator=size.discriminator and not args.spectral_only,
    )
    CodecTrainer(
        size,
        audio,
        out,
        args.steps or size.steps,
        args.minutes,
        decoder_only=args.decoder_only,
        device=args.device,
        soft=soft,
        init=args.codec or (args.resume and _kept_codec(args.resume, out / "kept.pt")),
    ).train()


def _kept_codec(folder: Path, path: Path) -> Path:
    """The codec of a run with a budget as the file that the other stages read."""
    from training.card_codec import kept_codec

    state = kept_codec(folder)
    if not state:
        raise SystemExit(f"{folder} has no codec: name what a run with a budget kept.")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def do_encode(job: Job) -> None:
    from training.codec import load_codec
    from training.encode import encode

    codec = load_codec(job.codec, job.preset.codec)
    encode(job.data, codec, stereo=job.args.stereo, device=job.args.device)


def do_lm(job: Job) -> None:
    from training.assemble import build, load_trained
    from training.dataset import composed
    from training.lm import widen_to_stereo
    from training.tokenizer import make_tokenizer
    from training.train_lm import Run, Trainer

    args = job.args
    model = build(job.preset, stereo=args.stereo, codec=job.codec)
    if args.init:
        load_trained(model, args.init)
    elif args.stereo and (job.out / "lm" / "best.pt").exists():
        mono = torch.load(job.out / "lm" / "best.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(widen_to_stereo(mono["model"]), strict=False)
    run = Run(
        job.lm,
        args.steps or job.preset.decoder.steps,
        args.minutes,
        train_text=not args.stereo,
        device=args.device,
    )
    material = composed(job.data, stereo=args.stereo)
    Trainer(model, make_tokenizer(), material, job.preset.decoder, run).train()


def do_transfer(job: Job) -> None:
    """The decoder that a run with a budget kept, for the codes of `--codec`: lm starts from it."""
    import numpy as np

    from training import pack, transfer
    from training.codec import load_codec

    args, size = job.args, job.preset
    if not args.resume:
        raise SystemExit("transfer needs --resume: what a run with a budget kept.")
    old = load_codec(_kept_codec(args.resume, job.out / "kept.pt"), PRESETS["card"].codec)
    new = load_codec(job.codec, size.codec)
    songs = transfer.encoded_by_both(old, new, args.soundfont, args.clips or 400, size.seconds)
    codes = [np.concatenate(side, axis=1) for side in zip(*songs, strict=True)]
    places = transfer.matched(*codes, old.config.codebook_size, new.config.codebook_size)
    path = job.out / "transferred.pt"
    torch.save({"model": transfer.moved(pack.read(args.resume, "mono"), places)}, path)
    print(f"wrote {path}")


def do_assemble(job: Job) -> None:
    from training.assemble import assemble, build

    if job.args.resume:
        _assemble_kept(job)
        return
    weights = job.args.init or job.lm / "best.pt"
    model = build(job.preset, stereo=job.args.stereo, weights=weights, codec=job.codec)
    name = "checkpoint-stereo" if job.args.stereo else "checkpoint"
    print(f"wrote {assemble(model, job.preset, job.out / name)}")


def _assemble_kept(job: Job) -> None:
    from training import pack
    from training.assemble import assemble, build_kept
    from training.card_codec import kept_codec
    from training.codec import load_codec

    args = job.args
    weights = pack.read(args.resume, "mono")
    if args.stereo:  # which has the mono one's text encoder
        text = {name: value for name, value in weights.items() if name.startswith("text_encoder.")}
        weights = text | pack.read(args.resume, "stereo")
    codec = kept_codec(args.resume)
    if args.codec:
        codec = load_codec(args.codec, job.preset.codec).state_dict()
    model = build_kept(job.preset, codec, weights)
    folder = "checkpoint-stereo" if args.stereo else "checkpoint"
    print(f"wrote {assemble(model, job.preset, job.out / folder)}")


def do_evaluate(job: Job) -> None:
    from training.evaluate import PARTS, evaluate

    args = job.args
    name = "checkpoint-stereo" if args.stereo else "checkpoint"
    parts = args.parts.split(",") if args.parts else list(PARTS)
    evaluate(
        args.checkpoint or job.out / name,
        args.soundfont,
        parts,
        args.per_style,
        args.judge_clips,
        job.out / f"{name}.json",
    )


def do_pictures(job: Job) -> None:
    from training.pictures import sheet
    from training.styles import STYLES

    args = job.args
    name = "checkpoint-stereo" if args.stereo else "checkpoint"
    styles = args.parts.split(",") if args.parts else list(STYLES)
    print(f"wrote {sheet(args.checkpoint or job.out / name, styles, job.out / 'takes.png')}")


def do_all(job: Job) -> None:
    """Every stage in turn, mono then stereo; finished stages are skipped or resumed. With a budget
    in seconds: as in card.py, from songs that are rendered already."""
    if job.args.budget_s:
        from training.card import run
        from training.card_plan import Plan

        args = job.args
        keep = args.keep or job.out / "keep"
        run(
            Plan(
                job.data,
                job.out,
                keep,
                job.preset,
                args.budget_s,
                args.device,
                args.resume,
                stereo=not args.mono_only,
                seed=args.seed,
            )
        )
        return
    for stage in (do_render, do_codec):
        stage(job)
    for stereo in (False, True):
        args = argparse.Namespace(**{**vars(job.args), "stereo": stereo})
        part = Job(job.out, job.preset, args)
        for stage in (do_encode, do_lm, do_assemble, do_evaluate):
            stage(part)


STAGES: dict[str, Callable[[Job], None]] = {
    "all": do_all,
    "render": do_render,
    "codec": do_codec,
    "encode": do_encode,
    "transfer": do_transfer,
    "lm": do_lm,
    "assemble": do_assemble,
    "evaluate": do_evaluate,
    "pictures": do_pictures,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--soundfont", default=find_soundfont(), help="a .sf2 file, or 'sines'")
    parser.add_argument("--clips", type=int, help="songs to render")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--minutes", type=float, help="a schedule by the clock, not by steps")
    parser.add_argument("--budget-s", type=float, help="render, all: by the clock, for a GPU")
    parser.add_argument("--keep", type=Path, help="all with a budget: folder of what is kept")
    parser.add_argument("--resume", type=Path, help="such a folder, to go on from or to assemble")
    parser.add_argument("--mono-only", action="store_true", help="all with a budget: no stereo")
    parser.add_argument("--seed", type=int, default=0, help="of songs rendered with a budget")
    parser.add_argument("--stereo", action="store_true", help="8 codebooks, left and right")
    parser.add_argument("--decoder-only", action="store_true", help="codec: keep every code")
    parser.add_argument("--spectral-only", action="store_true", help="codec: no discriminator")
    parser.add_argument("--codec", type=Path, help="codec.pt to use or to start from")
    parser.add_argument("--init", type=Path, help="decoder weights to start from or to assemble")
    parser.add_argument("--checkpoint", type=Path, help="folder for evaluate")
    parser.add_argument("--batch", type=int, help="codec: windows a step")
    parser.add_argument("--parts", help="of evaluate: codec,style,…; of pictures: styles")
    parser.add_argument("--per-style", type=int, default=8, help="evaluate: clips a style")
    parser.add_argument("--judge-clips", type=int, default=40, help="evaluate: to fit, a style")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    STAGES[args.stage](Job(args.out, PRESETS[args.preset], args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that state is kept
    main()
