#define MONO_VARIANT avx512
#define MONO_VARIANT_NAME "avx512"
#include "host/variant_body.h"

namespace mono {
const Variant& avx512_variant() { return avx512::variant; }
}  // namespace mono
