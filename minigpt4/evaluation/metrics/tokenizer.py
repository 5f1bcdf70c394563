"""Split a caption into words as COCO's caption evaluation does, but without Java.

coco-caption runs Stanford's PTBTokenizer (Penn Treebank words, in lower case), then drops punctuation. `caption_words`
implements its rules for what captions contain with a regular expression (docs/evaluation.md says what is left out).
Results should name it: CAPTION_TOKENIZER.
"""

from __future__ import annotations

import re

CAPTION_TOKENIZER = "Penn Treebank words by regular expression, version 2"

# Tokens that coco-caption drops. Brackets stay: its list has -LRB-, which does not match the lower-case -lrb-.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"’": "'", "‘": "`", "“": "``", "”": "''", "–": "--", "—": "--", "…": "...", '"': "''"}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | {"£": " # ", "€": " $ ", "¢": " cents "}
)
# anything but whitespace, ASCII punctuation and symbols such as the degree sign
_LETTER = r"[^\s!-/:-@\[-`{-~¢-©¬-³×÷™]"
_ALPHA = r"[^\W\d_]"
# Abbreviations that keep their period: always, before a number, in capitals.
_SHORT = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|mr|mrs|ms|messrs|drs?|ste?|jr|sr|profs?|"
    "rev|hon|pres|gen|capt|cmdr|lt|col|maj|sgt|adm|brig|cpl|pvt|gov|sens?|reps?|supt|insp|esq|ave|blvd|rd|sq|ct|mt|ft|"
    "inc|cos?|corp|ltd|bros|dept|assn|assoc|univ|est|intl|natl|mfg|plc|vs|etc|al|cf|tel|ext|bldg|ala|ariz|calif|colo|"
    "conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|dak|ph\\.d|elec|jos|wm|alex"
)
_SHORT_NUMBERED = "nos?|pp|figs?|ca|art|op"
_SHORT_CAPITALISED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
# words before which an initial has no period: they begin a sentence
_STARTS = (
    "The|A|An|It|He|She|They|We|You|This|That|These|There|In|At|But|So|If|As|Her|Their|Our|What|When|While|After|Some|"
    "One|Many|Then|Here|Now|Other"
)
_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]{{1,64}}@[\w-]+(?:\.[\w-]+)+
    | </?[a-z]+>
    | [a-z](?=\.\s+(?-i:{_STARTS})(?![.\w]))      # plan A. The dog
    | (?: (?:[a-z]\.)+ | (?:{_SHORT})\. | (?-i:{_SHORT_CAPITALISED})\. )(?!{_ALPHA}|\.)  # u.s. a. mr.
    | (?:{_SHORT_NUMBERED})\.(?=\s*\d)
    | (?-i:[A-Z]+&[A-Z]+)(?!{_ALPHA}) | c\+\+ | [cf]\# # AT&T
    | \#{_ALPHA}+ | \#{{2,}} | @{_ALPHA}\w*          # hashtag, @home
    | (?<!\S)[-+]\.?\d+(?:[.,:/]\d+)*              # -5
    | \d+(?:[.,:/]\d+)+(?:-[a-z]+)* | \.\d+         # 3.5 1,000 10:30 1/2 0.5-inch
    | (?<!\w)'\d\ds?(?![\w'])                      # '90s
    | (?:[dlo]|qu)'[a-z]{{2,}} | [cn]'est\b | c'mon\b | s'mores\b | ma'ams?\b | ne'er\b   # o'clock
    | y'(?=all\b|know\b) | ol'(?!\w)
    | n't\b                                         # do|n't
    | 't(?:is|was)\b | 'n' | '(?:s|m|d|re|ve|ll|em|til|cause)\b
    | (?: {_ALPHA}{_LETTER}*(?:[.!?]{_ALPHA}{_LETTER}*)+ | {_LETTER}+ )  # line.Next
      (?:[-/_]{_LETTER}+)*(?<!n(?='t\b))            # dog, t-shirt, black/white
    | \.{{2,}} | -+ | [!?]+ | ``|'' | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
# words that the Penn Treebank splits in two
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}


def caption_words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation.

    "A man's T-shirt isn't red." -> a, man, 's, t-shirt, is, n't, red. Characters beyond U+FFFF (emoji) are dropped, as
    Stanford's tokenizer 3.4.1 does; other scripts are split at whitespace.
    """
    text = re.sub(r"[\U00010000-\U0010ffff]", " ", text.translate(_PLAIN))
    words: list[str] = []
    for token in map(str.lower, _TOKEN.findall(text)):
        token = "..." if token.startswith("..") else token
        if token not in _DROPPED:
            words += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return words
