/* A static program that runs as a job and tells what it sees, or does one exact piece of work.
 *
 * `probe report` prints "key value" lines, a key once for each value. Every other command does what its name says
 * (the table at the end); what it was able to do is printed in the same form. It needs nothing of its image. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1024 * 1024 };

extern char **environ;

/* ---- what is seen ---- */

static void see_file(const char *key, const char *path) {
    char line[65536];
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = 0;
        printf("%s %s\n", key, line);
    }
    if (file)
        fclose(file);
}

static void see_status(void) {
    char line[4096];
    FILE *file = fopen("/proc/self/status", "re");
    while (file && fgets(line, sizeof(line), file)) {
        char *value = strchr(line, ':');
        line[strcspn(line, "\n")] = 0;
        if (!value)
            continue;
        *value++ = 0;
        printf("status.%s %s\n", line, value + strspn(value, "\t "));
    }
    if (file)
        fclose(file);
}

static void see_namespaces(void) {
    static const char *const names[] = {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        char path[64], link[64] = "";
        snprintf(path, sizeof(path), "/proc/self/ns/%s", names[i]);
        if (readlink(path, link, sizeof(link) - 1) > 0)
            printf("ns.%s %s\n", names[i], link);
    }
}

static void see_identity(void) {
    uid_t uid[3];
    gid_t gid[3], groups[256];
    getresuid(&uid[0], &uid[1], &uid[2]);
    getresgid(&gid[0], &gid[1], &gid[2]);
    printf("uid %u %u %u\ngid %u %u %u\n", uid[0], uid[1], uid[2], gid[0], gid[1], gid[2]);
    int count = getgroups(256, groups);
    for (int i = 0; i < count; i++)
        printf("group %u\n", groups[i]);
    printf("pid %d\nppid %d\nsid %d\npgid %d\n", getpid(), getppid(), getsid(0), getpgid(0));
    printf("dumpable %d\nno_new_privs %d\n", prctl(PR_GET_DUMPABLE), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    int death = 0;
    prctl(PR_GET_PDEATHSIG, &death);
    printf("pdeathsig %d\n", death);
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++) {
        if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1)
            printf("bounding %d\n", cap);
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
            printf("ambient %d\n", cap);
    }
}

/* Asked of the kernel one by one, so that a /proc that shows too little hides nothing. */
static void see_descriptors(void) {
    for (int fd = 0; fd < 65536; fd++) {
        char path[64], link[4096] = "?";
        if (fcntl(fd, F_GETFD) < 0)
            continue;
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, link, sizeof(link) - 1);
        link[length < 0 ? 0 : length] = 0;
        printf("fd %d %s\n", fd, link);
    }
}

static void see_signals(void) {
    sigset_t blocked;
    sigprocmask(SIG_BLOCK, NULL, &blocked);
    for (int number = 1; number <= SIGRTMAX; number++) {
        struct sigaction action;
        if (sigismember(&blocked, number) == 1)
            printf("blocked %d\n", number);
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN)
            printf("ignored %d\n", number);
    }
}

static void see_limits(void) {
    static const struct {
        const char *name;
        int resource;
    } limits[] = {{"core", RLIMIT_CORE}, {"nofile", RLIMIT_NOFILE}};
    for (size_t i = 0; i < sizeof(limits) / sizeof(*limits); i++) {
        struct rlimit limit;
        getrlimit(limits[i].resource, &limit);
        printf("rlimit.%s %llu %llu\n", limits[i].name, (unsigned long long)limit.rlim_cur,
               (unsigned long long)limit.rlim_max);
    }
    cpu_set_t cpus;
    sched_getaffinity(0, sizeof(cpus), &cpus);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &cpus))
            printf("cpu %d\n", cpu);
}

static void see_links(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct if_nameindex *links = if_nameindex();
    for (struct if_nameindex *link = links; link && link->if_name; link++) {
        struct ifreq request = {0};
        strncpy(request.ifr_name, link->if_name, IFNAMSIZ - 1);
        ioctl(fd, SIOCGIFFLAGS, &request);
        printf("link %s %s\n", link->if_name, request.ifr_flags & IFF_UP ? "up" : "down");
    }
    if (links)
        if_freenameindex(links);
    close(fd);
}

static void see_directory(const char *key, const char *path, int details) {
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        struct stat found;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (!details)
            printf("%s %s\n", key, entry->d_name);
        else if (fstatat(dirfd(directory), entry->d_name, &found, AT_SYMLINK_NOFOLLOW) == 0)
            printf("%s %s %o %u:%u\n", key, entry->d_name, found.st_mode, major(found.st_rdev), minor(found.st_rdev));
    }
    if (directory)
        closedir(directory);
}

static void see_processes(void) {
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));)
        if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9')
            printf("process %s\n", entry->d_name);
    if (proc)
        closedir(proc);
}

static int report(char **args) {
    struct utsname names;
    char cwd[4096] = "";
    mode_t mask = umask(0);
    umask(mask);
    uname(&names);
    getcwd(cwd, sizeof(cwd));
    see_descriptors();
    printf("umask %o\nhostname %s\ndomainname %s\ncwd %s\n", mask, names.nodename, names.domainname, cwd);
    for (; *args; args++)
        printf("arg %s\n", *args);
    for (char **variable = environ; *variable; variable++)
        printf("env %s\n", *variable);
    see_identity();
    see_namespaces();
    see_status();
    see_signals();
    see_limits();
    see_links();
    see_processes();
    see_file("mount", "/proc/self/mountinfo");
    see_file("cgroup", "/proc/self/cgroup");
    see_file("uid_map", "/proc/self/uid_map");
    see_file("gid_map", "/proc/self/gid_map");
    see_file("oom_score_adj", "/proc/self/oom_score_adj");
    see_file("hosts", "/etc/hosts");
    see_file("etc_hostname", "/etc/hostname");
    see_directory("root", "/", 0);
    see_directory("dev", "/dev", 1);
    see_directory("sys_net", "/sys/class/net", 0);
    return 0;
}

/* ---- what is tried: "name errno", 0 where it worked ---- */

static void tried(const char *name, long result) {
    printf("%s %d\n", name, result < 0 ? errno : 0);
}

static int try_open(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY, 0644);
    int error = errno;
    if (fd >= 0)
        close(fd);
    errno = error;
    return fd;
}

static long write_to(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    long written = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return written;
}

/* What no job may do. */
static int forbidden(char **args) {
    tried("mknod_device", mknod("/device", S_IFCHR | 0666, makedev(1, 3)));
    tried("mknod_in_dev", mknod("/dev/device", S_IFCHR | 0666, makedev(1, 3)));
    tried("write_sys", write_to("/sys/kernel/mm/transparent_hugepage/enabled", "always"));
    tried("mkdir_sys", mkdir("/sys/made", 0755));
    tried("mkdir_dev", mkdir("/dev/made", 0755));
    tried("remount", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    tried("mount_tmpfs", mount("none", "/", "tmpfs", 0, NULL));
    tried("umount_proc", umount2("/proc", MNT_DETACH));
    tried("chroot", chroot("/"));
    tried("sethostname", sethostname("other", 5));
    tried("lower_oom_score", write_to("/proc/self/oom_score_adj", "-1000"));
    tried("raise_nofile", setrlimit(RLIMIT_NOFILE, &(struct rlimit){1 << 16, 1 << 16}));
    tried("open_kmsg", try_open("/dev/kmsg", O_RDONLY));
    tried("new_terminal", try_open("/dev/tty", O_RDWR));
    tried("write_sysctl", write_to("/proc/sys/kernel/core_pattern", "x"));
    tried("write_sysrq", write_to("/proc/sysrq-trigger", "h"));
    tried("init_root", try_open("/proc/1/root/scratch", O_RDONLY));
    return 0;
}

/* What every job may do. */
static int allowed(char **args) {
    char byte = 1;
    tried("write_null", write_to("/dev/null", "x"));
    tried("write_full", write_to("/dev/full", "x"));
    int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    long count = read(fd, &byte, 1);
    printf("read_zero %ld %d\n", count, byte);
    close(fd);
    tried("read_urandom", try_open("/dev/urandom", O_RDONLY));
    tried("open_stdout", try_open("/dev/stdout", O_WRONLY));
    tried("open_stderr", try_open("/dev/stderr", O_WRONLY));
    tried("write_shm", try_open("/dev/shm/file", O_WRONLY | O_CREAT));
    tried("mkfifo", mkfifo("/fifo", 0600));
    fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    tried("ptmx", fd);
    tried("unlockpt", fd < 0 || unlockpt(fd) < 0 ? -1 : 0);
    const char *name = fd < 0 ? NULL : ptsname(fd);
    printf("ptsname %s\n", name ? name : "?");
    tried("open_pts", name ? try_open(name, O_RDWR) : -1);
    return 0;
}

/* For each path: can a file be made there? */
static int create(char **args) {
    for (; *args; args++)
        tried(*args, try_open(*args, O_WRONLY | O_CREAT));
    return 0;
}

/* For each path: its owner, group and mode. */
static int look(char **args) {
    for (; *args; args++) {
        struct stat found;
        if (lstat(*args, &found) < 0)
            printf("%s errno %d\n", *args, errno);
        else
            printf("%s %u:%u %o\n", *args, found.st_uid, found.st_gid, found.st_mode & 07777);
    }
    return 0;
}

/* A listener and a client of its own on 127.0.0.1 and on ::1. */
static int loopback(char **args) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct {
        const char *name;
        struct sockaddr *address;
        socklen_t length;
    } ends[] = {{"v4", (struct sockaddr *)&v4, sizeof(v4)}, {"v6", (struct sockaddr *)&v6, sizeof(v6)}};
    for (size_t i = 0; i < 2; i++) {
        int server = socket(ends[i].address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int client = socket(ends[i].address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        long result = bind(server, ends[i].address, ends[i].length);
        if (result == 0)
            result = listen(server, 1);
        if (result == 0)
            result = getsockname(server, ends[i].address, &ends[i].length);
        if (result == 0)
            result = connect(client, ends[i].address, ends[i].length);
        tried(ends[i].name, result);
        close(server);
        close(client);
    }
    return 0;
}

/* ---- work ---- */

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void say(const char *word) {
    printf("%s\n", word);
    fflush(stdout);
}

static void wait_for_ever(void) {
    for (;;)
        pause();
}

static void take_memory(size_t bytes) {
    volatile char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        exit(3);
    for (size_t i = 0; i < bytes; i += 4096)
        memory[i] = 1;
}

static int eat(char **args) {
    take_memory(strtoull(args[0], NULL, 10));
    say("ate");
    return 0;
}

/* A grandchild eats; this process goes on and ends well. */
static int feed(char **args) {
    pid_t child = fork();
    if (child == 0) {
        if (fork() == 0) {
            take_memory(strtoull(args[0], NULL, 10));
            _exit(0);
        }
        wait(NULL);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    say("went on");
    return 0;
}

/* Keep one CPU busy for some seconds of wall-clock time. */
static int burn(char **args) {
    double start = seconds(CLOCK_MONOTONIC), length = strtod(args[0], NULL);
    while (seconds(CLOCK_MONOTONIC) - start < length)
        continue;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("wall %.6f\ncpu %.6f\n", seconds(CLOCK_MONOTONIC) - start, seconds(CLOCK_PROCESS_CPUTIME_ID));
    printf("user %.6f\n", (double)used.ru_utime.tv_sec + (double)used.ru_utime.tv_usec / 1e6);
    return 0;
}

/* Processes until the kernel refuses one: prints how many there are, this one included. */
static int crowd(char **args) {
    int count = 1;
    for (;; count++) {
        pid_t child = fork();
        if (child == 0)
            wait_for_ever();
        if (child < 0)
            break;
    }
    printf("errno %d\nprocesses %d\n", errno, count);
    return 0;
}

/* Descriptors until the kernel refuses one: prints how many there are, 0 to 2 included. */
static int descriptors(char **args) {
    int count = 3;
    while (open("/", O_PATH | O_CLOEXEC) >= 0)
        count++;
    printf("errno %d\ndescriptors %d\n", errno, count);
    return 0;
}

/* Write a file of N bytes, by way of the page cache and fsync, or past it ("direct"). */
static int write_bytes(char **args) {
    static char buffer[BLOCK] __attribute__((aligned(4096)));
    unsigned long long wanted = strtoull(args[1], NULL, 10), written = 0;
    int direct = args[2] && !strcmp(args[2], "direct");
    int fd = open(args[0], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | (direct ? O_DIRECT : 0), 0644);
    double start = seconds(CLOCK_MONOTONIC);
    ssize_t last = fd < 0 ? -1 : 0;
    errno = fd < 0 ? errno : 0;
    while (last >= 0 && written < wanted) {
        last = write(fd, buffer, wanted - written < BLOCK ? wanted - written : BLOCK);
        written += last > 0 ? (unsigned long long)last : 0;
    }
    int error = last < 0 ? errno : 0;
    fsync(fd);
    printf("errno %d\nwritten %llu\nwall %.6f\n", error, written, seconds(CLOCK_MONOTONIC) - start);
    return 0;
}

static int read_direct(char **args) {
    static char buffer[BLOCK] __attribute__((aligned(4096)));
    int fd = open(args[0], O_RDONLY | O_DIRECT | O_CLOEXEC);
    unsigned long long total = 0;
    for (ssize_t count; (count = read(fd, buffer, BLOCK)) > 0;)
        total += (unsigned long long)count;
    printf("read %llu\n", total);
    return 0;
}

/* N bytes "0123456789..." to descriptor FD; a blocking pipe takes each piece whole. */
static int flood(char **args) {
    int fd = atoi(args[0]);
    unsigned long long wanted = strtoull(args[1], NULL, 10);
    char buffer[4000];
    for (size_t i = 0; i < sizeof(buffer); i++)
        buffer[i] = (char)('0' + i % 10);
    for (unsigned long long sent = 0; sent < wanted;) {
        unsigned long long left = wanted - sent;
        ssize_t count = write(fd, buffer, left < sizeof(buffer) ? left : sizeof(buffer));
        if (count < 0)
            return 9;
        sent += (unsigned long long)count;
    }
    return 0;
}

static void leave(int number) {
    _exit(0);
}

/* Say "ready", then wait: `handle` ends well on SIGTERM, `ignore` does not heed it, `wait` has no handler. */
static int wait_handling(char **args) {
    signal(SIGTERM, leave);
    say("ready");
    wait_for_ever();
    return 1;
}

static int wait_ignoring(char **args) {
    signal(SIGTERM, SIG_IGN);
    say("ready");
    wait_for_ever();
    return 1;
}

static int wait_plainly(char **args) {
    say("ready");
    wait_for_ever();
    return 1;
}

static int leave_with(char **args) {
    return atoi(args[0]);
}

static int crash(char **args) {
    volatile int *nowhere = NULL;
    say("crashing");
    *nowhere = 1;
    return 0;
}

static int copy_input(char **args) {
    char buffer[65536];
    for (ssize_t count; (count = read(0, buffer, sizeof(buffer))) > 0;)
        if (write(1, buffer, (size_t)count) != count)
            return 1;
    return 0;
}

static const struct {
    const char *name;
    int arguments;
    int (*run)(char **args);
} commands[] = {
    {"report", 0, report},
    {"forbidden", 0, forbidden},
    {"allowed", 0, allowed},
    {"create", 1, create},
    {"look", 1, look},
    {"loopback", 0, loopback},
    {"eat", 1, eat},
    {"feed", 1, feed},
    {"burn", 1, burn},
    {"crowd", 0, crowd},
    {"descriptors", 0, descriptors},
    {"write", 2, write_bytes},
    {"read", 1, read_direct},
    {"flood", 2, flood},
    {"handle", 0, wait_handling},
    {"ignore", 0, wait_ignoring},
    {"wait", 0, wait_plainly},
    {"exit", 1, leave_with},
    {"crash", 0, crash},
    {"copy", 0, copy_input},
};

int main(int argc, char **argv) {
    for (size_t i = 0; argc > 1 && i < sizeof(commands) / sizeof(*commands); i++)
        if (!strcmp(argv[1], commands[i].name) && argc - 2 >= commands[i].arguments)
            return commands[i].run(argv + 2);
    fprintf(stderr, "usage: probe COMMAND [ARGUMENT]...\n");
    return 64;
}
