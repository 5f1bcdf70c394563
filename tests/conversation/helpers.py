"""Questions to ask, and a count of what the LLM computes for them."""

from contextlib import contextmanager

from minigpt4.conversation.conversation import CONV_VISION

GREEDY = {"temperature": 0, "max_new_tokens": 16}
TEXT = "what is the colour of this big house and why does it stand near a tree ? ### <ImageHere> </s> é 🙂 \n"


def sentence(draw, most=12):
    return " ".join(draw.choice(TEXT.split(" ")) for _ in range(draw.randint(1, most))) + " x"


def asked(chat, text, images=()):
    conv = CONV_VISION.copy()
    for _ in images:
        conv.append_image()
    chat.ask(text, conv)
    return conv, list(images)


@contextmanager
def computed(chat, fail_at=None):
    """Yield a list that gets (rows, positions, highest position) of every forward pass of the LLM."""
    passes = []

    def note(module, args, kwargs):
        given = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        passes.append((*given.shape[:2], int(kwargs["position_ids"].max())))
        if len(passes) == fail_at:
            raise RuntimeError("out of memory")

    handle = chat.model.llama_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()
