"""The whole recipe within minutes on one GPU: `python -m training all --preset card --budget-s N`.

Songs are rendered beforehand or beside it (`render --preset card`). Every stage gets a share of
what is left of the budget and follows the clock: codec, codes, the mono decoder, then the stereo
one from its weights. What matters is written to `keep` at least once a minute, in files of at most
15 MiB; `resume` names such a folder of an earlier run, which this one goes on from: its codec is
kept as it is, so that codes stay what they were.
"""

from __future__ import annotations

import torch

from training.card_codec import CardCodec, encode_all
from training.card_lm import CardDecoder, Songs
from training.card_plan import Plan, load_clips

CODEC_SHARE, STEREO_SHARE = 0.6, 0.22  # of the time; of the decoders' time
ENCODE_SHARE = 0.12


def run(plan: Plan) -> None:
    """Every stage in its time."""
    torch.manual_seed(plan.seed)
    if plan.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 4  # of the kernels for each shape
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        plan.log("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    clips = load_clips(plan)
    codec = CardCodec(plan, clips)
    if not codec.kept:
        codec.train(CODEC_SHARE * plan.left_s)
    plan.log("codec", **codec.held_out())
    codec.save()
    codes = encode_all(plan, codec.codec, clips.audio, ENCODE_SHARE * plan.left_s, stereo=False)
    songs = Songs.of(plan, codes, clips)
    mono = CardDecoder(plan, codec.codec.config, songs, stereo=False)
    stereo_s = STEREO_SHARE * plan.left_s if plan.stereo else 0.0
    mono.train(plan.left_s - stereo_s)
    if not plan.stereo:
        return
    codes = encode_all(plan, codec.codec, clips.audio, stereo_s / 4, stereo=True)
    songs = Songs.of(plan, codes, clips)
    stereo = CardDecoder(plan, codec.codec.config, songs, stereo=True, mono=mono)
    stereo.train(plan.left_s)
