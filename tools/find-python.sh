#!/bin/sh
# Print the Python to build the environment with: the one given as $1, or the first of the list that is good enough.
# Python 3.11 comes first because it is the newest for which tflite-runtime has a wheel.
good='import struct, sys, venv; sys.exit(not (sys.version_info >= (3, 10) and struct.calcsize("P") == 8))'

if [ -n "${1:-}" ]; then
    candidates=$1
else
    candidates='python3.11 python3.12 python3.13 python3.14 python3.10 python3'
fi
for python in $candidates; do
    if "$python" -c "$good" >/dev/null 2>&1; then
        echo "$python"
        exit 0
    fi
done

echo "edgeattn needs a 64-bit Python 3.10 or newer with the module venv; tried: $candidates." >&2
echo "Debian and Raspberry Pi OS (64-bit): sudo apt install python3. Elsewhere: make PYTHON=/path/to/python3.11 ..." >&2
exit 1
