"""Configuration, checkpoints, logging, ranks and other basics; imports no sibling package."""
