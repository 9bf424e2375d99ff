// Asks Linux for permission to use AMX tiles in this process.
#include "amx_tiles.h"
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// 1 if the AMX kernels were compiled in and may run.
EXPORT int enable_amx() {
#if AMX_KERNELS
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}
