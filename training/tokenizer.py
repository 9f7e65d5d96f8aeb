"""A small tokenizer made from the captions' own words, with single characters for all others.

A Unigram model over whole words: a word of the captions is one token, any other English word is
spelt, so nothing is unknown. `PreTrainedTokenizerFast` is used because `T5Tokenizer` drops the
lower-casing normalizer when it is loaded again.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import EncodecFeatureExtractor, MusicgenProcessor, PreTrainedTokenizerFast

from training.captions import (
    ABSENT,
    ALONE,
    FILLERS,
    FLATS,
    INSTRUMENT_WORDS,
    LEVEL_WORDS,
    MOOD_WORDS,
    NO_DRUMS,
    NO_VOICE,
    NOUNS,
    OPENINGS,
    SCENES,
    SHARPS,
    SPEED_WORDS,
    STYLE_WORDS,
)
from training.composer import PITCH_NAMES

# Words that people use of music though no caption does: one token each rather than ten letters.
MORE_WORDS = """guitar guitars piano drum drums bass synth violin cello trumpet sax organ bell choir
voice vocal vocals beat beats groove melody rhythm chord chords the of to in on by from like very
really heavy loud soft deep low high big small new old good great best cool hot cold warm love night
day summer winter rain sun moon sea forest city street dream dance dancing party club game movie
video scene battle epic hero sleep study relax calm peaceful angry aggressive intense powerful
gentle quiet noisy clean dirty distorted acoustic electric electronic digital analog vintage classic
classical modern retro 60s 70s 80s 90s 2000s latin salsa reggae blues soul gospel country western
metal punk indie pop rock rap hip hop trap house trance disco waltz march tango samba bossa nova
medieval celtic my your we they is are be it its that this these and or but with without no not solo
duo trio quartet band orchestra symphony intro outro loop bpm minute second long short simple
complex chill lo-fi bassy slow fast electro track song a
featuring at major minor key play some make just only nothing but simply single one kit set drummer
playing keeping sounds mood about soundtrack music performance recital""".split()  # noqa: SIM905
TEMPI_BPM = range(58, 174)  # of songs at any tempo, one token each
SECTION_WORDS = ("two", "sections", "change", "sharp", "flat")  # last: earlier ids stay
WORD_SCORE, LETTER_SCORE = -8.0, -16.0
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer every time: its words come from the caption lists alone."""
    scores = {PAD: 0.0, END: 0.0, UNKNOWN: 0.0}
    scores |= {"▁" + word: WORD_SCORE for word in sorted(_words())}
    for character in string.ascii_lowercase + string.digits + string.punctuation + "▁":
        scores.setdefault(character, LETTER_SCORE)
    scores |= {",": -4.0, ".": -4.0}
    for word in SECTION_WORDS:
        scores.setdefault("▁" + word, WORD_SCORE)
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=128,
        padding_side="right",
    )


def make_processor(sampling_rate: int, *, stereo: bool = False) -> MusicgenProcessor:
    """What AutoProcessor loads again: the tokenizer and EnCodec's feature extractor."""
    extractor = EncodecFeatureExtractor(
        feature_size=2 if stereo else 1, sampling_rate=sampling_rate, padding_side="left"
    )
    return MusicgenProcessor(extractor, make_tokenizer())


def _words() -> set[str]:
    """Every word that a caption can hold, and those that people add of their own."""
    groups = [STYLE_WORDS, INSTRUMENT_WORDS, SPEED_WORDS, MOOD_WORDS, LEVEL_WORDS, SCENES]
    phrases = [p for group in groups for entry in group.values() for p in entry]
    keys = [name.split()[0].lower() for name in (*PITCH_NAMES, *FLATS, *SHARPS)]
    lists = (NO_DRUMS, NO_VOICE, ALONE, OPENINGS, NOUNS, FILLERS, ABSENT, keys)
    listed = " ".join([*phrases, *(phrase for each in lists for phrase in each)]).split()
    listed += map(str, TEMPI_BPM)
    return {word.strip(",.").lower() for word in listed + MORE_WORDS} | {"bpm:", "key:"}
