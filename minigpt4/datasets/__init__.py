"""Pictures and captions from disk, as batches."""
