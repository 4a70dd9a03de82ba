#define MONO_VARIANT avx512bf16
#define MONO_VARIANT_NAME "avx512bf16"
#include "host/variant_body.h"

namespace mono {
const Variant& avx512bf16_variant() { return avx512bf16::variant; }
}  // namespace mono
