/* Detection of the instruction sets that the kernels use. */
#include "kernels.h"

#include <sys/syscall.h>
#include <unistd.h>

/* Compiled without AVX, because they run on every CPU. */
#define FOR_ANY_CPU __attribute__((target("no-avx")))

FOR_ANY_CPU static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

/* Linux grants AMX tiles on request only. */
FOR_ANY_CPU static int request_tiles(void) {
    const int arch_req_xcomp_perm = 0x1023, xfeature_xtile_data = 18;
    return !syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtile_data);
}

FOR_ANY_CPU int cpu_isa(void) {
    if (!has_avx512() || !__builtin_cpu_supports("avx512vnni")) return ISA_NONE;
    return __builtin_cpu_supports("amx-int8") && request_tiles() ? ISA_AMX : ISA_AVX512_VNNI;
}

/* Since Sapphire Rapids, which has AVX512-FP16, Intel's CPUs multiply bfloat16 at half the speed of float32. */
FOR_ANY_CPU static int has_fast_avx512_bf16(void) {
    return __builtin_cpu_supports("avx512bf16") && !(__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512fp16"));
}

FOR_ANY_CPU int bf16_isa(void) {
    if (!has_avx512()) return BF16_ISA_NONE;
    if (__builtin_cpu_supports("amx-bf16") && request_tiles()) return BF16_ISA_AMX;
    return has_fast_avx512_bf16() ? BF16_ISA_AVX512_BF16 : BF16_ISA_AVX512;
}
