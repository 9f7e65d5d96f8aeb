"""MusicGen's own decode loop: one decoder, many jobs, audio while it is made."""
