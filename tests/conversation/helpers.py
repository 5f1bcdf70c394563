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
    """Yield a list that gets (rows, positions, highest position) of every forward pass of the LLM.

    Pass number `fail_at` dies before its last layer, when the layers before it have extended their KV caches.
    """
    passes = []

    def note(module, args, kwargs):
        given = (
            kwargs.get("inputs_embeds")
            if kwargs.get("inputs_embeds") is not None
            else kwargs["input_ids"]
        )
        passes.append((*given.shape[:2], int(kwargs["position_ids"].max())))

    def fail(*_):
        if len(passes) == fail_at:
            raise RuntimeError("out of memory")

    llm = chat.model.llama_model
    handles = [llm.register_forward_pre_hook(note, with_kwargs=True)]
    handles.append(llm.model.layers[-1].register_forward_pre_hook(fail))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
