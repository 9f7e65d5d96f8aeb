"""Captions: what a person might type to get a given song, drawn from its Meta in many wordings."""

from __future__ import annotations

import random

from training.composer import PITCH_NAMES, Meta

TYPOS = 0.08  # share of the captions trained on that have misspelt words

STYLE_WORDS = {
    "piano ballad": [
        "piano ballad",
        "solo piano",
        "romantic piano piece",
        "piano music",
        "emotional piano",
        "ballad",
    ],
    "lo-fi hip hop": [
        "lo-fi hip hop",
        "lofi",
        "lo-fi beat",
        "chillhop",
        "hip hop beat",
        "lofi hip-hop",
        "study beats",
        "chill hip hop",
        "lo-fi electro chill",
        "lofi chill",
        "trip hop",
    ],
    "synth pop": [
        "80s synth pop",
        "80s pop",
        "synthpop",
        "80s pop track",
        "synthwave",
        "retro pop",
        "eighties pop",
        "electro pop",
        "pop",
        "disco pop",
    ],
    "rock": [
        "rock",
        "90s rock",
        "hard rock",
        "rock song",
        "heavy metal",
        "punk rock",
        "grunge",
        "metal",
        "90s rock song",
        "alternative rock",
    ],
    "ambient": [
        "ambient",
        "ambient pads",
        "atmospheric soundscape",
        "drone",
        "meditation music",
        "space ambient",
        "new age",
        "dreamy ambient",
    ],
    "jazz": [
        "jazz",
        "smooth jazz",
        "swing jazz",
        "bebop",
        "jazz club music",
        "jazz quartet",
        "swing",
        "cool jazz",
    ],
    "funk": ["funk", "funky groove", "groovy funk", "70s funk", "soul funk", "disco funk"],
    "techno": [
        "techno",
        "house",
        "dance",
        "edm",
        "electronic dance",
        "club",
        "trance",
        "rave",
        "electronic",
    ],
    "orchestral": [
        "orchestral",
        "classical",
        "epic orchestra",
        "cinematic",
        "film score",
        "symphonic",
        "movie soundtrack",
        "classical orchestra",
    ],
    "folk": [
        "acoustic folk",
        "folk",
        "country",
        "acoustic",
        "singer-songwriter",
        "campfire",
        "bluegrass",
        "indie folk",
    ],
    "drums": [
        "drum beat",
        "drum solo",
        "drums only",
        "percussion",
        "drum loop",
        "drum groove",
        "breakbeat",
        "only drums",
    ],
    "flute": [
        "flute melody",
        "flute solo",
        "pastoral",
        "flute piece",
        "celtic flute",
        "fairy tale flute",
        "woodwind melody",
    ],
    "reggae": ["reggae", "dub", "ska", "reggae groove", "roots reggae", "dancehall", "jamaican"],
    "blues": [
        "blues",
        "slow blues",
        "delta blues",
        "blues shuffle",
        "rhythm and blues",
        "chicago blues",
        "bluesy",
    ],
    "bossa nova": [
        "bossa nova",
        "samba",
        "latin",
        "latin jazz",
        "brazilian",
        "salsa",
        "tropical",
        "bossa",
    ],
    "chiptune": [
        "chiptune",
        "8-bit",
        "video game music",
        "retro game",
        "8 bit game",
        "arcade",
        "nes",
        "pixel game",
    ],
    "music box": ["music box", "lullaby", "nursery rhyme", "lullabies", "baby music", "toy piano"],
    "trap": ["trap", "trap beat", "rap beat", "hip-hop trap", "drill beat", "rap", "dark trap"],
    "solo": ["solo", "unaccompanied", "alone", "by itself", "solo performance", "solo recital"],
}
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
    "electronic drums": [
        "electronic drums",
        "drum machine",
        "bassy drums",
        "808 drums",
        "gated drums",
    ],
    "distorted guitar": [
        "distorted guitar",
        "loud guitars",
        "electric guitar",
        "power chords",
        "guitar riff",
        "overdriven guitars",
        "guitars",
    ],
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
    "muted guitar": ["muted guitar", "skank guitar", "guitar"],
    "clean guitar": ["clean guitar", "electric guitar", "guitar"],
    "electric guitar": ["electric guitar", "lead guitar", "guitar", "guitar solo"],
    "chip synth": ["square wave", "bleeps", "8-bit synth", "chip synth"],
    "music box": ["music box", "musical box"],
    "celesta": ["celesta", "glockenspiel"],
    "violin": ["violin", "fiddle"],
    "church organ": ["church organ", "pipe organ", "organ"],
    "clarinet": ["clarinet", "woodwind"],
    "marimba": ["marimba", "xylophone", "mallets"],
    "accordion": ["accordion", "squeezebox"],
    "harp": ["harp", "gentle harp"],
}
SPEED_WORDS = {
    "slow": [
        "slow",
        "slow tempo",
        "relaxed",
        "slowly",
        "downtempo",
        "laid back",
        "low bpm",
        "very slow",
        "lazy",
        "unhurried",
        "leisurely",
        "calm pace",
        "adagio",
        "largo",
    ],
    "medium": [
        "medium tempo",
        "mid-tempo",
        "moderate",
        "steady",
        "walking pace",
        "andante",
        "medium speed",
        "moderate tempo",
    ],
    "fast": [
        "fast",
        "fast tempo",
        "quick",
        "driving",
        "energetic",
        "high tempo",
        "up-tempo",
        "upbeat",
        "very fast",
        "rapid",
        "speedy",
        "high energy",
        "high bpm",
        "allegro",
        "presto",
        "frantic",
        "lively",
    ],
}
MOOD_WORDS = {
    "major": [
        "happy",
        "cheerful",
        "joyful",
        "uplifting",
        "bright",
        "fun",
        "positive",
        "sunny",
        "hopeful",
        "feel-good",
        "playful",
        "optimistic",
        "sweet",
        "triumphant",
        "carefree",
    ],
    "minor": [
        "sad",
        "melancholic",
        "dark",
        "gloomy",
        "moody",
        "somber",
        "sorrowful",
        "tense",
        "mysterious",
        "lonely",
        "spooky",
        "nostalgic",
        "haunting",
        "brooding",
        "tragic",
    ],
}
SCENES = {
    "piano ballad": [
        "a wedding",
        "a love scene",
        "a broken heart",
        "a farewell",
        "candlelight",
        "a rainy window",
        "crying alone",
        "a goodbye letter",
    ],
    "lo-fi hip hop": [
        "studying",
        "homework",
        "a coffee shop",
        "a rainy day",
        "late night coding",
        "a cozy bedroom",
        "chilling at home",
        "reading a book",
    ],
    "synth pop": [
        "a neon city",
        "an 80s movie",
        "a retro arcade",
        "driving at night",
        "roller skating",
        "a miami sunset",
        "a cassette tape",
        "cyberpunk streets",
    ],
    "rock": [
        "a stadium",
        "a motorcycle ride",
        "a garage band",
        "a wrestling entrance",
        "headbanging",
        "a car chase",
        "an angry teenager",
        "a skate park",
    ],
    "ambient": [
        "meditation",
        "yoga",
        "sleep",
        "outer space",
        "deep ocean",
        "floating in the clouds",
        "a spa",
        "the northern lights",
        "a frozen planet",
    ],
    "jazz": [
        "a smoky bar",
        "a dinner party",
        "a new york night",
        "a film noir detective",
        "cocktails",
        "a 1950s lounge",
        "a hotel lobby",
    ],
    "funk": [
        "a dance floor in the 70s",
        "a block party",
        "a cop show",
        "strutting down the street",
        "a soul train",
        "bell bottoms",
    ],
    "techno": [
        "a nightclub",
        "the gym",
        "a workout",
        "a berlin warehouse",
        "a rave",
        "a dance floor",
        "running",
        "a festival dj set",
    ],
    "orchestral": [
        "a battle",
        "a movie trailer",
        "a fantasy kingdom",
        "a hero",
        "dragons",
        "a king's coronation",
        "a pirate adventure",
        "a victory",
        "a royal ceremony",
    ],
    "folk": [
        "a campfire",
        "a road trip",
        "a cowboy",
        "a barn dance",
        "a cabin in the woods",
        "a porch swing",
        "hiking in the mountains",
        "a farm",
    ],
    "drums": [
        "a drummer practicing",
        "a drum circle",
        "a beat to rap over",
        "a drummer",
        "a practice track for guitarists",
    ],
    "flute": [
        "a fairy tale",
        "a meadow",
        "shepherds",
        "a spring morning",
        "elves in a forest",
        "birds in a garden",
        "a magic forest",
    ],
    "reggae": ["a beach in jamaica", "an island holiday", "a beach bar", "palm trees"],
    "blues": ["a mississippi porch", "a lonely highway", "a whiskey bar", "a broken down truck"],
    "bossa nova": ["ipanema beach", "a tropical cocktail", "a cafe in rio", "a summer terrace"],
    "chiptune": [
        "a platform game",
        "an old game console",
        "a pixel adventure",
        "a boss fight in a game",
    ],
    "music box": ["a sleeping baby", "a ballerina toy", "a nursery", "bedtime"],
    "trap": ["a rapper", "a street in atlanta", "a gangster movie", "freestyle rap"],
    "solo": ["a recital", "an audition", "a street musician", "a quiet room"],
}
LEVEL_WORDS = {
    "soft": ["quiet", "soft", "gentle", "calm"],
    "normal": [""],
    "loud": ["loud", "powerful", "intense"],
}
NO_DRUMS = ["no drums", "without drums", "no percussion", "drumless", "no beat"]
NO_VOICE = ["no vocals", "instrumental", "without vocals", "no singing", "no voice"]
ALONE = ["nothing else", "no other instruments", "on its own", "alone", "by itself", "only"]
ABSENT = {  # what may be said to be missing: the words that name its kind in instruments' names
    "guitar": ("guitar",),
    "piano": ("piano",),
    "bass": ("bass",),
    "synth": ("synth", "pad"),
    "strings": ("strings", "violin", "cello", "fiddle"),
    "brass": ("brass", "trumpet", "horn"),
}
NOUNS = ["track", "song", "piece", "tune", "loop", "music", "instrumental", "clip", ""]
FILLERS = [
    "for my video",
    "with a nice feel",
    "for studying",
    "at night",
    "in the rain",
    "for a game",
    "high quality",
    "in the morning",
    "recorded live",
    "for a party",
    "background music",
    "by the sea",
    "with groove",
    "for a movie scene",
    "clean mix",
    "royalty free",
    "lovely",
    "beautiful",
    "vintage",
    "modern",
    "summer",
    "winter",
    "i want",
    "please make",
    "create",
    "something like",
    "for my podcast",
    "for youtube",
    "thanks",
    "best quality",
    "stereo",
    "hi-fi",
    "professional",
    "catchy",
    "simple",
    "short",
    "that makes me smile",
    "for my friend",
    "with a good melody",
    "can you make",
    "generate",
    "i would like",
    "a really good",
    "nice",
    "cool",
    "great",
    "very nice",
    "for an advert",
    "for a shop",
    "intro",
    "for dancing",
]
OPENINGS = [
    "play",
    "some",
    "this is",
    "make",
    "give me",
    "i need",
    "please play",
    "compose",
    "write",
    "i want to hear",
    "how about",
    "let us hear",
]
FLATS = ("c", "db", "d", "eb", "e", "f", "gb", "g", "ab", "a", "bb", "b")
SHARPS = ("c", "c#", "d", "d#", "e", "f", "f#", "g", "g#", "a", "a#", "b")


def caption(meta: Meta, rng: random.Random, typos: float = 0.0) -> str:
    """One wording; style, instruments, speed, mood and the rest each come and go.

    `typos` is the share of captions with misspelt words. Tempo and key are also written as the app
    adds them, "bpm: 120. key: a minor".
    """
    kind, alone = rng.random(), meta.style in ("drums", "solo")
    if kind < (0.3 if alone else 0.0):
        text = _alone(meta, rng)
    elif kind < 0.4:
        text = _scene(meta, rng)
    elif kind < 0.47:
        text = rng.choice(STYLE_WORDS[meta.style])
        text = f"{_instrument(meta, rng)} {text}" if meta.style == "solo" else text
    else:
        text = _described(meta, rng)
    if rng.random() < 0.1:
        text = f"{text}, {rng.choice(NO_VOICE)}"
    elif rng.random() < 0.08:
        text = f"{text}, {_negation(meta, rng)}".rstrip(", ")
    if rng.random() < typos:
        text = misspelt(text, rng)
    if rng.random() < 0.15:
        text = text.capitalize()
    pairs = [f"bpm: {meta.bpm + rng.choice((-1, 0, 0, 0, 1))}"] if rng.random() < 0.25 else []
    if rng.random() < 0.2 and meta.style != "drums":
        pairs.append(f"key: {_tonic(meta, rng)} {meta.mode}")
    if pairs:
        return ". ".join([text.rstrip("., "), *pairs])
    return text + "." if rng.random() < 0.1 else text


def _tonic(meta: Meta, rng: random.Random) -> str:
    return rng.choice((FLATS, SHARPS))[meta.key]


def _instrument(meta: Meta, rng: random.Random) -> str:
    return rng.choice(INSTRUMENT_WORDS[rng.choice(meta.instruments)])


def _alone(meta: Meta, rng: random.Random) -> str:
    """What is asked for when only drums, or one instrument, shall be heard."""
    speed = rng.choice(SPEED_WORDS[meta.speed]) if rng.random() < 0.4 else ""
    what = _instrument(meta, rng)
    if meta.style == "drums":
        beat = rng.choice(("a drum kit", "drums", "a drummer", "percussion", what, "drum set"))
        doing = rng.choice(("playing a beat", "playing", "keeping a beat", "groove", "beat", ""))
        text = f"{beat} {doing}"
    else:
        article = rng.choice(("a", "one", "solo", "single", ""))
        doing = rng.choice(("playing", "playing a melody", "melody", "", "piece", "solo"))
        text = f"{article} {what} {doing}"
    opening = rng.choice(("just", "only", "", "nothing but", "simply"))
    tail = rng.choice((*ALONE, "", "no melody" if meta.style == "drums" else "no drums"))
    text = " ".join(f"{opening} {speed} {text}".split())
    return f"{text}, {tail}" if tail else text


def _scene(meta: Meta, rng: random.Random) -> str:
    """What it is for, with or without what it is."""
    scene = rng.choice(SCENES[meta.style])
    mood = rng.choice(MOOD_WORDS[meta.mode]) if rng.random() < 0.4 else ""
    speed = rng.choice(SPEED_WORDS[meta.speed]) if rng.random() < 0.4 else ""
    what = rng.choice((rng.choice(STYLE_WORDS[meta.style]), "music", "music", "song", "soundtrack"))
    if meta.style == "solo":
        what = f"solo {_instrument(meta, rng)}"
    link = rng.choice(("for", "that sounds like", "like", "in the mood of", "for a video about"))
    return " ".join(f"{speed} {mood} {what} {link} {scene}".split())


def _negation(meta: Meta, rng: random.Random) -> str:
    """Something that the song really lacks, or nothing."""
    lacking = [] if meta.drums else list(NO_DRUMS)
    for kind, words in ABSENT.items():
        if not any(word in name for name in meta.instruments for word in words):
            lacking += [f"no {kind}", f"without {kind}"]
    return rng.choice(lacking) if lacking else ""


def misspelt(text: str, rng: random.Random) -> str:
    """One or two words of five letters or more with letters swapped, lost, doubled or mistaken."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    for i in rng.sample(long, min(len(long), rng.choice((1, 1, 2)))):
        word, at = words[i], rng.randrange(1, len(words[i]) - 1)
        words[i] = rng.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :],
            )
        )
    return " ".join(words)


def _described(meta: Meta, rng: random.Random) -> str:
    def maybe(share: float, words: list[str]) -> str:
        return rng.choice(words) if rng.random() < share else ""

    style = rng.choice(STYLE_WORDS[meta.style])
    names = [rng.choice(INSTRUMENT_WORDS[name]) for name in meta.instruments]
    rng.shuffle(names)
    names = names[: rng.choice((1, 2, 2, 3))]
    speed = maybe(0.65, SPEED_WORDS[meta.speed])
    mood = maybe(0.5, [*MOOD_WORDS[meta.mode], f"{meta.mode} key"]) if meta.style != "drums" else ""
    level = maybe(0.6, LEVEL_WORDS[meta.dynamics])
    bpm = maybe(0.15, [f"{meta.bpm} bpm", f"at {meta.bpm} bpm"])
    key = maybe(0.08, [f"in {PITCH_NAMES[meta.key]} {meta.mode}"]) if meta.style != "drums" else ""
    drumless = "" if meta.drums else maybe(0.3, NO_DRUMS)
    change = maybe(0.3, ["with two sections", "with a change"]) if meta.change else ""
    extra = [maybe(0.3, FILLERS), bpm, key, change, drumless]
    noun = "" if style.split()[-1] in NOUNS else rng.choice(NOUNS)
    if meta.style == "solo" and rng.random() < 0.9:  # else nothing names the instrument
        style, noun = f"{rng.choice(('solo', 'a', ''))} {names[0]}".strip(), rng.choice(NOUNS)
    return _wording(rng, style, noun, names, speed, mood, level, extra)


def _wording(
    rng: random.Random,
    style: str,
    noun: str,
    names: list[str],
    speed: str,
    mood: str,
    level: str,
    extra: list[str],
) -> str:
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
        words = [rng.choice(OPENINGS), mood, style, "with", played, speed]
    return " ".join(" ".join(words).split())
