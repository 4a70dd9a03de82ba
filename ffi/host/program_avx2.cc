#define MONO_VARIANT avx2
#define MONO_VARIANT_NAME "avx2"
#include "host/variant_body.h"

namespace mono {
const Variant& avx2_variant() { return avx2::variant; }
}  // namespace mono
