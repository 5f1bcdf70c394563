#!/bin/sh
# ccs_synthetic_filtered_large.tsv -> cc_sbu_dataset/{00000..}.tar; --help tells the options.
exec sh "$(dirname -- "$0")/download.sh" download_cc_sbu.sh ccs_synthetic_filtered_large.tsv cc_sbu_dataset "$@"
