"""From pixels to vision vectors: vision towers, and the bridges after them.

A **tower** describes a vision encoder (`tower.VisionTower`): it knows the image size, mean and std, the width and the
number of tokens; it builds the network on the meta device and loads its weights. EVA-CLIP-g is one (`eva_vit.py`).

A **bridge** turns the tower's tokens [B, N, width] into Q vectors per image, [B, Q, H], which the projection maps into
the LLM's embedding space. BLIP-2's Q-Former is one (`qformer.py`).
"""
