"""The language model: loading, quantisation, LoRA, sharding, backends for training, decoding."""
