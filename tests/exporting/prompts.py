"""Dialogues in the form of the OpenAI API and as our Conversation."""

import torch

from minigpt4.conversation.message import Message
from minigpt4.text.rows import IMAGE_ID, context_ids
from minigpt4.text.segments import IMAGE, message_segments

QUESTIONS = (
    "What is it?",
    "Describe the old wall.",
    "  two  spaces, a new\nline",
    "Why ### so? ####",
    "Zwölf grüne Bäume 🌳",
    "",
)
SYSTEM = "You are terse."


def user(*parts):
    """Return a user message of texts and image numbers."""
    content = []
    for part in parts:
        is_text = isinstance(part, str)
        content.append(
            {"type": "text", "text": part} if is_text else {"type": "image", "number": part}
        )
    return {"role": "user", "content": content}


def dialogues():
    """Return 20 dialogues with zero, one and two images."""
    found = [[user(question)] for question in QUESTIONS[:5]]
    found += [[user(number, question)] for number, question in enumerate(QUESTIONS[:5])]
    found += [[user(0, 1, question)] for question in QUESTIONS[:3]]
    found += [[user("Compare", 0, "with", 1)], [user("What is", 2, "here?")]]
    answered = {"role": "assistant", "content": "An old wall."}
    found += [
        [user(0, "What is it?"), answered, user("Why?")],
        [user(0, "Now?"), answered, user(1, "And this?")],
    ]
    found += [
        [user("Who?"), answered, user(3, "What is it?")],
        [{"role": "system", "content": SYSTEM}, user(0, "So?")],
    ]
    return [*found, [{"role": "user", "content": "A string alone."}]]


def our_conversation(template, messages):
    """Return (Conversation, its image numbers) of a dialogue."""
    conv, images = template.copy(), []
    for message in messages:
        content = message["content"]
        parts = (
            [content]
            if isinstance(content, str)
            else [part.get("text", part.get("number")) for part in content]
        )
        if message["role"] == "system":
            conv.system = content
        elif message["role"] == "assistant":
            conv.append_message(conv.roles[1], content)
        else:
            numbers = [part for part in parts if not isinstance(part, str)]
            images += numbers
            if parts[: len(numbers)] == numbers:
                for _ in numbers:
                    conv.append_image()
                conv.append_question(parts[-1])
            else:
                parts = [part if isinstance(part, str) else IMAGE for part in parts]
                conv.append_message(conv.roles[0], Message(message_segments(parts)))
    conv.append_message(conv.roles[1], None)
    return conv, images


def their_inputs(processor, messages, images):
    """Return the exported processor's inputs for a dialogue, with a blank image if the dialogue has none."""
    filled = []
    for message in messages:
        content = parts = message["content"]
        if not isinstance(parts, str):
            content = [
                part if "text" in part else {"type": "image", "image": images[part["number"]]}
                for part in content
            ]
        filled.append({**message, "content": content})
    inputs = processor.apply_chat_template(
        filled, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(inputs)


@torch.no_grad()
def largest_difference(chat, template, exported, processor, images):
    """Return the largest difference of logits over the dialogues; assert that ids and pixels are equal."""
    worst, llm = 0.0, chat.model.llama_model
    size = llm.get_input_embeddings().weight.shape[0]
    for messages in dialogues():
        conv, numbers = our_conversation(template, messages)
        embedded = chat.encode_images([images[number] for number in numbers]) if numbers else []
        sizes = [chat.model.num_image_tokens] * len(numbers)
        ids = context_ids(conv.segments(), chat.encoder, sizes)
        inputs = their_inputs(processor, messages, images)
        image_id = exported.config.image_token_id
        assert [image_id if i == IMAGE_ID else i for i in ids] == inputs["input_ids"][0].tolist(), (
            messages
        )
        ours = llm(inputs_embeds=chat.get_context_emb(conv, embedded)).logits
        if numbers:
            pixels = torch.stack([chat.vis_processor(images[number]) for number in numbers])
            # Normalised in another order of operations: the last bit of values up to 2.6 may differ.
            assert (inputs["pixel_values"] - pixels).abs().max() < 5e-7
            inputs["pixel_values"] = pixels
        theirs = their_logits(exported, inputs)[..., :size]
        worst = max(worst, (ours - theirs).abs().max().item())
    return worst


@torch.no_grad()
def their_logits(exported, inputs):
    """Return the logits of an export in its own dtype; Blip2 needs an image, so it gets a blank one if there is none."""
    if exported.config.model_type == "blip-2" and "pixel_values" not in inputs:
        size = exported.config.vision_config.image_size
        inputs["pixel_values"] = torch.zeros(1, 3, size, size)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(exported.dtype)
    return exported(**inputs).logits
