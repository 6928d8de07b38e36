// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; products and sums stay unfused
// (-ffp-contract=off).
#include "rows_inl.h"

namespace bdk {
const Rows AVX512 = rows_of<Lanes<16>>("avx512");
}
