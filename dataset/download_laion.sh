#!/bin/sh
# laion_synthetic_filtered_large.tsv -> laion_dataset/{00000..}.tar; --help tells the options.
exec sh "$(dirname -- "$0")/download.sh" download_laion.sh laion_synthetic_filtered_large.tsv laion_dataset "$@"
