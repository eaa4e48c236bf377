/* LD_PRELOAD: flock is not implemented in the folder NO_LOCKS_ROOT, as on Lustre mounted without it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int flock(int file, int operation) {
    const char *root = getenv("NO_LOCKS_ROOT");
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (root && length > 0) {
        path[length] = 0;
        if (strncmp(path, root, strlen(root)) == 0) {
            errno = ENOSYS;
            return -1;
        }
    }
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(file, operation);
}
