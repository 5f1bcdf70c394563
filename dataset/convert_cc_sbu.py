"""ccs_synthetic_filtered_large.json of BLIP -> ccs_synthetic_filtered_large.tsv for download_cc_sbu.sh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minigpt4.datasets.convert import main

if __name__ == "__main__":
    sys.exit(main("ccs_synthetic_filtered_large"))
