"""What the page is made of: its colours, examples, conversation, box and settings, before anything happens."""

from pathlib import Path

import gradio as gr

from minigpt4.common.utils import is_url
from minigpt4.serving.answers import SETTINGS

FOLDER = Path(__file__).parent
EXAMPLES = {  # image -> question; the images are held-out ones of the quickstart
    str(FOLDER / "examples/night_sky.png"): "Describe this image in detail.",
    str(FOLDER / "examples/grass.png"): "What is in this image?",
    str(FOLDER / "examples/brick_wall.png"): "How many objects are there?",
}


def theme() -> gr.Theme:
    """Return gradio's soft theme with the system's fonts, so that none is downloaded, and edges that are seen."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    edges = dict.fromkeys(("border_color_primary", "input_border_color"), "*neutral_300")
    return gr.themes.Soft(**fonts).set(**edges, block_border_width="1px")


def chatbot() -> gr.Chatbot:
    """Return the conversation, with examples to begin with."""
    examples = [{"text": question, "files": [path]} for path, question in EXAMPLES.items()]
    return gr.Chatbot(
        show_label=False,
        elem_id="chat",
        scale=1,
        editable="user",
        buttons=["copy", "copy_all"],
        render_markdown=False,
        latex_delimiters=[],
        examples=examples,
        placeholder="### Drop images anywhere, or begin with one of these",
    )


def textbox() -> gr.MultimodalTextbox:
    """Return the box that takes a question and images."""
    return gr.MultimodalTextbox(
        show_label=False,
        elem_id="box",
        placeholder="Ask something; add images by the clip, by dropping or by pasting",
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=100_000,  # longer pasted text would become a file
        stop_btn=False,
        autofocus=True,
    )


def controls(first: dict[str, float]) -> dict[str, gr.components.Component]:
    """Return the components of the settings by name, with `first` values; gradio holds them to their ranges."""
    made = {}
    rows = (
        ("temperature", "top_p", "top_k", "num_beams"),
        ("max_new_tokens", "repetition_penalty", "seed"),
    )
    for names in rows:
        with gr.Row():
            for name in names:
                setting, kind = SETTINGS[name], gr.Number if name == "seed" else gr.Slider
                made[name] = kind(
                    value=first[name],
                    minimum=setting.least,
                    maximum=setting.most,
                    step=setting.step,
                    precision=0 if setting.step == 1 else None,
                    label=setting.label,
                    info=setting.info,
                    min_width=120,
                )
    return made


def only_uploads(block: gr.blocks.Block) -> None:
    """Make gradio refuse addresses among what is sent to a component; it would fetch them."""
    keep = block.async_move_resource_to_block_cache

    async def keep_file(path: str | None) -> str | None:
        if path is not None and is_url(path):
            raise gr.Error("images are uploaded; addresses are not fetched", print_exception=False)
        return await keep(path)

    block.async_move_resource_to_block_cache = keep_file
