"""laion_synthetic_filtered_large.json of BLIP -> laion_synthetic_filtered_large.tsv for download_laion.sh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minigpt4.datasets.convert import main

if __name__ == "__main__":
    sys.exit(main("laion_synthetic_filtered_large"))
