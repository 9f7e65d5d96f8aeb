"""The command line: `python -m musicgen_ui serve`, `generate`, `finetune` and further commands.

Each command's flags and work are in a module of its own, imported when it is asked for: gradio for
`serve`, torch for the others, and not before a wrong request has been refused. Exit codes: 0 done,
1 failed, 2 a request that cannot be run, 130 interrupted, 141 the output's reader has gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

DONE, WRONG, INTERRUPTED = 0, 2, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Raises a RequestError."""
        from musicgen_ui.errors import RequestError

        raise RequestError(f"{message[0].upper()}{message[1:]} (see {self.prog} --help).")


@contextmanager
def interrupt_exits() -> Iterator[None]:
    """Has Ctrl+C end the process at once, for a time in which there is nothing to clean up.

    Raised in the middle of an import, KeyboardInterrupt ends in a traceback, or as another error.
    """
    standard = signal.default_int_handler
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not standard:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, standard)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    with interrupt_exits():
        from musicgen_ui.cli import console
    with console.guarded() as out:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        return out.exit_code(code)


def _run(arguments: list[str]) -> int:
    with interrupt_exits():
        from musicgen_ui import environment
        from musicgen_ui.errors import RequestError

    parser = Parser(prog="python -m musicgen_ui", description="Music from words, on this computer.")
    about = "; ".join(f"{name} {command.__doc__}" for name, command in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, help=about)
    try:
        if sys.flags.optimize > 1:
            raise RequestError(
                "PYTHONOPTIMIZE=2 and -OO take away docstrings, which transformers needs: leave "
                "them out, or use PYTHONOPTIMIZE=1."
            )
        environment.ensure_cache_folder()
        command = COMMANDS[parser.parse_args(arguments[:1]).command]
        environment.prepare_proxies()
        return command(arguments[1:])
    except RequestError as error:
        print(error, file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def serve(arguments: list[str]) -> int:
    """starts the page"""
    with interrupt_exits():  # until the server handles its signals
        from musicgen_ui.server import settings

        parser = _parser("serve", "Starts the page.")
        settings.add_flags(parser)
        chosen = settings.settings(vars(parser.parse_args(arguments)))
        from musicgen_ui.server import app

        return app.run(chosen)


def generate(arguments: list[str]) -> int:
    """makes music and saves it"""
    from musicgen_ui.cli import batch, generate

    parser = _parser("generate", "Makes music and saves it, with its settings in the file.")
    generate.add_flags(parser)
    flags = parser.parse_args(arguments)
    return batch.run(flags) if flags.batch else generate.run(flags)


def bench(arguments: list[str]) -> int:
    """measures the speed beside transformers'"""
    from musicgen_ui.benchmark import run

    parser = _parser("bench", run.__doc__ or "")
    run.add_flags(parser)
    run.run(parser.parse_args(arguments))
    return DONE


def convert(arguments: list[str]) -> int:
    """makes an audiocraft checkpoint one in transformers' format"""
    from musicgen_ui.checkpoints.audiocraft import convert

    parser = _parser("convert", "Writes an audiocraft checkpoint in transformers' format.")
    convert.add_flags(parser)
    convert.run(parser.parse_args(arguments))
    return DONE


def checkpoints(arguments: list[str]) -> int:
    """lists the published checkpoints and what fits here"""
    from musicgen_ui.cli import checkpoints as table

    parser = _parser("checkpoints", "Lists the published checkpoints and what fits here.")
    table.add_flags(parser)
    table.run(parser.parse_args(arguments))
    return DONE


def finetune(arguments: list[str]) -> int:
    """trains an adapter on music of your own"""
    from musicgen_ui.cli import finetune as training

    parser = _parser("finetune", training.__doc__ or "")
    training.add_flags(parser)
    return training.run(parser.parse_args(arguments))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve,
    "generate": generate,
    "bench": bench,
    "convert": convert,
    "checkpoints": checkpoints,
    "finetune": finetune,
}


def _parser(command: str, description: str) -> Parser:
    return Parser(
        prog=f"python -m musicgen_ui {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
