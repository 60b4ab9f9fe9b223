/* SPDX-License-Identifier: Apache-2.0
 *
 * driver.c: libFuzzer's place where there is none: random bytes for a number of seconds, then how
 * many inputs that were. A file name instead of a number runs that file once.
 */
#include "fuzz.h"

#include <time.h>

int main(int argc, char **argv) {
    uint8_t data[512];
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : NULL;
    if (file) {
        size_t n = fread(data, 1, sizeof data, file);
        fclose(file);
        return LLVMFuzzerTestOneInput(data, n);
    }
    double seconds = argc > 1 ? atof(argv[1]) : 1.0;
    uint64_t state = 1, runs = 0;
    for (time_t start = time(NULL); difftime(time(NULL), start) < seconds; ++runs) {
        uint64_t size = 0;
        for (size_t i = 0; i <= sizeof data; ++i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            if (i < sizeof data) {
                data[i] = (uint8_t)(state >> 56);
            } else {
                size = (state >> 33) % sizeof data;
            }
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%llu inputs\n", (unsigned long long)runs);
    return 0;
}
