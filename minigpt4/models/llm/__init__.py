"""The frozen language model: loading, quantisation, the ways to run it in training, and decoding."""
