"""ZeroGPU on this computer: the real `spaces` with its forked workers, a device API that lends
nothing, and weights that "move" where they are. Run by test_zero.py in a process of its own, since
`spaces` patches torch and Gradio: `python tests/helpers/zerogpu.py CHECKPOINT`, prints JSON.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]


class DeviceApi(http.server.BaseHTTPRequestHandler):
    """What `spaces` asks before, during and after a call."""

    calls: ClassVar[list[tuple[str, dict[str, str]]]] = []
    idle = False  # the worker before may be used again
    refuse = False  # the visitor's quota is used up
    kill = False  # the worker dies while it starts

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        self.calls.append((path, asked))
        status, answer = 200, {}
        if path == "/schedule":
            answer = {"idle": self.idle, "nvidiaIndex": 0, "nvidiaUUID": "u", "allowToken": "t"}
            if self.refuse:
                status, answer = 429, {"left": 3, "wait": 3600}
        elif path == "/allow" and self.kill:
            os.kill(int(asked["pid"]), signal.SIGKILL)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def set_to(**values: bool) -> Iterator[None]:
    for name, value in values.items():
        setattr(DeviceApi, name, value)
    try:
        yield
    finally:
        for name in values:
            setattr(DeviceApi, name, False)


def zero_gpu() -> Callable[[], int]:
    """Imports `spaces` as on ZeroGPU; the worker's CUDA is left out. Returns what packs weights."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DeviceApi)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_port}",
    }
    import torch

    if not hasattr(torch._C, "_cuda_init"):  # torch without CUDA
        torch._C._cuda_init = lambda: None  # type: ignore[attr-defined]
        torch.version.cuda = "12.8"
        torch.cuda._is_in_bad_fork = bool  # False, and can be pickled
    import spaces.zero.torch as patched
    from spaces.zero.torch.patching import tensor_packs

    def move(callback: Any = None) -> None:
        for pack in tensor_packs:
            packed, at = Path(pack.path()).read_bytes(), 0
            for tensor, size, aligned_size in itertools.chain(*pack.batches, pack.big_tensors):
                read = torch.frombuffer(bytearray(packed[at : at + size]), dtype=torch.uint8)
                at += aligned_size
                empty = torch.empty(0, dtype=tensor.dtype)
                storage = read.untyped_storage()
                for fake in pack.fakes[tensor]:
                    fake.data = empty.set_(storage, 0, tensor.shape, tensor.stride())

    patched.init = lambda uuid: None
    patched.move = move
    return patched.pack


def main(checkpoint: str) -> dict[str, Any]:
    pack = zero_gpu()
    import multiprocessing

    import numpy as np

    from musicgen_ui.audio.clip import Clip
    from musicgen_ui.backends import zerogpu, zerogpu_worker
    from musicgen_ui.engine.protocol import Chunk, Failed, Finished
    from musicgen_ui.errors import RequestError
    from musicgen_ui.request import GenerationRequest

    whole_load = zerogpu._loaded

    def loaded(source: Any, device: str) -> Any:
        if source.name != checkpoint:
            raise RequestError("The bundled ones take too long here.")
        return whole_load(source, device)

    zerogpu._loaded = loaded
    engine = zerogpu.ZeroBackend(checkpoint)
    device = zerogpu.MODELS[checkpoint].model.device
    # What the launch of a page does: the weights leave the memory.
    told: dict[str, Any] = {"device": str(device), "packed_bytes": pack()}

    def plain(finished: Finished) -> dict[str, Any]:
        return {
            "variation": finished.variation,
            "samples": finished.clip.samples.ravel().tolist(),
            "seed": finished.request.seed,
            "checkpoint": finished.request.checkpoint,
            "prompt_s": finished.prompt_s,
            "stopped": finished.stopped,
            "notes": finished.notes,
        }

    def run(request: GenerationRequest, at_first_chunk: Any = None) -> dict[str, Any]:
        def collect() -> dict[str, Any]:
            kinds, takes, heard = [], [], {}
            job = engine.submit(request)
            for event in job.follow():
                kinds.append(type(event).__name__)
                if isinstance(event, Failed):
                    return {"error": str(event.error), "kinds": kinds}
                if isinstance(event, Finished):
                    takes.append(plain(event))
                if isinstance(event, Chunk):
                    before = heard.setdefault(event.variation, [])
                    before.extend(event.clip.samples.ravel().tolist())
                    if at_first_chunk and kinds.count("Chunk") == 1:
                        at_first_chunk(job)
            return {"kinds": kinds, "takes": takes, "heard": heard}

        before = len(DeviceApi.calls)
        result = collect()
        until = time.monotonic() + 20
        while any(t.name == "zero-call" for t in threading.enumerate()):
            assert time.monotonic() < until, "a call did not end"
            time.sleep(0.01)
        return result | {
            "calls": DeviceApi.calls[before:],
            "files": list(map(str, engine._folder.iterdir())),
        }

    def kill(_: Any) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    clip = Clip(np.sin(np.arange(32_000) / 30, dtype=np.float32)[None] * 0.3, 32_000)
    short = GenerationRequest(
        prompt="waltz", duration_s=1, seed=7, variations=2, checkpoint=checkpoint, audio_prompt=clip
    )
    long = GenerationRequest(duration_s=30, seed=3, checkpoint=checkpoint)
    told["whole"] = run(short)
    told["stopped"] = run(long, lambda job: job.stop())
    told["killed"] = run(long, kill)
    with set_to(kill=True):
        told["killed early"] = run(long)
    with set_to(refuse=True):
        told["refused"] = run(long)
    told["alone"] = run(GenerationRequest(duration_s=1, checkpoint=checkpoint))
    with set_to(idle=True):
        told["again"] = run(short)
    whole = zerogpu_worker._events

    def fails(*_: Any) -> Iterator[Any]:
        raise RequestError("The memory of this machine is full.")
        yield

    def breaks(*_: Any) -> Iterator[Any]:
        raise ZeroDivisionError("a secret of the server")
        yield

    zerogpu_worker._events = fails
    told["mended"] = run(long)
    zerogpu_worker._events = breaks
    told["broken"] = run(long)
    zerogpu_worker._events = whole
    kill(None)  # they would wait for more, and hold on to our output
    return told


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    result = main(sys.argv[1])
    json.dump(result, out)
    out.flush()
    os._exit(0)  # no waiting for what spaces leaves behind
