"""The components of the page: theme, examples, chatbot, text box and settings."""

from pathlib import Path

import gradio as gr

from minigpt4.common.utils import is_url
from minigpt4.serving.answers import SETTINGS

FOLDER = Path(__file__).parent
EXAMPLES = {  # image -> question; held-out images of the quickstart
    str(FOLDER / "examples/night_sky.png"): "Describe this image in detail.",
    str(FOLDER / "examples/grass.png"): "What is in this image?",
    str(FOLDER / "examples/brick_wall.png"): "How many objects are there?",
}


def theme() -> gr.Theme:
    """Return gradio's soft theme with visible borders, and system fonts, so that none is downloaded."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    borders = dict.fromkeys(("border_color_primary", "input_border_color"), "*neutral_300")
    return gr.themes.Soft(**fonts).set(**borders, block_border_width="1px")


def chatbot() -> gr.Chatbot:
    """Return the component of the dialogue, which shows examples while it is empty."""
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
        placeholder="### Drop images anywhere, or try one of these examples",
    )


def textbox() -> gr.MultimodalTextbox:
    """Return the text box, which takes a question and images."""
    return gr.MultimodalTextbox(
        show_label=False,
        elem_id="box",
        placeholder="Ask a question; add images with the paperclip, or drop or paste them",
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=100_000,  # gradio turns longer pasted text into a file
        stop_btn=False,
        autofocus=True,
    )


def controls(first: dict[str, float]) -> dict[str, gr.components.Component]:
    """Return the components of the settings by name, with their `first` values; gradio enforces the bounds."""
    components = {}
    rows = (
        ("temperature", "top_p", "top_k", "num_beams"),
        ("max_new_tokens", "repetition_penalty", "seed"),
    )
    for names in rows:
        with gr.Row():
            for name in names:
                setting, kind = SETTINGS[name], gr.Number if name == "seed" else gr.Slider
                components[name] = kind(
                    value=first[name],
                    minimum=setting.least,
                    maximum=setting.most,
                    step=setting.step,
                    precision=0 if setting.step == 1 else None,
                    label=setting.label,
                    info=setting.info,
                    min_width=120,
                )
    return components


def only_uploads(block: gr.blocks.Block) -> None:
    """Make a component refuse URLs, which gradio would download."""
    store = block.async_move_resource_to_block_cache

    async def store_file(path: str | None) -> str | None:
        if path is not None and is_url(path):
            raise gr.Error("images are uploaded; addresses are not fetched", print_exception=False)
        return await store(path)

    block.async_move_resource_to_block_cache = store_file
