/* Preloaded into a program, makes calls of the operating system fail: REFUSE="fallocate=95 lseek=22" names them with the errno that
 * each answers with. Of lseek only the search for data and holes fails, of fcntl only open file description locks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int refused(const char *call)
{
    const char *at = getenv("REFUSE");
    size_t length = strlen(call);
    while (at && (at = strstr(at, call))) {
        if (at[length] == '=')
            return atoi(at + length + 1);
        at += length;
    }
    return 0;
}

#define REFUSE(call) \
    do { \
        int error = refused(call); \
        if (error) { \
            errno = error; \
            return -1; \
        } \
    } while (0)

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    REFUSE("fallocate");
    return ((int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate"))(fd, mode, offset, length);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    if (whence == SEEK_DATA || whence == SEEK_HOLE)
        REFUSE("lseek");
    return ((off64_t (*)(int, off64_t, int))dlsym(RTLD_NEXT, "lseek64"))(fd, offset, whence);
}

int posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
    int error = refused("fadvise");
    return error ? error : ((int (*)(int, off_t, off_t, int))dlsym(RTLD_NEXT, "posix_fadvise"))(fd, offset, length, advice);
}

int fsync(int fd)
{
    REFUSE("fsync");
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int fcntl(int fd, int command, ...)
{
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (command == F_OFD_SETLK || command == F_OFD_GETLK)
        REFUSE(command == F_OFD_SETLK ? "setlk" : "getlk");
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl"))(fd, command, argument);
}
