#!/usr/bin/env bash
# Record docs/images/first-example.svg, the terminal of README. The run and its times are real; only the typing is not.
# Needs `make demo` once, `pip install termtosvg-ng`, and the environment activated: bash docs/recording.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1-}" != inside ]; then
    exec python -m termtosvg docs/images/first-example.svg -g 86x20 -m 60 -D 6000 -t window_frame \
        -c "bash docs/recording.sh inside"
fi

library=$(mktemp -d)
trap 'rm -rf "$library"' EXIT

run() { # type the arguments as one line, then run loracast with them
    printf '\033[32m$\033[0m '
    for ((i = 0; i < ${#1}; i++)); do
        printf '%s' "${1:i:1}"
        sleep 0.03
    done
    echo
    eval "$1 --library $library" 2>&1 | sed -u "s| --library $library||" # as without the library that this makes
    echo
    sleep 1
}

run 'loracast learn examples/allotment.txt'
run 'loracast ask "Where do the seed potatoes come from?" -a allotment'
run 'loracast ask "What is wrong with the hose?" -a allotment'
run 'loracast ask "What is wrong with the hose?" --max-tokens 40'
