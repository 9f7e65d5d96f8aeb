"""Captions: what a person might type to get a given song, drawn from its Meta in many wordings."""

from __future__ import annotations

import random

from training.composer import PITCH_NAMES, Meta

STYLE_WORDS = {
    "piano ballad": ["piano ballad", "solo piano", "romantic piano piece", "piano music",
                     "emotional piano", "ballad"],
    "lo-fi hip hop": ["lo-fi hip hop", "lofi", "lo-fi beat", "chillhop", "hip hop beat",
                      "lofi hip-hop", "study beats", "chill hip hop", "lo-fi electro chill",
                      "lofi chill", "trip hop"],
    "synth pop": ["80s synth pop", "80s pop", "synthpop", "80s pop track", "synthwave",
                  "retro pop", "eighties pop", "electro pop", "pop", "disco pop"],
    "rock": ["rock", "90s rock", "hard rock", "rock song", "heavy metal", "punk rock", "grunge",
             "metal", "90s rock song", "alternative rock"],
    "ambient": ["ambient", "ambient pads", "atmospheric soundscape", "drone", "meditation music",
                "space ambient", "new age", "dreamy ambient"],
    "jazz": ["jazz", "smooth jazz", "swing jazz", "bebop", "jazz club music", "jazz quartet",
             "swing", "cool jazz"],
    "funk": ["funk", "funky groove", "groovy funk", "70s funk", "soul funk", "disco funk"],
    "techno": ["techno", "house", "dance", "edm", "electronic dance", "club", "trance", "rave",
               "electronic"],
    "orchestral": ["orchestral", "classical", "epic orchestra", "cinematic", "film score",
                   "symphonic", "movie soundtrack", "classical orchestra"],
    "folk": ["acoustic folk", "folk", "country", "acoustic", "singer-songwriter", "campfire",
             "bluegrass", "indie folk"],
    "drums": ["drum beat", "drum solo", "drums only", "percussion", "drum loop", "drum groove",
              "breakbeat", "only drums"],
    "flute": ["flute melody", "flute solo", "pastoral", "flute piece", "celtic flute",
              "fairy tale flute", "woodwind melody"],
}  # fmt: skip
INSTRUMENT_WORDS = {
    "piano": ["piano", "grand piano", "piano chords", "keys"],
    "strings": ["strings", "violins", "string section"],
    "cello": ["cello", "a cello"],
    "electric piano": ["electric piano", "rhodes", "mellow keys", "e-piano"],
    "bass": ["bass", "mellow bass", "bassline"],
    "soft drums": ["soft drums", "dusty drums", "laid-back drums", "chill beat"],
    "vibraphone": ["vibraphone", "vibes", "mallets"],
    "jazz guitar": ["jazz guitar", "clean guitar"],
    "synth": ["synth", "synthesizer", "synths", "analog synth"],
    "synth lead": ["synth lead", "synth melody", "lead synth"],
    "synth bass": ["synth bass", "bass synth", "pulsing bass"],
    "electronic drums": ["electronic drums", "drum machine", "bassy drums", "808 drums",
                         "gated drums"],
    "distorted guitar": ["distorted guitar", "loud guitars", "electric guitar", "power chords",
                         "guitar riff", "overdriven guitars", "guitars"],
    "bass guitar": ["bass guitar", "bass"],
    "heavy drums": ["heavy drums", "pounding drums", "loud drums", "drum kit"],
    "organ": ["organ", "hammond organ"],
    "pad": ["pads", "synth pads", "warm pads", "soft textures"],
    "choir pad": ["choir pad", "voices", "choir"],
    "bells": ["bells", "glassy bells", "chimes"],
    "saxophone": ["saxophone", "sax", "tenor sax", "sax solo"],
    "muted trumpet": ["trumpet", "muted trumpet"],
    "upright bass": ["upright bass", "walking bass", "double bass"],
    "ride cymbal": ["ride cymbal", "brushed drums", "swinging drums"],
    "slap bass": ["slap bass", "funky bass", "bass groove"],
    "clavinet": ["clavinet", "clav"],
    "funk guitar": ["wah guitar", "rhythm guitar", "muted guitar"],
    "drums": ["drums", "drum kit", "percussion", "beats", "tight drums"],
    "brass": ["brass", "horns", "brass section"],
    "kick drum": ["four on the floor kick", "kick drum", "pumping kick", "hard kick"],
    "french horn": ["french horn", "horns", "brass"],
    "trumpet": ["trumpet", "brass", "trumpets"],
    "oboe": ["oboe", "woodwinds"],
    "timpani": ["timpani", "booming drums"],
    "acoustic guitar": ["acoustic guitar", "guitar", "fingerpicked guitar", "strummed guitar"],
    "nylon guitar": ["nylon guitar", "classical guitar"],
    "harmonica": ["harmonica"],
    "fiddle": ["fiddle", "violin"],
    "flute": ["flute", "airy flute"],
    "harp": ["harp", "gentle harp"],
}  # fmt: skip
SPEED_WORDS = {
    "slow": ["slow", "slow tempo", "relaxed", "slowly", "downtempo", "laid back", "low bpm"],
    "medium": ["medium tempo", "mid-tempo", "moderate", "steady"],
    "fast": ["fast", "fast tempo", "quick", "driving", "energetic", "high tempo", "up-tempo"],
}
MOOD_WORDS = {
    "major": ["happy", "cheerful", "joyful", "uplifting", "bright", "fun", "positive"],
    "minor": ["sad", "melancholic", "dark", "gloomy", "moody", "somber", "sorrowful"],
}
LEVEL_WORDS = {
    "soft": ["quiet", "soft", "gentle", "calm"],
    "normal": [""],
    "loud": ["loud", "powerful", "intense"],
}
NO_DRUMS = ["no drums", "without drums", "no percussion", "drumless"]
NOUNS = ["track", "song", "piece", "tune", "loop", "music", "instrumental", "clip", ""]
FILLERS = [
    "for my video", "with a nice feel", "for studying", "at night", "in the rain", "for a game",
    "high quality", "in the morning", "recorded live", "for a party", "background music",
    "by the sea", "with groove", "for a movie scene", "clean mix", "royalty free", "lovely",
    "beautiful", "vintage", "modern", "summer", "winter", "i want", "please make", "create",
]  # fmt: skip


def caption(meta: Meta, rng: random.Random) -> str:
    """One wording; style, instruments, speed, mood and the rest each come and go."""

    def maybe(share: float, words: list[str]) -> str:
        return rng.choice(words) if rng.random() < share else ""

    style = rng.choice(STYLE_WORDS[meta.style])
    names = [rng.choice(INSTRUMENT_WORDS[name]) for name in meta.instruments]
    rng.shuffle(names)
    names = names[: rng.choice((1, 2, 2, 3))]
    speed = maybe(0.8, SPEED_WORDS[meta.speed])
    mood = maybe(0.5, [*MOOD_WORDS[meta.mode], f"{meta.mode} key"]) if meta.style != "drums" else ""
    level = maybe(0.6, LEVEL_WORDS[meta.dynamics])
    bpm = maybe(0.2, [f"{meta.bpm} bpm", f"at {meta.bpm} bpm"])
    key = maybe(0.08, [f"in {PITCH_NAMES[meta.key]} {meta.mode}"]) if meta.style != "drums" else ""
    drumless = "" if meta.drums else maybe(0.3, NO_DRUMS)
    change = maybe(0.3, ["with two sections", "with a change"]) if meta.change else ""
    extra = [maybe(0.15, FILLERS), bpm, key, change, drumless]
    noun = "" if style.split()[-1] in NOUNS else rng.choice(NOUNS)
    text = _wording(rng, style, noun, names, speed, mood, level, extra)
    if rng.random() < 0.15:
        text = text.capitalize()
    return text + "." if rng.random() < 0.1 else text


def _wording(
    rng: random.Random, style: str, noun: str, names: list[str], speed: str, mood: str,
    level: str, extra: list[str],
) -> str:  # fmt: skip
    """The parts put together in one of several orders."""
    played = " and ".join(names)
    kind = rng.random()
    if kind < 0.35:
        words = [speed, level, mood, style, noun, f"with {played}", *extra]
        if rng.random() < 0.5:
            words.insert(0, "a")
    elif kind < 0.55:
        parts = [word for word in (style, speed, mood, level, *names, *extra) if word]
        rng.shuffle(parts)
        return ", ".join(parts)
    elif kind < 0.67:
        words = [mood, speed, style, noun, extra[-1]]
    elif kind < 0.75:
        words = [mood, speed, played, extra[-1]]
    elif kind < 0.83:
        words = [speed if rng.random() < 0.5 else "", style]
    elif kind < 0.92:
        words = [style, noun, "featuring", ", ".join(names), *extra, speed]
    else:
        opening = rng.choice(("play", "some", "this is", "make"))
        words = [opening, mood, style, "with", played, speed]
    return " ".join(" ".join(words).split())
