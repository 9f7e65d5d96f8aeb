"""Sound in memory and on disk: clips, reading untrusted files, spectrograms."""
