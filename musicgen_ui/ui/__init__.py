"""The page: what a browser and an API client see of MusicGen UI."""
