/* Calls of the C library that a library in front of it replaces.
 *
 * Define two functions before you include it:
 *   int refuses_open(const char *path, int flags)    whether open fails; sets errno
 *   void after_open(const char *path, int flags)     called after open has succeeded
 */
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name, signature, arguments)                                        \
    int name signature {                                                        \
        REAL(name);                                                             \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        if (refuses_open(path, flags)) return -1;                               \
        int opened = real arguments;                                            \
        if (opened >= 0) after_open(path, flags);                               \
        return opened;                                                          \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))
