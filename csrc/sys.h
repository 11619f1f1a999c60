/* Raw system calls: they return -errno and touch neither errno nor anything else of libc.
 *
 * The child shares its parent's memory, so whatever libc would write (errno, locks, buffers) it would
 * write into the running supervisor. Constants that older headers lack are here too. */
#ifndef DIYC_SYS_H
#define DIYC_SYS_H

#include <asm/unistd.h>
#include <stddef.h>
#include <stdint.h>

#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

struct sys_clone_args { /* struct clone_args of linux/sched.h, as of Linux 5.7 */
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal;
    uint64_t stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

struct sys_open_how { /* struct open_how of linux/openat2.h */
    uint64_t flags, mode, resolve;
};

struct sys_mount_attr { /* struct mount_attr of linux/mount.h */
    uint64_t attr_set, attr_clr, propagation, userns_fd;
};

#if defined(__x86_64__)

static inline long sys_call(long n, long a, long b, long c, long d, long e) {
    long ret;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return ret;
}

/* clone and clone3 return twice, the second time on an empty stack: the child must not return from here
 * but call fn(arg), which glibc's wrappers cannot do for clone3. */
static inline long sys_clone_call(long n, long a, long b, long c, void (*fn)(void *), void *arg) {
    long ret;
    register void *r8 __asm__("r8") = (void *)fn;
    register void *r9 __asm__("r9") = arg;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %%r9, %%rdi\n\t"
                     "call *%%r8\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(ret)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

#elif defined(__aarch64__)

static inline long sys_call(long n, long a, long b, long c, long d, long e) {
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory", "cc");
    return x0;
}

static inline long sys_clone_call(long n, long a, long b, long c, void (*fn)(void *), void *arg) {
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register void *x5 __asm__("x5") = (void *)fn;
    register void *x6 __asm__("x6") = arg;
    __asm__ volatile("svc 0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t"
                     "mov x0, x6\n\t"
                     "blr x5\n\t"
                     "brk 0\n"
                     "1:"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x5), "r"(x6)
                     : "memory", "cc", "x30");
    return x0;
}

#else
#error "diyc knows x86-64 and aarch64"
#endif

#define SYS_P(pointer) ((long)(uintptr_t)(pointer))

static inline long sys_call0(long n) {
    return sys_call(n, 0, 0, 0, 0, 0);
}
static inline long sys_call1(long n, long a) {
    return sys_call(n, a, 0, 0, 0, 0);
}
static inline long sys_call2(long n, long a, long b) {
    return sys_call(n, a, b, 0, 0, 0);
}
static inline long sys_call3(long n, long a, long b, long c) {
    return sys_call(n, a, b, c, 0, 0);
}
static inline long sys_call4(long n, long a, long b, long c, long d) {
    return sys_call(n, a, b, c, d, 0);
}

/* Runs fn(arg) on the stack that `args` names. */
static inline long sys_clone3(struct sys_clone_args *args, void (*fn)(void *), void *arg) {
    return sys_clone_call(__NR_clone3, SYS_P(args), sizeof(*args), 0, fn, arg);
}
/* The same with the older call, whose flags have 32 bits and whose stack is named by its upper end. Its fourth and
 * fifth argument are left as they are: no flag of ours makes the kernel look at them. */
static inline long sys_clone(unsigned long flags, void *stack_end, int *pid, void (*fn)(void *), void *arg) {
    return sys_clone_call(__NR_clone, (long)flags, SYS_P(stack_end), SYS_P(pid), fn, arg);
}
static inline long sys_close(int fd) {
    return sys_call1(__NR_close, fd);
}
static inline long sys_openat2(int dir, const char *path, const struct sys_open_how *how) {
    return sys_call4(__NR_openat2, dir, SYS_P(path), SYS_P(how), sizeof(*how));
}
static inline long sys_write(int fd, const void *bytes, size_t len) {
    return sys_call3(__NR_write, fd, SYS_P(bytes), (long)len);
}
static inline long sys_open_tree(int dir, const char *path, unsigned flags) {
    return sys_call3(__NR_open_tree, dir, SYS_P(path), flags);
}
static inline long sys_move_mount(int from, const char *from_path, int to, const char *to_path, unsigned flags) {
    return sys_call(__NR_move_mount, from, SYS_P(from_path), to, SYS_P(to_path), flags);
}
static inline long sys_mount_setattr(int dir, const char *path, unsigned flags, struct sys_mount_attr *attr) {
    return sys_call(__NR_mount_setattr, dir, SYS_P(path), flags, SYS_P(attr), sizeof(*attr));
}
static inline long sys_mount(const char *source, const char *target, const char *type, unsigned long flags,
                             const void *data) {
    return sys_call(__NR_mount, SYS_P(source), SYS_P(target), SYS_P(type), (long)flags, SYS_P(data));
}

#endif
