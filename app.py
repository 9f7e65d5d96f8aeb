"""The entry for people and for Spaces: `python app.py`."""

import contextlib

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  (ZeroGPU wants to be imported before torch)

if __name__ == "__main__":
    from musicgen_ui.ui.server import main

    raise SystemExit(main())
