// Compiled with -mavx2 -mf16c, without -mfma.
#include "rows_inl.h"

namespace bdk {
const Rows AVX2 = rows_of<Lanes<8>>("avx2");
}
