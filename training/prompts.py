"""What `evaluate` asks for: worded apart from the captions that the decoder learned from."""

PROMPTS = {
    "piano ballad": ["a romantic piano ballad", "emotional piano for a sad scene"],
    "lo-fi hip hop": ["chill lo-fi hip hop beat to study to", "lofi with mellow keys"],
    "synth pop": ["80s pop with synths and drum machine", "retro synth pop"],
    "rock": ["hard rock with electric guitar", "90s rock band with loud drums"],
    "ambient": ["calm ambient pads", "dreamy space ambient soundscape"],
    "jazz": ["smooth jazz with walking bass", "swing jazz in a jazz club"],
    "funk": ["funk with slap bass", "70s funky groove with tight drums"],
    "techno": ["techno with a hard kick", "electronic dance music for a club"],
    "orchestral": ["epic orchestral film score", "cinematic strings and brass"],
    "folk": ["acoustic folk guitar", "country song with acoustic guitar by the campfire"],
    "drums": ["drums only", "a solo drum groove"],
    "flute": ["flute melody with harp", "pastoral flute solo"],
}
FREE_PROMPTS = {
    "80s pop track with bassy drums and synth": ("synth pop",),
    "90s rock song with loud guitars and heavy drums": ("rock",),
    "lo-fi slow bpm electro chill": ("lo-fi hip hop",),
}
TEMPO_PROMPTS = {
    "rock": "rock song",
    "techno": "techno track",
    "drums": "drum beat",
    "folk": "acoustic folk",
    "funk": "funk groove",
    "jazz": "jazz tune",
    "piano ballad": "piano ballad",
    "synth pop": "synthpop track",
}
