"""The model card of an export: the README.md that model hubs show for a folder."""

from typing import Any

import yaml

from minigpt4.text.templates import Template

_CARD = """---
{header}---

# MiniGPT-4, as {class_name}

A frozen vision encoder and a frozen language model, joined by a trained projection (MiniGPT-4). Exported by
`python -m minigpt4.export`; every tensor has the value that it has there, and no code of its own is needed.

```python
from transformers import AutoProcessor, {class_name}

model = {class_name}.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
content = [{{"type": "image", "url": "image.jpg"}}, {{"type": "text", "text": "Describe this image."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, generation_config=model.generation_config)
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

`transformers serve FOLDER` answers the OpenAI API with it.

| part | trained with (name, fingerprint) |
|---|---|
{parts}

- **Prompt** (in `chat_template.jinja`): `{prompt}`; an answer ends with `{stops}`.
- **Licence**: {license}. The language model and the vision encoder have licences of their own, which go with them.
- **Limits**: {limits}
- `minigpt4/` holds manifest, configuration and, if there was one, the run card of the training;
  {way_back}
"""
_WAY_BACK = "`python -m minigpt4.export FOLDER --to checkpoint NEW_FOLDER` makes the checkpoint of them again."
LIMITS = {
    "Blip2ForConditionalGeneration": "the class wants `pixel_values`, so a dialogue without an image needs a blank "
    "one; it normalises the ViT's last output with an epsilon of 1e-6 instead of 1e-5.",
    "LlavaForConditionalGeneration": "the class normalises the tower's output with the tower's epsilon (SigLIP: 1e-6) "
    "instead of 1e-5.",
}


def model_card(
    class_name: str,
    template: Template,
    manifest: dict[str, Any],
    repetition_penalty: float = 1.0,
    lost: str = "",
) -> str:
    """Return the text of the card; `manifest` is the checkpoint's, `lost` why it cannot be made of the export again."""
    license = manifest["licence"]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["minigpt-4"],
    }
    if license:
        header["license"] = license.lower()
    parts = [("LLM", manifest["parts"]["llm"]), *manifest["parts"]["vision"].items()]
    part_rows = [
        f"| {name} | {part['name']}, `{part['fingerprint'][:16]}` |" for name, part in parts
    ]
    limits = LIMITS[class_name]
    if repetition_penalty != 1:
        limits += f" `repetition_penalty` {repetition_penalty} also counts the prompt's tokens, here only the answer's."
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        class_name=class_name,
        parts="\n".join(part_rows),
        prompt=repr(template.training or template.user[0])[
            1:-1
        ],  # line breaks as \n, without quotes
        stops="`, `".join(map(repr, template.stop)),
        license=license or "not stated",
        limits=limits,
        way_back=f"the checkpoint cannot be made of them again: {lost}." if lost else _WAY_BACK,
    )
