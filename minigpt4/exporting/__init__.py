"""Export a checkpoint to the formats of other programs: `python -m minigpt4.export`."""
