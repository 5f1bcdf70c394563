"""The tasks of MiniGPT-v2 on the page: identifiers in front of a question, and a box drawn on its image."""

from pathlib import Path

import gradio as gr

# identifier -> question, where one makes sense without more
TASKS = {
    "vqa": "",
    "caption": "describe this image in one sentence",
    "grounding": "describe this image in detail",
    "refer": "",
    "detection": "",
    "identify": "what is this",
}


def add_tasks(blocks: gr.Blocks, chatbot: gr.Chatbot, box: gr.MultimodalTextbox) -> None:
    """Add a button for each task and one that draws a box; all of it happens in the browser."""
    with gr.Row(elem_id="tasks"):
        for name, question in TASKS.items():
            button = gr.Button(name, size="sm", min_width=0)
            task = f"boxes.task(message, {name!r}, {question!r})"
            task = f"boxes.draw({task}, chat)" if name == "identify" else task
            button.click(
                None, [box, chatbot], box, js=f"(message, chat) => {task}", api_visibility="private"
            )
        button = gr.Button("draw a box", size="sm", min_width=0)
        draw = "(message, chat) => boxes.draw(message, chat)"
        button.click(None, [box, chatbot], box, js=draw, api_visibility="private")
    blocks.load(
        None,
        js=(Path(__file__).parent / "boxes.js").read_text(encoding="utf-8"),
        api_visibility="private",
    )
