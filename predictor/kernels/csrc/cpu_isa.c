/* Detection of the instruction sets that the kernels use. */
#include "kernels.h"

#include <sys/syscall.h>
#include <unistd.h>

/* Compiled without AVX, because it runs on every CPU. */
__attribute__((target("no-avx"))) int cpu_isa(void) {
    const int arch_req_xcomp_perm = 0x1023, xfeature_xtile_data = 18; /* Linux grants AMX tiles on request only. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return ISA_NONE;
    if (!__builtin_cpu_supports("amx-int8")) return ISA_AVX512_VNNI;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtile_data) ? ISA_AVX512_VNNI : ISA_AMX;
}
