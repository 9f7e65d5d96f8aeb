"""The bench: the same weights and work for everyone, one at a time, and figures that add up."""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
import weakref

import pytest
import torch
import transformers

from musicgen_ui.benchmark import machine, quantization_error, report, runners
from musicgen_ui.benchmark import run as bench
from musicgen_ui.checkpoints import config as configuration
from musicgen_ui.checkpoints import memory, registry
from musicgen_ui.engine import device as devices
from musicgen_ui.engine.scheduler import Scheduler
from musicgen_ui.errors import RequestError

WANTED = (
    *("name", "peer", "device", "precision", "checkpoint", "jobs", "duration_s", "steps_per_s"),
    *(
        "real_time_factor",
        "first_audio_s",
        "codec_s",
        "peak_mb",
        "cold_start_s",
        "roofline_fraction",
    ),
)


def flags_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_flags(parser)
    return parser.parse_args(["--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def tiny():
    with runners.source("random:tiny") as source:
        yield source


def test_peers_and_ours_are_measured_alike_one_at_a_time(tmp_path, monkeypatch, capsys):
    alive: weakref.WeakSet = weakref.WeakSet()
    for kind in (runners.TransformersRunner, runners.EngineRunner):

        def alone(self, *args, load=kind.__init__, **options):
            assert not alive, "the one before still holds its weights"
            load(self, *args, **options)
            alive.add(self)

        monkeypatch.setattr(kind, "__init__", alone)
    file = tmp_path / "rows.json"
    rows = bench.run(flags_of("--quick", "--json", str(file)))
    assert json.loads(file.read_text()) == rows
    who = {(row["name"], row["peer"], row["precision"], row["jobs"]) for row in rows}
    ours = {("musicgen_ui", False, p, n) for p in ("float32", "int8") for n in (1, 2)}
    peers = {("transformers", True, p, n) for p in ("float32", "bfloat16") for n in (1, 2)}
    assert who == ours | peers
    for row in rows:
        assert set(WANTED) <= set(row)
        assert all(v > 0 for v in row.values() if isinstance(v, float))
    table = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[3:]]
    cells = [[r["name"], r["checkpoint"], r["precision"], str(r["jobs"])] for r in rows]
    assert table[: len(rows)] == cells
    assert {line[0] for line in table[len(rows) :]}  # the ratios


def test_the_steps_that_are_counted_are_the_steps_that_are_run(tiny, monkeypatch):
    ours = runners.EngineRunner(tiny, devices.choose("cpu", "float32"), max_jobs=1)
    step, moved = Scheduler.step, []
    monkeypatch.setattr(Scheduler, "step", lambda batch: moved.append(step(batch)) or moved[-1])
    ours.run(1, 0.5)
    assert len(moved) == bench._steps(registry.config_of(tiny), 0.5) == 28


def test_a_step_reads_every_matrix_but_those_of_the_prompt(tiny):
    config = runners.random_config("tiny")
    lm = transformers.MusicgenForCausalLM(config.decoder)
    read = sum(
        module.weight.numel()
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    )
    assert bench._weights_read(registry.config_of(tiny)["decoder"]) == read


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_random_checkpoints_have_metas_sizes(size):
    with torch.device("meta"):
        model = transformers.MusicgenForConditionalGeneration(runners.random_config(size))
    count = sum(p.numel() for p in model.parameters())
    assert count == memory.count_parameters(configuration.meta(size, stereo=False))


def test_the_codec_is_timed_on_the_decoders_thread_alone():
    class Codec:
        def decode(self):
            time.sleep(0.02)

    codec = Codec()
    with runners._timed(codec, "decode") as spent:
        other = threading.Thread(target=codec.decode)
        other.start()
        other.join()
        assert spent == [0.0]
        codec.decode()
    told = spent[0]
    assert told >= 0.02
    codec.decode()  # no longer counted
    assert spent == [told]


def test_rounds_are_interleaved_and_figures_are_medians(monkeypatch):
    order = []

    def measured(candidate, source, settings, bandwidth):
        order.append(str(candidate))
        figure = {0: 5.0, 1: 1.0, 2: 2.0}[order.count(str(candidate)) - 1]
        yield settings[0], dict.fromkeys(("real_time_factor", "steps_per_s", "codec_s"), figure)

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr(report, "table", lambda rows: "")
    monkeypatch.setattr(report, "ratios", lambda rows: [])
    rows = bench.run(flags_of("--checkpoint", "random:tiny", "--only", "float32"))
    assert order == ["transformers float32", "musicgen_ui float32"] * 3
    assert [row["real_time_factor"] for row in rows] == [2.0, 2.0]
    assert [row["rounds"] for row in rows] == [3, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--checkpoint", "random:huge"],
        ["--precision", "int3"],
        ["--device", "abacus"],
        ["--only", "nobody"],
        ["--durations", "9999"],
        ["--jobs", "0"],
        ["--rounds", "0"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused_at_once(wrong, monkeypatch):
    monkeypatch.setattr(runners, "write_random", pytest.fail)
    with pytest.raises(RequestError):
        bench.run(flags_of(*wrong))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_counts_from_the_last_reset():
    memory = machine.Memory(devices.choose("cpu", "float32"))
    before = memory.peak_mb()
    held = bytearray(b"x") * 300_000_000
    del held
    assert memory.peak_mb() - before > 250
    memory.reset()
    assert memory.peak_mb() - before < 100


def row(name: str, precision: str, jobs: int, duration_s: float, **figures: float) -> dict:
    own = {"steps_per_s": 10.0, "real_time_factor": 1.0, "codec_s": 0.1, "first_audio_s": 0.5}
    known = {"name": name, "peer": name == "transformers", "device": "CPU (2 threads)"}
    return known | {"precision": precision, "jobs": jobs, "duration_s": duration_s} | own | figures


def test_ratios_are_of_the_rows_that_they_name():
    rows = [
        row("transformers", "float32", 1, 10, steps_per_s=4, real_time_factor=0.1, codec_s=0.3),
        row("transformers", "bfloat16", 1, 10, real_time_factor=0.4, codec_s=0.3),
        row("transformers", "float32", 1, 30, real_time_factor=0.05, codec_s=0.3),
        row("musicgen_ui", "float32", 1, 10, steps_per_s=8, real_time_factor=0.2),
        row("musicgen_ui", "int8", 1, 10, real_time_factor=1.2),
        row("musicgen_ui", "int8", 1, 30, real_time_factor=1.0),
        row("musicgen_ui", "int8", 4, 10, real_time_factor=3.0),
    ]
    told = {line[8:]: float(line[:6]) for line in report.ratios(rows)}
    assert sorted(told.values()) == [0.5, 2.0, 2.5, 3.0, 3.0, 12.0, 20.0]
    assert told["ours int8 ÷ transformers float32, 30 s, music a second"] == 20.0
    assert told["4 takes at once ÷ one, int8, 10 s, music a second"] == 2.5


def test_published_rows_are_run_as_often_as_they_can_be(monkeypatch):
    ran = []

    def measured(candidate, source, settings, bandwidth):
        ran.append((str(candidate), settings))
        for jobs, seconds in settings:
            slow = str(candidate) == "transformers float32"
            yield (jobs, seconds), {"real_time_factor": 0.05 if slow else 1.0}

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr(report, "table", lambda rows: "")
    monkeypatch.setattr(report, "ratios", lambda rows: [])
    bench.run(flags_of("--checkpoint", "random:tiny", "--published", "--rounds", "2"))
    assert ran == [
        ("transformers float32", [(1, 10), (1, 30)]),
        ("transformers bfloat16", [(1, 10)]),
        ("musicgen_ui float32", [(1, 10)]),
        ("musicgen_ui int8", [(1, 10), (4, 10), (16, 10), (1, 30)]),
        ("transformers bfloat16", [(1, 10)]),
        ("musicgen_ui float32", [(1, 10)]),
        ("musicgen_ui int8", [(1, 10), (4, 10)]),
    ]


def test_a_gpus_rows_are_measured_from_files_and_from_weights_made_there(tmp_path, monkeypatch):
    """Warmed up by the whole of what is timed, once for the rounds that follow each other; a load
    for each number of jobs."""
    monkeypatch.setattr(bench, "_on_gpu", lambda place: True)
    ran, loads = [], []
    run, load = runners.EngineRunner.run, runners.EngineRunner.__init__
    monkeypatch.setattr(
        runners.EngineRunner, "run", lambda loop, *args: ran.append(args) or run(loop, *args)
    )
    monkeypatch.setattr(
        runners.EngineRunner,
        "__init__",
        lambda loop, source, *args, **options: (
            loads.append((type(source).__name__, options["max_jobs"]))
            or load(loop, source, *args, **options)
        ),
    )
    file = tmp_path / "rows.json"
    asked = ["--published", "cuda", "--quick", "--precision", "bfloat16", "--json", str(file)]
    rows = bench.run(flags_of(*asked))
    assert json.loads(file.read_text()) == rows and len(rows) == 7
    assert [row["peer"] for row in rows].count(True) == 1
    assert all(row["roofline_fraction"] > 0 for row in rows)
    files, made = ("Source", 1), ("RandomWeights", 1)
    assert loads == [files, ("Source", 4), made, made]
    assert ["cold_start_s" in row for row in rows] == [True] * 5 + [False] * 2
    assert ran.count((4, 1.5)) == 1 and ran.count((1, 0.5)) >= 3


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_profile_names_what_a_step_runs(tmp_path, precision):
    file = tmp_path / "profile.txt"
    asked = ["--quick", "--profile", str(file), "--precision", precision]
    assert bench.run(flags_of(*asked, "--jobs", "1")) == []
    text = file.read_text()
    assert text.count("steps a second") == 2 and "aten::topk" in text
    busy = re.search(r"operations +([\d.]+) µs, (\d+) a step", text)
    assert float(busy[1]) > 0 and int(busy[2]) > 10


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_distance_of_a_precision_is_small_and_none_from_itself(precision):
    found = quantization_error.measure(registry.resolve("bundled"), precision, minute_s=2)
    assert found.kl >= 0 and found.guided_kl < quantization_error.LIMIT
    assert (found.guided_top_1 == 1) == (precision == "float32")
