"""Images and captions from disk, as batches."""
