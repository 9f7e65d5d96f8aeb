"""MusicGen in a web page: music while it is being made, from words or from a clip of your own."""
