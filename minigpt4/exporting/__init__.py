"""A checkpoint in the formats of other programs: `python -m minigpt4.export`."""
