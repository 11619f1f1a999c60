/* The device policy of a cgroup v2: a small BPF program that the kernel asks before a device node is made or opened.
 *
 * diyc/cgroups/devices.py writes the program; here are the two calls of bpf(2) that load it and bind it to a
 * directory. The binding keeps the program alive and goes with the directory: nothing is left to undo. */
#include "spawner.h"
#include "sys.h"

#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <unistd.h>

static long bpf_call(int command, union bpf_attr *attributes) {
    return sys_call3(__NR_bpf, command, SYS_P(attributes), sizeof(*attributes));
}

static long program_load(const void *instructions, size_t size) {
    union bpf_attr load = {
        .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, /* Linux 4.15 */
        .insns = (uintptr_t)instructions,
        .insn_cnt = (uint32_t)(size / sizeof(struct bpf_insn)),
        .license = (uintptr_t) "Apache-2.0",
        .prog_name = "diyc_devices",
    };
    return bpf_call(BPF_PROG_LOAD, &load);
}

/* BPF_F_ALLOW_MULTI: directories below may have programs of their own, as those of a supervisor inside a job. All the
 * programs on the way up are asked, and each may refuse (bpf(2)). */
int device_program_attach(const void *instructions, size_t size, int cgroup, const char **what) {
    *what = "load a BPF program for devices";
    long program = program_load(instructions, size);
    if (program < 0)
        return (int)program;
    union bpf_attr attach = {
        .target_fd = (uint32_t)cgroup,
        .attach_bpf_fd = (uint32_t)program,
        .attach_type = BPF_CGROUP_DEVICE,
        .attach_flags = BPF_F_ALLOW_MULTI,
    };
    *what = "attach a BPF program for devices";
    long ret = bpf_call(BPF_PROG_ATTACH, &attach);
    sys_close((int)program);
    return (int)ret;
}
