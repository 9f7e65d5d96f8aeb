"""MusicGen in a web page: music while it is being made, from words or from a clip of your own."""

import os

# For torch on Linux, which reads it when it is imported. Its threads wait for each other without
# giving way, by default for milliseconds: beside programs that kept two cores busy,
# musicgen-small's size took 70 ms a step in int8, and 27 with threads that slept at once. So many
# turns are some 10 us: where nobody else wants the cores, int8 loses nothing by them and float32 a
# fifth.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
