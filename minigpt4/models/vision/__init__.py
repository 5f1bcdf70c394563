"""Vision towers and the Q-Former."""
