"""From pixels to the vectors that the LLM reads: vision towers and the bridge behind them.

A **tower** describes a vision encoder (`tower.VisionTower`): it knows its image size, mean and std, its width and how
many tokens it makes, builds the network on the meta device and fills it from a file. EVA-CLIP-g is one (`eva_vit.py`).

A **bridge** turns the tower's tokens [B, N, width] into Q vectors an image, [B, Q, H], which the projection maps into
the LLM's embedding space. BLIP-2's Q-Former is one (`qformer.py`).
"""
