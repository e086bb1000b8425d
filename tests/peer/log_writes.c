/* Loaded before libc: appends what is written to one file, and each barrier, to a log.
 *
 * PILEUS_LOG_TARGET names the file, PILEUS_LOG the log. A record is a kind (W write, T truncate, P punch a
 * hole, S sync), an offset and a length as native 64-bit integers, and for W the data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_target(int fd)
{
	struct stat it, target;
	const char *path = getenv("PILEUS_LOG_TARGET");

	return path && fstat(fd, &it) == 0 && stat(path, &target) == 0 && it.st_ino == target.st_ino &&
	       it.st_dev == target.st_dev;
}

static void record(char kind, uint64_t offset, uint64_t length, const struct iovec *data, int count)
{
	static int log = -1;
	uint64_t head[3] = { (uint64_t)kind, offset, length };
	struct iovec all[65] = { { head, sizeof(head) } };

	if (log < 0)
		log = open(getenv("PILEUS_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
	if (count)
		memcpy(all + 1, data, count * sizeof(*data));
	if (writev(log, all, count + 1) != (ssize_t)(sizeof(head) + (count ? length : 0)))
		abort();
}

#define REAL(name, ...) ((int (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define REAL_SIZE(name, ...) ((ssize_t (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
	struct iovec one = { (void *)data, length };

	if (is_target(fd))
		record('W', offset, length, &one, 1);
	return REAL_SIZE("pwrite64", int, const void *, size_t, off64_t)(fd, data, length, offset);
}

ssize_t pwritev64(int fd, const struct iovec *vectors, int count, off64_t offset)
{
	uint64_t length = 0;

	for (int i = 0; i < count; i++)
		length += vectors[i].iov_len;
	if (is_target(fd))
		record('W', offset, length, vectors, count);
	return REAL_SIZE("pwritev64", int, const struct iovec *, int, off64_t)(fd, vectors, count, offset);
}

int ftruncate64(int fd, off64_t size)
{
	if (is_target(fd))
		record('T', 0, size, NULL, 0);
	return REAL("ftruncate64", int, off64_t)(fd, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	if (is_target(fd))
		record('P', offset, length, NULL, 0);
	return REAL("fallocate64", int, int, off64_t, off64_t)(fd, mode, offset, length);
}

int fdatasync(int fd)
{
	int result = REAL("fdatasync", int)(fd);

	if (is_target(fd))
		record('S', 0, 0, NULL, 0);
	return result;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
	return pwrite64(fd, data, length, offset);
}

ssize_t pwritev(int fd, const struct iovec *vectors, int count, off_t offset)
{
	return pwritev64(fd, vectors, count, offset);
}

int ftruncate(int fd, off_t size)
{
	return ftruncate64(fd, size);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	return fallocate64(fd, mode, offset, length);
}
