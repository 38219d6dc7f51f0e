#!/usr/bin/env bash
# AMX's tiles take their shapes from 64 bytes of memory, which _tile_loadconfig hands to the CPU. One would expect that the
# compiler writes the structure before that. gcc 12 tells its optimiser that the instruction reads 8 bytes: the rows and
# bytes per row, which begin at byte 16, are never stored, and the CPU is given whatever the stack held. -O0 stores them.
#
# Seen with gcc 12.2.0 of Debian 12 (SEEN below). Needs: x86-64 Debian with apt-get and its package index. No AMX: the
# program is compiled and read, not run. Ten seconds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
version=12.2.0-14+deb12u1
apt-get download -qq -o APT::Sandbox::User=root cpp-12=$version libgcc-12-dev=$version libisl23 libmpc3 libmpfr6 libgmp10 >/dev/null
for package in *.deb; do dpkg-deb -x "$package" root; done
gcc=root/usr/lib/gcc/x86_64-linux-gnu/12
export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu

cat > tiles.c <<'C'
#include <amxtileintrin_only.h>
typedef unsigned char  byte;
typedef unsigned short word;
void configure(int rows) {
    struct { byte palette, start_row, reserved[14]; word bytes[16]; byte rows[16]; } tiles = {.palette = 1};
    for (int t = 0; t < 8; t++) tiles.bytes[t] = 64, tiles.rows[t] = (byte)rows;
    _tile_loadconfig(&tiles);
}
C
# gcc's own header, which only <immintrin.h> may include
sed '/error "Never use/d' "$gcc/include/amxtileintrin.h" > amxtileintrin_only.h

for level in 0 2; do
    "$gcc/cc1" -quiet -O$level -mamx-tile -I. tiles.c -o tiles.s
    grep -q ldtilecfg tiles.s
    grep -q 64 <(grep -E '\$64|4194368' tiles.s) && found=stored || found=lost
    grep -q edi tiles.s && rows=stored || rows=lost
    echo "-O$level: 64 bytes per row are $found, the number of rows is $rows"
done | tee seen
diff seen - <<'SEEN'
-O0: 64 bytes per row are stored, the number of rows is stored
-O2: 64 bytes per row are lost, the number of rows is lost
SEEN
