#!/bin/sh
# The images of a URL list as tar shards, by img2dataset in an environment of its own: it needs webdataset < 0.3.
# Arguments: the name of the calling script, its URL list, its output folder, then what the user gave.
set -eu

version=1.47.0
caller=$1 url_list=$2 output=$3
shift 3
converter=convert_${caller#download_}
converter=${converter%.sh}.py
environment=${IMG2DATASET_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/minigpt4/img2dataset-$version}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

help() {
    cat <<END
usage: sh $caller [URL_LIST [OUTPUT_FOLDER]] [--OPTION VALUE ...]

Downloads the images of URL_LIST (default $url_list, from the convert script)
into OUTPUT_FOLDER (default $output) as NNNNN.tar with NNNNN_stats.json, and says
at the end what was lost. Start it again to resume where it stopped.

Every option of img2dataset $version is taken; these are the defaults:
  --processes_count 16        processes that download and resize; about one a core
  --thread_count 128          downloads at a time in each of them
  --image_size 256            side of the stored square in pixels
  --resize_mode border        border (white margins), keep_ratio, center_crop, no
  --retries 0                 tries after the first; each costs a dead host 10 s more
  --incremental_mode incremental   or overwrite, extend
  --enable_wandb False        True logs to Weights & Biases
  --distributor multiprocessing    or pyspark, ray: more than one machine; install it first with
                              $environment/bin/python -m pip install pyspark

Environment: IMG2DATASET_ENV (where img2dataset lives, now $environment),
PYTHON (what builds it, now ${PYTHON:-python3}), and pip's own, like PIP_INDEX_URL.
END
}

fail() {
    echo "$caller: $1" >&2
    exit 1
}

install() { # built beside and renamed, so that an interrupted installation is never taken for a whole one
    fresh=$environment.$$
    trap 'rm -rf "$fresh"' EXIT
    echo "installing img2dataset $version into $environment (once, about 800 MB)" >&2
    mkdir -p "$(dirname "$environment")"
    "${PYTHON:-python3}" -m venv "$fresh" || fail "could not make a virtual environment (Debian: apt install python3-venv)"
    "$fresh/bin/python" -m pip install --quiet "img2dataset==$version" || fail "pip could not install img2dataset"
    "$fresh/bin/python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$fresh" "$environment" 2>/dev/null ||
        [ -x "$environment/bin/python" ] || fail "could not rename $fresh to $environment"
}

check_options() { # img2dataset itself names a misspelt option only after the whole download
    "$environment/bin/python" - "$@" <<'END'
import inspect, sys
import img2dataset
known = set(inspect.signature(img2dataset.download).parameters) - {"url_list", "output_folder"}
given = [argument[2:].split("=")[0] for argument in sys.argv[1:] if argument.startswith("--")]
unknown = [name for name in given if name.replace("-", "_") not in known]
if unknown:
    sys.exit(f"unknown option --{unknown[0]}; URL list and output folder are the first two arguments, see --help")
END
}

for argument in "$@"; do
    case $argument in -h | --help) help && exit ;; esac
done
case ${1:---} in -*) ;; *) url_list=$1 && shift ;; esac
case ${1:---} in -*) ;; *) output=$1 && shift ;; esac
case $url_list in
*://*) ;;
*) [ -e "$url_list" ] || fail "no URL list at '$url_list'; make it with python dataset/$converter" ;;
esac
[ -x "$environment/bin/python" ] || install
check_options "$@" || exit 2

code=0
trap 'code=130' INT # img2dataset stops by itself; what it got is counted all the same
"$environment/bin/python" -m img2dataset.main --url_list "$url_list" --input_format tsv --url_col url \
    --caption_col caption --output_format webdataset --output_folder "$output" --processes_count 16 \
    --thread_count 128 --image_size 256 --resize_mode border --retries 0 --incremental_mode incremental \
    --enable_wandb False --distributor multiprocessing "$@" || code=$?
# PYTHONSAFEPATH: else modules beside that file hide those of the standard library, such as inspect
PYTHONSAFEPATH=1 "$environment/bin/python" "$root/minigpt4/datasets/download_stats.py" "$output" || [ "$code" -ne 0 ] || code=1
exit "$code"
