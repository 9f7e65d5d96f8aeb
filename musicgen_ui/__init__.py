"""MusicGen in a web page: music while it is being made, from words or from a clip of your own."""

import os

# For torch, which reads it when it is imported. By default the threads of an operation that have
# nothing to do keep their cores busy for those that work; beside a browser that plays on the same
# two cores this cost musicgen-small in int8 three fifths of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
