"""The entry for people and for Spaces: `python app.py`."""

import os

if os.environ.get("SPACES_ZERO_GPU"):  # its package is there, and wants to be before torch
    import spaces  # noqa: F401

if __name__ == "__main__":
    from musicgen_ui.ui.server import main

    raise SystemExit(main())
