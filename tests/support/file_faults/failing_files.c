/* LD_PRELOAD: calls on files fail, each as often as there are tokens.
 *
 * FAULT_ROOT    folder of the files
 * FAULT_NAME    part of their names; or several, separated by commas
 * FAULT_CALL    open (for reading) or write
 * FAULT_ERROR   number of the error
 * FAULT_TOKENS  folder of tokens: a fault removes a file NAME-1, NAME-2, ...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int takes_token(const char *tokens, const char *name) {
    for (int number = 1; number <= 64; number++) {
        char token[PATH_MAX];
        snprintf(token, sizeof token, "%s/%s-%d", tokens, name, number);
        if (unlink(token) == 0) return 1;
    }
    return 0;
}

static int fails(const char *path, const char *call) {
    const char *root = getenv("FAULT_ROOT"), *names = getenv("FAULT_NAME"), *tokens = getenv("FAULT_TOKENS");
    if (!root || !names || !tokens || strcmp(getenv("FAULT_CALL"), call) != 0) return 0;
    const char *last = path ? strrchr(path, '/') : NULL;
    if (!last || strncmp(path, root, strlen(root)) != 0) return 0;
    char list[1024], *rest = list;
    snprintf(list, sizeof list, "%s", names);
    for (char *name; (name = strsep(&rest, ","));)
        if (strstr(last, name) && takes_token(tokens, name)) {
            errno = atoi(getenv("FAULT_ERROR"));
            return 1;
        }
    return 0;
}

static int refuses_open(const char *path, int flags) {
    return (flags & O_ACCMODE) == O_RDONLY && access(path, F_OK) == 0 && fails(path, "open");
}

static void after_open(const char *path, int flags) { (void)path, (void)flags; }

#include "calls.h"

ssize_t write(int file, const void *buffer, size_t count) {
    REAL(write);
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        if (fails(path, "write")) return -1;
    }
    return real(file, buffer, count);
}
