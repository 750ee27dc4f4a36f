/* Kills the process at the n-th call that changes files below one directory.
 *
 * Problem: a SIGKILL from outside lands where the process spends its time, and hardly ever between
 * a rename and the fsync after it. But a checkpoint must survive exactly there. So this library
 * stands in front of the C library (LD_PRELOAD), counts every call that creates, writes, syncs,
 * renames or removes something below the root, and at the chosen one sends SIGKILL to its own
 * process: before the call, after it, or, for a write, after half of its bytes. With every n in
 * turn, no instant between two changes of the directory is left out. Nothing is counted before
 * `faultshim_arm`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum moment { BEFORE, HALFWAY, AFTER };

static char root[PATH_MAX];
static size_t root_bytes;
static long kill_at;
static int kill_when;
static atomic_long counted;

/* Begin to count calls below `directory` (absolute); die at call `at` (1 is the first), at `when`
 * (0 before it, 1 halfway through, 2 after it). `at` 0 only counts. */
void faultshim_arm(const char *directory, long at, int when)
{
    atomic_store(&counted, 0);
    kill_at = at;
    kill_when = when;
    snprintf(root, sizeof root, "%s", directory);
    root_bytes = strlen(root);
}

/* How many calls have been counted. */
long faultshim_counted(void)
{
    return atomic_load(&counted);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static int below_root(const char *path)
{
    return root_bytes && strncmp(path, root, root_bytes) == 0 &&
           (path[root_bytes] == '/' || path[root_bytes] == '\0');
}

static int descriptor_below_root(int descriptor)
{
    char link[64], target[PATH_MAX];
    if (!root_bytes)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, target, sizeof target - 1);
    if (size < 0)
        return 0;
    target[size] = '\0';
    return below_root(target);
}

static int path_below_root(int directory, const char *path)
{
    if (path[0] == '/')
        return below_root(path);
    return directory != AT_FDCWD && descriptor_below_root(directory);
}

/* Whether to die in this call, which is counted when it concerns the root. */
static int chosen(int concerned)
{
    return concerned && atomic_fetch_add(&counted, 1) + 1 == kill_at;
}

/* One call: before it, or (halfway being nothing that can be seen for these) after it. */
#define CALL(concerned, type, expression)                                                          \
    do {                                                                                           \
        int now = chosen(concerned);                                                               \
        if (now && kill_when == BEFORE)                                                            \
            die();                                                                                 \
        type result = (expression);                                                                \
        if (now)                                                                                   \
            die();                                                                                 \
        return result;                                                                             \
    } while (0)

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    int now = chosen(descriptor_below_root(descriptor));
    if (now && kill_when == BEFORE)
        die();
    ssize_t written = REAL(write)(descriptor, bytes, now && kill_when == HALFWAY ? size / 2 : size);
    if (now)
        die();
    return written;
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t offset)
{
    int now = chosen(descriptor_below_root(descriptor));
    if (now && kill_when == BEFORE)
        die();
    size_t part = now && kill_when == HALFWAY ? size / 2 : size;
    ssize_t written = REAL(pwrite64)(descriptor, bytes, part, offset);
    if (now)
        die();
    return written;
}

ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t offset)
{
    return pwrite64(descriptor, bytes, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count)
{
    CALL(descriptor_below_root(descriptor), ssize_t, REAL(writev)(descriptor, parts, count));
}

int fsync(int descriptor)
{
    CALL(descriptor_below_root(descriptor), int, REAL(fsync)(descriptor));
}

int fdatasync(int descriptor)
{
    CALL(descriptor_below_root(descriptor), int, REAL(fdatasync)(descriptor));
}

int ftruncate64(int descriptor, off64_t size)
{
    CALL(descriptor_below_root(descriptor), int, REAL(ftruncate64)(descriptor, size));
}

int ftruncate(int descriptor, off_t size)
{
    return ftruncate64(descriptor, size);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    CALL(path_below_root(to_at, to), int, REAL(renameat2)(from_at, from, to_at, to, flags));
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    CALL(path_below_root(to_at, to), int, REAL(renameat)(from_at, from, to_at, to));
}

int rename(const char *from, const char *to)
{
    CALL(path_below_root(AT_FDCWD, to), int, REAL(rename)(from, to));
}

int mkdirat(int at, const char *path, mode_t mode)
{
    CALL(path_below_root(at, path), int, REAL(mkdirat)(at, path, mode));
}

int mkdir(const char *path, mode_t mode)
{
    CALL(path_below_root(AT_FDCWD, path), int, REAL(mkdir)(path, mode));
}

int unlinkat(int at, const char *path, int flags)
{
    CALL(path_below_root(at, path), int, REAL(unlinkat)(at, path, flags));
}

int unlink(const char *path)
{
    CALL(path_below_root(AT_FDCWD, path), int, REAL(unlink)(path));
}

int rmdir(const char *path)
{
    CALL(path_below_root(AT_FDCWD, path), int, REAL(rmdir)(path));
}

static mode_t mode_of(int flags, va_list arguments)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

#define OPENED(name, at, ...)                                                                      \
    do {                                                                                           \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode_t mode = mode_of(flags, arguments);                                                   \
        va_end(arguments);                                                                         \
        int changes = (flags & (O_CREAT | O_TRUNC)) != 0;                                          \
        CALL(changes && path_below_root(at, path), int, REAL(name)(__VA_ARGS__, flags, mode));     \
    } while (0)

int open(const char *path, int flags, ...)
{
    OPENED(open, AT_FDCWD, path);
}

int open64(const char *path, int flags, ...)
{
    OPENED(open64, AT_FDCWD, path);
}

int openat(int at, const char *path, int flags, ...)
{
    OPENED(openat, at, at, path);
}

int openat64(int at, const char *path, int flags, ...)
{
    OPENED(openat64, at, at, path);
}
