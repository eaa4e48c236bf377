/* LD_PRELOAD: one process sees what others do in a folder late, as through the attribute cache of NFS.
 *
 * LATE_ROOT     the folder
 * LATE_PROCESS  id of the process that sees changes late; others are not affected
 * LATE_SECONDS  age that a change must have
 * LATE_STUBBORN if set, a change of its own in the same folder does not make the process look again
 *
 * What is late is a name: a file that was made or replaced less than LATE_SECONDS ago by another process is missing, from
 * listings too.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST 4096

typedef struct {
    char path[PATH_MAX];
    double time;
} entry;

static entry own[MOST];     /* names that this process made */
static entry changed[MOST]; /* folders in which it made one, with the time */
static int owns, changes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static const char *root(void) {
    static const char *folder;
    static int asked;
    if (!asked) {
        const char *process = getenv("LATE_PROCESS");
        folder = process && atoi(process) == getpid() ? getenv("LATE_ROOT") : NULL;
        asked = 1;
    }
    return folder;
}

static int inside(const char *path) {
    const char *folder = root();
    return folder && path && strncmp(path, folder, strlen(folder)) == 0 && path[strlen(folder)] == '/';
}

static entry *find(entry *list, int count, const char *path, size_t length) {
    for (int i = 0; i < count; i++)
        if (strncmp(list[i].path, path, length) == 0 && !list[i].path[length]) return &list[i];
    return NULL;
}

static void record(const char *path) {
    if (!inside(path)) return;
    size_t folder = strrchr(path, '/') - path;
    pthread_mutex_lock(&lock);
    if (!find(own, owns, path, strlen(path)) && owns < MOST) strncpy(own[owns++].path, path, PATH_MAX - 1);
    entry *known = find(changed, changes, path, folder);
    if (!known && changes < MOST) {
        known = &changed[changes++];
        memcpy(known->path, path, folder);
    }
    if (known) known->time = now();
    pthread_mutex_unlock(&lock);
}

static int late(const char *path) {
    if (!inside(path)) return 0;
    struct stat64 found;
    if (syscall(SYS_newfstatat, AT_FDCWD, path, &found, AT_SYMLINK_NOFOLLOW) != 0 || S_ISDIR(found.st_mode)) return 0;
    double made = found.st_ctim.tv_sec + found.st_ctim.tv_nsec / 1e9;
    if (now() - made > atof(getenv("LATE_SECONDS"))) return 0;
    pthread_mutex_lock(&lock);
    entry *folder = find(changed, changes, path, strrchr(path, '/') - path);
    int seen = find(own, owns, path, strlen(path)) || (folder && folder->time > made && !getenv("LATE_STUBBORN"));
    pthread_mutex_unlock(&lock);
    return !seen;
}

static int refuses(const char *path) {
    if (!late(path)) return 0;
    errno = ENOENT;
    return 1;
}

static int refuses_open(const char *path, int flags) { return !(flags & O_CREAT) && refuses(path); }

static void after_open(const char *path, int flags) {
    if (flags & O_CREAT) record(path);
}

#include "calls.h"

#define STAT(name, signature, arguments) \
    int name signature {                 \
        REAL(name);                      \
        if (refuses(path)) return -1;    \
        return real arguments;           \
    }
STAT(stat, (const char *path, struct stat *buffer), (path, buffer))
STAT(stat64, (const char *path, struct stat64 *buffer), (path, buffer))
STAT(lstat, (const char *path, struct stat *buffer), (path, buffer))
STAT(lstat64, (const char *path, struct stat64 *buffer), (path, buffer))
STAT(fstatat, (int at, const char *path, struct stat *buffer, int flags), (at, path, buffer, flags))
STAT(fstatat64, (int at, const char *path, struct stat64 *buffer, int flags), (at, path, buffer, flags))
STAT(access, (const char *path, int mode), (path, mode))

int rename(const char *from, const char *to) {
    REAL(rename);
    int failed = real(from, to);
    if (!failed) record(to);
    return failed;
}

int unlink(const char *path) {
    REAL(unlink);
    int failed = real(path);
    if (!failed) record(path);
    return failed;
}

static int late_in(DIR *folder, const char *name) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd(folder));
    ssize_t length = readlink(link, path, sizeof path - 2);
    if (length < 0 || length + strlen(name) + 2 > sizeof path) return 0;
    path[length] = '/';
    strcpy(path + length + 1, name);
    return late(path);
}

#define READDIR(name, type)                                     \
    struct type *name(DIR *folder) {                            \
        REAL(name);                                             \
        struct type *found;                                     \
        while ((found = real(folder)) && late_in(folder, found->d_name)); \
        return found;                                           \
    }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)
