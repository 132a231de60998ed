// What must be said once to a process that loads the library.
#include "parallel.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// `parallel`: GOMP_parallel of torch's OpenMP library, or null. Returns 0, or 1 when the system refuses the tiles of AMX.
SALA_EXPORT int sala_prepare(void* parallel) {
  sala::gomp_parallel = reinterpret_cast<sala::GompParallel>(parallel);
#if defined(__AMX_BF16__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 1;
#endif
  return 0;
}
