#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# check.sh PROGRAM: runs the example on two volumes of 8 x 8 x 8 that can be worked out by hand.
#
# Reference: the cube 2..5. Prediction: the same without its last column of voxels along x, and one
# voxel in a corner. Its box 4 x 4 x 3 is 2 deep. Missing plane and extra voxel are both 1 deep, so
# the click goes to the extra one. Of 45 surface distances to the reference 40 are 0, four 1, one
# sqrt(12): their 95th percentile is 1; of 56 back, 40 are 0 and 16 are 1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
none=00000000
empty=$none$none$none$none$none$none$none$none
slab() { printf '%s' "$none$none$1$1$1$1$none$none"; }
full=$(slab 00111100)
short=$(slab 00111000)
corner=$none$none$none$none$none$none${none}00000001
printf '%s' "$empty$empty$full$full$full$full$empty$empty" | tr 01 '\000\001' >"$folder/reference.raw"
printf '%s' "$empty$empty$short$short$short$short$empty$corner" | tr 01 '\000\001' >"$folder/prediction.raw"
"$1" "$folder/prediction.raw" "$folder/reference.raw" 8 8 8 >"$folder/got"
cat >"$folder/expected" <<END
deepest voxel: 2.0000
components: 2
next click: 7 7 7 background
HD95: 1.0000
END
diff "$folder/expected" "$folder/got" && cat "$folder/got"
if "$1" "$folder/prediction.raw" "$folder/reference.raw" 8 8 9 2>"$folder/error"; then
    echo "a file that is too short must be refused" && exit 1
fi
grep -q "expected a file of 576 bytes" "$folder/error"
