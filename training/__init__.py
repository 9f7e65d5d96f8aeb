"""The recipe that made the bundled checkpoints: compose, render, codec, codes, decoder, figures."""
