"""Buttons for MiniGPT-v2 on the page: put a task identifier before the question, draw a box on its image."""

from pathlib import Path

import gradio as gr

# identifier -> default question, "" where the task needs one from the user
TASKS = {
    "vqa": "",
    "caption": "describe this image in one sentence",
    "grounding": "describe this image in detail",
    "refer": "",
    "detection": "",
    "identify": "what is this",
}


def add_tasks(blocks: gr.Blocks, chatbot: gr.Chatbot, box: gr.MultimodalTextbox) -> None:
    """Add a button for each task and one that draws a box; they run in the browser alone (boxes.js)."""
    with gr.Row(elem_id="tasks"):
        for name, question in TASKS.items():
            button = gr.Button(name, size="sm", min_width=0)
            task = f"boxes.task(message, {name!r}, {question!r})"
            if name == "identify":  # asks about a box
                task = f"boxes.draw({task}, chat)"
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
