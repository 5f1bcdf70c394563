"""MiniGPT-4: one linear layer between a frozen vision encoder and a frozen language model."""

__version__ = "1.0.0"
