"""Ask VLMEvalKit's own MiniGPT-4, unmodified: python ask_vlmevalkit.py REQUEST.json.

Set from outside are: the device that torch.cuda.current_device() gives; the values that the adapter's YAML file asks
its users to fill in, and others of `model`; for equal answers the template and greedy decoding.
"""

import json
import sys
from functools import partialmethod
from pathlib import Path

import torch
from omegaconf import OmegaConf

request = json.loads(Path(sys.argv[1]).read_text())

# for a machine without a GPU
torch.cuda.current_device = lambda: "cpu"

# values to set in vlmeval/vlm/misc/minigpt4_7b_eval.yaml
load = OmegaConf.load
OmegaConf.load = lambda path: OmegaConf.merge(load(path), request["yaml"])

from vlmeval.vlm.minigpt4 import MiniGPT4  # noqa: E402

from minigpt4.conversation.conversation import Chat, Conversation, template_for  # noqa: E402

model = MiniGPT4(mode="v1_7b", root=request["root"])
if "sampling" in request:
    Chat.answer = partialmethod(Chat.answer, **request["sampling"])
if "prompt_template" in request:
    model.CONV_VISION = Conversation(template_for(request["prompt_template"], "###"))
answers = {}
for name, (image, question) in request["items"].items():
    message = [{"type": "image", "value": image}, {"type": "text", "value": question}]
    answers[name] = model.generate(message)
Path(request["output"]).write_text(json.dumps(answers))
