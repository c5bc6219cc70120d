#!/bin/sh
# `docker run IMAGE reproduce-pdml SCALE=demo` is `make reproduce-pdml SCALE=demo` in the image.
# -o setup: the environment was made when the image was built, and is never made again here.
set -eu
exec make -o setup "$@"
