"""The contact sheet as one self-contained HTML page: images, and their texts token by token."""

import base64
import io
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

from minigpt4.text.preview import CUT, KINDS, TARGET, Token

# of each token kind, in the order of KINDS: its text in the legend, its hue and saturation
_LEGEND = (("start token", "48 90%"), ("prompt: read", "214 90%"), ("the image", "262 80%"))
_LEGEND += (
    ("target: learnt", "140 60%"),
    ("read, not learnt", "220 10%"),
    ("cut off: neither", "0 90%"),
)
_STYLE = """:root{color-scheme:light dark;--back:86%;--ink:22%}
@media(prefers-color-scheme:dark){:root{--back:24%;--ink:88%}}
body{font:15px/1.6 system-ui,sans-serif;margin:1rem;overflow-wrap:anywhere}h1{font-size:1.3rem}h2{font-size:1.1rem}
.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,34rem),1fr))}
figure{border:1px solid #8886;border-radius:.5rem;margin:0;padding:.7rem}figure.is-cut{border:2px solid #ef4444}
p{margin:.3rem 0}figure p{clear:both;font-size:.85em}img{float:left;width:14rem;margin:0 .7rem .3rem 0}
img.small{image-rendering:pixelated}@media(max-width:30rem){img{float:none;display:block}}
.text{white-space:pre-wrap}.text span:nth-child(even){filter:brightness(93%)}span{border-radius:2px;padding:1px 0}
.special{outline:1px solid}.cut{text-decoration:line-through}b{color:#dc2626}
i::before{content:"↵";font-style:normal;opacity:.6}.text span:empty::before{content:"∅"}
"""
_SIGNS = {"\n": "<i></i>\n", "\t": "⇥"}


class Card(NamedTuple):
    """One sample: its ID, its images in reading order, and the Tokens of its text."""

    sample_id: str
    images: Sequence[Image.Image]
    tokens: Sequence[Token]


def page(title: str, notes: Sequence[str], groups: Sequence[tuple[str, Sequence[Card]]]) -> str:
    """Return the page as HTML: title, notes, legend, and for each (heading, cards) a grid of cards."""
    style, parts = _STYLE, []
    legend = ['<span class="special">framed: a special token</span>']
    for kind, (label, hue) in zip(KINDS, _LEGEND, strict=True):
        style += f".{kind}{{background:hsl({hue} var(--back));color:hsl({hue} var(--ink))}}\n"
        legend.append(f'<span class="{kind}">{label}</span>')
    for heading, cards in groups:
        parts.append(
            f'<h2>{visible(heading)}</h2>\n<div class="cards">\n{"".join(map(_figure, cards))}</div>'
        )
    lines = "\n".join(f"<p>{visible(note)}</p>" for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{visible(title)}</title>\n<style>{style}</style>\n<h1>{visible(title)}</h1>\n{lines}\n"
        f"<p>{' '.join(legend)}</p>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _figure(card: Card) -> str:
    read, cut = summary(card.tokens)
    spans = []
    for token in card.tokens:
        kind = f"{token.kind} special" if token.is_special else token.kind
        spans.append(f'<span class="{kind}">{visible(token.text)}</span>')
    return (
        f"<figure{' class=is-cut' if cut else ''}><p>{visible(card.sample_id)}</p>{''.join(map(_img, card.images))}"
        f'<div class="text">{"".join(spans)}</div><p>{read} <b>{cut}</b></p></figure>\n'
    )


def _img(image: Image.Image) -> str:
    """Return an image element that contains its data; small images are enlarged without smoothing."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    kind = ' class="small"' if image.width < 224 else ""
    return f'<img{kind} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def visible(text: str) -> str:
    """Return a text as HTML in which every character is visible; the sign for a line break is not copied with text."""
    shown = []
    for char in text:
        if char in _SIGNS:
            shown.append(_SIGNS[char])
        elif unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"[U+{ord(char):04X}]")
        else:
            shown.append(escape(char))
    return "".join(shown)


def summary(tokens: Sequence[Token]) -> tuple[str, str]:
    """Return (the numbers of tokens read and learnt, the number cut off or "") of a card, as texts."""
    sizes = dict.fromkeys(KINDS, 0)
    for token in tokens:
        sizes[token.kind] += token.size
    num_cut = sizes[CUT]
    cut = f"{num_cut} token{'s' if num_cut > 1 else ''} cut off" if num_cut else ""
    return f"{sum(sizes.values()) - num_cut} tokens read, {sizes[TARGET]} of them learnt", cut
