#define MONO_VARIANT portable
#define MONO_VARIANT_NAME "portable"
#include "host/variant_body.h"

namespace mono {
const Variant& portable_variant() { return portable::variant; }
}  // namespace mono
