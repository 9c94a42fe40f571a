// Preloaded into a process: numbers what it does to files below one folder, kills it at one number, and logs the rest.
//
// Build: cc -shared -fPIC -o disk_shim.so disk_shim.c -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static long armed_at = -1, count = 0;
static int log_fd = -1, torn = 0;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// kill_at < 0: never. log: a descriptor for records, or -1. tear: half of the write at kill_at is done first.
void shim_arm(const char *folder, long kill_at, int log, int tear) {
    snprintf(root, sizeof root, "%s", folder);
    armed_at = kill_at, log_fd = log, torn = tear, count = 0;
}
long shim_count(void) { return count; }

static void record(char op, const char *path, const char *other, int64_t offset, const void *data, int64_t n) {
    if (log_fd < 0) return;
    int64_t head[4] = {(int64_t)strlen(path), (int64_t)strlen(other), offset, n};
    struct iovec parts[5] = {{&op, 1}, {head, sizeof head}, {(void *)path, strlen(path)},
                             {(void *)other, strlen(other)}, {(void *)data, data ? (size_t)n : 0}};
    syscall(SYS_writev, log_fd, parts, 5);
}
void shim_mark(void) { record('M', "", "", 0, 0, 0); }

static int below(const char *path) { return *root && !strncmp(path, root, strlen(root)); }
static int named(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
    path[n > 0 ? n : 0] = 0;
    return fd != log_fd && below(path);
}
static int dies(void) { return count++ == armed_at; }
static void die(void) { kill(getpid(), SIGKILL); }

static void created(int dir, const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC)) || !below(path)) return;
    int missing = syscall(SYS_faccessat, dir, path, F_OK);
    if (missing || (flags & O_TRUNC)) {
        if (dies()) die();
        record(missing ? 'C' : 'T', path, "", 0, 0, 0);
    }
}
#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                    \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0;         \
        va_end(rest);                                               \
        created(AT_FDCWD, path, flags);                             \
        return syscall(SYS_openat, AT_FDCWD, path, flags, mode);    \
    }
OPEN(open)
OPEN(open64)

#define PWRITE(name)                                                                             \
    ssize_t name(int fd, const void *data, size_t n, off64_t at) {                               \
        char path[4096];                                                                         \
        if (named(fd, path)) {                                                                   \
            if (dies()) {                                                                        \
                if (torn) syscall(SYS_pwrite64, fd, data, n / 2, at);                            \
                die();                                                                           \
            }                                                                                    \
            record('W', path, "", at, data, n);                                                  \
        }                                                                                        \
        return syscall(SYS_pwrite64, fd, data, n, at);                                           \
    }
PWRITE(pwrite64)
#undef pwrite
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }

ssize_t write(int fd, const void *data, size_t n) {
    char path[4096];
    if (named(fd, path)) {
        int64_t at = syscall(SYS_lseek, fd, 0, SEEK_CUR);
        if (dies()) {
            if (torn) syscall(SYS_write, fd, data, n / 2);
            die();
        }
        record('W', path, "", at, data, n);
    }
    return syscall(SYS_write, fd, data, n);
}
static int synced(int fd, long call) {
    char path[4096];
    if (named(fd, path)) {
        if (dies()) die();
        int result = syscall(call, fd);
        record('S', path, "", 0, 0, 0);
        return result;
    }
    return syscall(call, fd);
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }
static int cut(int fd, off64_t n) {
    char path[4096];
    if (named(fd, path)) {
        if (dies()) die();
        record('T', path, "", n, 0, 0);
    }
    return syscall(SYS_ftruncate, fd, n);
}
int ftruncate64(int fd, off64_t n) { return cut(fd, n); }
int ftruncate(int fd, off_t n) { return cut(fd, n); }
int unlink(const char *path) {
    if (below(path)) {
        if (dies()) die();
        int result = syscall(SYS_unlinkat, AT_FDCWD, path, 0);
        if (!result) record('U', path, "", 0, 0, 0);
        return result;
    }
    return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
int rename(const char *from, const char *to) {
    if (below(from)) {
        if (dies()) die();
        int result = syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
        if (!result) record('R', from, to, 0, 0, 0);
        return result;
    }
    return syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}
