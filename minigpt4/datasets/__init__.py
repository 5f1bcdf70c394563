"""Datasets: from images and texts on disk or remote storage to batches; tools to convert and inspect them."""
