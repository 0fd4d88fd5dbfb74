/* Preloaded into a process: whatever it syncs of the files in $POWER_WATCH is copied to $POWER_DURABLE.
 * After a power cut those copies are all that is sure to be there. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    abort();
}

/* Journalling file systems write down a deletion before whatever is synced after it. */
static void forget_the_deleted(const char *watch, const char *durable) {
    char path[PATH_MAX * 2];
    DIR *folder = opendir(durable);
    if (!folder) fail(durable);
    struct dirent *entry;
    while ((entry = readdir(folder))) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", watch, entry->d_name);
        if (!access(path, F_OK)) continue;
        snprintf(path, sizeof path, "%s/%s", durable, entry->d_name);
        if (unlink(path)) fail(path);
    }
    closedir(folder);
}

static void keep(int fd) {
    const char *watch = getenv("POWER_WATCH"), *durable = getenv("POWER_DURABLE");
    char link[64], path[PATH_MAX], part[PATH_MAX + 64], final[PATH_MAX + 64], buffer[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!watch || !durable || length < 0) return;
    path[length] = 0;
    struct stat info;
    if (strncmp(path, watch, strlen(watch)) || fstat(fd, &info) || !S_ISREG(info.st_mode)) return;
    const char *name = strrchr(path, '/') + 1;
    snprintf(final, sizeof final, "%s/%s", durable, name);
    snprintf(part, sizeof part, "%s/.%s.%d", durable, name, getpid());
    int out = open(part, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (out < 0) fail(part);
    off_t at = 0;
    ssize_t count;
    while ((count = pread(fd, buffer, sizeof buffer, at)) > 0) {
        if (write(out, buffer, count) != count) fail("write");
        at += count;
    }
    if (count < 0) fail("pread");
    close(out);
    /* The process may be killed at any moment: the copy is the old or the new one. */
    if (rename(part, final)) fail("rename");
    forget_the_deleted(watch, durable);
}

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    int result = real(fd);
    if (!result) keep(fd);
    return result;
}

int fdatasync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int result = real(fd);
    if (!result) keep(fd);
    return result;
}
