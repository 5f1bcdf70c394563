"""The frozen language model: loading, quantisation, ways to run it in training, decoding."""
