"""Split a caption into words as COCO's caption evaluation does, but without Java.

coco-caption runs Stanford's PTBTokenizer (Penn Treebank words, in lower case), then drops punctuation. `caption_words`
implements the same rules with a regular expression. Results should name it: CAPTION_TOKENIZER.
"""

from __future__ import annotations

import re

CAPTION_TOKENIZER = "Penn Treebank words by regular expression, version 1"

# Tokens that coco-caption drops. Brackets stay: its list has -LRB-, which does not match the lower-case -lrb-.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"’": "'", "‘": "`", "“": "``", "”": "''", "–": "--", "—": "--", "…": "...", '"': "''"}
)
_LETTER = r"[^\s!-/:-@\[-`{-~]"  # anything but whitespace and ASCII punctuation
# abbreviations keep their period
_SHORT = "mr|mrs|ms|dr|st|jr|sr|prof|rev|gen|capt|lt|sgt|gov|sen|mt|ave|blvd|rd|ft|inc|co|corp|ltd|bros|dept|vs|etc"
_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[a-z]+>
    | (?:[a-z]\.){{2,}} | (?:{_SHORT})\.            # u.s. a.m. mr.
    | no\.(?=\s*\d)
    | (?<!\S)[-+]\d+(?:[.,:/]\d+)*                # -5
    | \d+(?:[.,:/]\d+)+                           # 3.5 1,000 10:30 1/2
    | [do]'[a-z]{{2,}}                             # o'clock
    | n't\b                                       # do|n't
    | 't(?:is|was)\b | 'n' | '(?:s|m|d|re|ve|ll|em)\b
    | {_LETTER}+(?:[-/_]{_LETTER}+)*(?<!n(?='t\b)) # dog, t-shirt, black/white
    | \.{{2,}} | -+ | [!?]+ | ``|'' | \S
    """,
    re.VERBOSE,
)
# words that the Penn Treebank splits in two
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "'tis": "'t is",
    "'twas": "'t was",
}


def caption_words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation.

    "A man's T-shirt isn't red." -> a, man, 's, t-shirt, is, n't, red. Characters beyond U+FFFF (emoji) are dropped, as
    Stanford's tokenizer 3.4.1 does; other scripts are split at whitespace.
    """
    text = re.sub(r"[\U00010000-\U0010ffff]", " ", text.lower().translate(_PLAIN))
    words: list[str] = []
    for token in _TOKEN.findall(text):
        token = "..." if token.startswith("..") else token
        if token not in _DROPPED:
            words += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return words
