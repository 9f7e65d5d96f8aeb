"""MusicGen in a web page: music while it is being made, from words or from a clip of your own."""

import os

# For torch on Linux, which reads it when it is imported. Its threads wait for each other without
# giving way, by default for milliseconds: beside a browser that plays on the same two cores most of
# the speed is lost (musicgen-small's size in int8: 70 ms a step instead of 27). So many turns are
# some 10 us, which is enough where nobody else wants the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
