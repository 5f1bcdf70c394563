"""The datasets themselves, and the loader that mixes them."""
