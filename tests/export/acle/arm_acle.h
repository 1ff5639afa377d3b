/* The intrinsics of ARM's DSP extension that exported C calls, as their documentation says; for tests alone. */
#include <stdint.h>

static inline int32_t __sxtab16(int32_t a, int32_t x)
{
    const uint32_t low = (uint32_t)((int16_t)a + (int8_t)x) & 0xffff;
    const uint32_t high = (uint32_t)((int16_t)((uint32_t)a >> 16) + (int8_t)((uint32_t)x >> 16)) & 0xffff;
    return (int32_t)(high << 16 | low);
}

static inline int32_t __sxtb16(int32_t x)
{
    return __sxtab16(0, x);
}

static inline int32_t __smlad(int32_t a, int32_t b, int32_t sum)
{
    const int32_t low = (int16_t)a * (int16_t)b;
    const int32_t high = (int16_t)((uint32_t)a >> 16) * (int16_t)((uint32_t)b >> 16);
    return (int32_t)((uint32_t)sum + (uint32_t)low + (uint32_t)high);
}
