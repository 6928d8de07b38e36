#include "rows_inl.h"

namespace bdk {
const Rows BASELINE = rows_of<Lanes<4>>("baseline");
}
