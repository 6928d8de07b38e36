// Compiled apart from rows_avx512.cpp: scheduled before register allocation its sums do not stay in
// registers, and it is a tenth slower.
#include "conv_inl.h"

namespace bdk {
template struct Conv<Lanes<16>>;
}
