"""The entry for people and for Spaces: `python app.py`, as `python -m musicgen_ui serve`."""

import os
import sys

if os.environ.get("SPACES_ZERO_GPU"):  # its package is there, and wants to be before torch
    import spaces  # noqa: F401

if __name__ == "__main__":
    from musicgen_ui.__main__ import main

    raise SystemExit(main(["serve", *sys.argv[1:]]))
