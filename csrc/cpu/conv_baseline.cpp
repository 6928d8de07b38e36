#include "conv_inl.h"

namespace bdk {
template struct Conv<Lanes<4>>;
}
