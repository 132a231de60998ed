"""What runs before a model's program, in the program's own process: `python -I confined.py FOLDER SECONDS MEMORY_BYTES`.

The process leaves the network, and every mounted file system but FOLDER becomes read-only for it. Then it runs
FOLDER/program.py. This file is run by itself, so it imports the standard library alone.
"""

import ctypes
import os
import resource
import runpy
import struct
import sys

PROGRAM = "program.py"
# exit code where the system does not allow it
REFUSED = 97
FILE_BYTES, OPEN_FILES, PROCESSES = 2**20, 64, 32
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x00020000
MS_BIND, MS_PRIVATE = 4096, 1 << 18
CAPABILITY_VERSION = 0x20080522
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1


def confine(folder: str) -> None:
    """Take network and writable files away.

    Raises:
        OSError: the system does not allow it.
    """
    library, path = ctypes.CDLL(None, use_errno=True), folder.encode()

    def done(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def set_attributes(at: bytes, flags: int, added: int, removed: int) -> None:
        attributes = struct.pack("QQQQ", added, removed, MS_PRIVATE, 0)
        done(library.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, at, flags, attributes, len(attributes)))

    done(library.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS))
    done(library.mount(path, path, None, MS_BIND, None))
    set_attributes(b"/", AT_RECURSIVE, RDONLY, 0)
    set_attributes(path, 0, 0, RDONLY)
    # the old working folder is the one below the mount
    os.chdir(folder)
    # without capabilities in its own namespace it cannot mount anything again
    done(library.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6)))


def limit(seconds: int, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        resource.setrlimit(name, (most, most))


if __name__ == "__main__":
    folder, seconds, memory_bytes = sys.argv[1:]
    try:
        confine(folder)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    limit(int(seconds), int(memory_bytes))
    sys.argv = [PROGRAM]
    runpy.run_path(PROGRAM, run_name="__main__")
