"""The messages of FUSE, as the kernel has them: numbers, and the layouts of fixed parts.

Source: Linux, include/uapi/linux/fuse.h, protocol 7.38
"""

import struct

VERSION, MINOR_VERSION = 7, 38
ROOT_ID = 1
NO_HANDLE = (1 << 64) - 1

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN = (
    *range(1, 7),
    *range(8, 15),
)
READ, WRITE, STATFS, RELEASE, FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT = (
    *range(15, 19),
    *range(20, 27),
)
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT = range(27, 37)
DESTROY, BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = 38, *range(42, 48)
SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE = range(48, 52)

IN_HEADER = struct.Struct("<IIQQIIIH2x")  # length, opcode, unique, node, uid, gid, pid, words of extensions
OUT_HEADER = struct.Struct("<IiQ")  # length, -errno, unique
ATTRIBUTES = struct.Struct("<6Q10I")
ENTRY_OUT = struct.Struct("<4Q2I")  # node, generation, validity of name and attributes; ATTRIBUTES follow
ATTR_OUT = struct.Struct("<QI4x")  # validity; ATTRIBUTES follow
INIT_IN = struct.Struct("<4I")  # version, minor version, read ahead, flags
INIT_IN_FLAGS2 = struct.Struct("<I44x")
INIT_OUT = struct.Struct("<4I2H2I2HI28x")
GETATTR_IN = struct.Struct("<I4xQ")  # flags, handle
SETATTR_IN = struct.Struct("<I4x6Q4I4x2I4x")
MKNOD_IN = struct.Struct("<3I4x")  # mode, device, umask
MKDIR_IN = struct.Struct("<2I")  # mode, umask
RENAME_IN = struct.Struct("<Q")  # new directory
RENAME2_IN = struct.Struct("<QI4x")  # new directory, flags
LINK_IN = struct.Struct("<Q")  # node
OPEN_IN = struct.Struct("<2I")  # flags of open(2), more flags
CREATE_IN = struct.Struct("<4I")  # flags of open(2), mode, umask, more flags
OPEN_OUT = struct.Struct("<QI4x")  # handle, flags
READ_IN = struct.Struct("<2Q2IQI4x")  # handle, offset, size, flags, lock owner, flags of open(2)
WRITE_IN = READ_IN
WRITE_OUT = struct.Struct("<I4x")  # size
RELEASE_IN = struct.Struct("<Q2IQ")  # handle, flags of open(2), more flags, lock owner
FLUSH_IN = struct.Struct("<Q8xQ")  # handle, lock owner
FSYNC_IN = struct.Struct("<QI4x")  # handle, flags
STATFS_OUT = struct.Struct("<5Q3I28x")
SETXATTR_IN = struct.Struct("<2I")  # size, flags
GETXATTR_IN = GETXATTR_OUT = struct.Struct("<I4x")  # size
LOCK_IN = struct.Struct("<4Q3I4x")  # handle, owner, first and last byte, type, process, flags
LOCK_OUT = struct.Struct("<2Q2I")
INTERRUPT_IN = struct.Struct("<Q")  # unique
FORGET_IN = struct.Struct("<Q")  # lookups
BATCH_FORGET_IN = struct.Struct("<I4x")  # how many; for each node and lookups
FORGET_ONE = struct.Struct("<2Q")
FALLOCATE_IN = struct.Struct("<3QI4x")  # handle, offset, length, mode
LSEEK_IN = struct.Struct("<2QI4x")  # handle, offset, whence
LSEEK_OUT = struct.Struct("<Q")
COPY_FILE_RANGE_IN = struct.Struct("<7Q")  # handle, offset, node, handle, offset, length, flags
SETUPMAPPING_IN = struct.Struct("<5Q")  # handle, offset in the file, length, flags, offset in the window
REMOVEMAPPING_IN = struct.Struct("<I")  # how many; a REMOVEMAPPING_ONE for each follows at once
REMOVEMAPPING_ONE = struct.Struct("<2Q")  # offset in the window, length
DIRENT = struct.Struct("<2Q2I")  # inode, offset of the next one, length of the name, type; the name follows
ALIGN = 8  # of directory entries

# INIT
ASYNC_READ, POSIX_LOCKS, ATOMIC_O_TRUNC, BIG_WRITES = 1 << 0, 1 << 1, 1 << 3, 1 << 5
FLOCK_LOCKS, AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 10, 1 << 12, 1 << 13, 1 << 14
ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS = 1 << 15, 1 << 18, 1 << 22, 1 << 23
MAP_ALIGNMENT, INIT_EXT = 1 << 26, 1 << 30

# SETATTR
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_HANDLE = (1 << bit for bit in range(7))
SET_ATIME_NOW, SET_MTIME_NOW = 1 << 7, 1 << 8

GETATTR_FH = 1 << 0
DIRECT_IO, KEEP_CACHE, CACHE_DIRECTORY = 1 << 0, 1 << 1, 1 << 3  # flags of an open file
FSYNC_DATA = 1 << 0
LOCK_FLOCK = 1 << 0
MAPPING_WRITE = 1 << 0
